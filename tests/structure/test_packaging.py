"""pyproject, the built distributions and the documents agree with each other and with the code."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import qwen4b_asr
from package_imports import Source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along there

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLED = Path(qwen4b_asr.__file__).parent


def names(requirements: list[str]) -> set[str]:
    """Distribution names of `requirements`, normalised."""
    return {re.split(r"[\[<>=!~; ]", r, maxsplit=1)[0].lower().replace("-", "_") for r in requirements}


# --- Dependencies -------------------------------------------------------------------------------------------------


def reasons(text: str) -> set[str]:
    """Packages that CONTRIBUTING's dependency table gives a reason for: rows ``| `name` | why |``."""
    return {
        name.lower().replace("-", "_")
        for cells, why in re.findall(r"^\| *((?:`[\w-]+`(?:, )?)+) *\| *(\S.*?) *\|$", text, re.MULTILINE)
        for name in re.findall(r"`([\w-]+)`", cells)
        if len(why) > 10
    }


def test_each_dependency_has_its_reason_written_down():
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    written = reasons((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert names([*PROJECT["dependencies"], *extras]) == written


def test_the_table_reader_reads():
    table = (
        "| package | why |\n|---|---|\n| `mlx` | the arrays of it all |\n| `a-b`, `c` | for some reason |\n| `d` | |\n"
    )
    assert reasons(table) == {"mlx", "a_b", "c"}


def test_run_time_imports_and_dependencies_are_the_same_set():
    source = Source.scan(ROOT / "src" / "qwen4b_asr")
    imported = {
        found.target.partition(".")[0].lower()
        for module in source.modules
        for found in source.imports(module)
        if not found.relative
    }
    assert imported - set(sys.stdlib_module_names) == names(PROJECT["dependencies"])


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == qwen4b_asr.__version__
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- Distributions ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel to look into; the test extra has it")
    folder = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return folder


def tree(folder: str, under: str) -> set[str]:
    """Files below the checkout's `folder`, as they should be called below `under`."""
    return {
        f"{under}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_wheel_carries_code_kernels_and_weights(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        inside = set(wheel.namelist())
    wanted = (
        tree("src/qwen4b_asr", "qwen4b_asr")
        | tree("kernels", "qwen4b_asr/kernels/metal")
        | tree("weights", "qwen4b_asr/weights/data")
    )
    assert "qwen4b_asr/kernels/metal/README.md" in wanted
    assert wanted - inside == set()
    assert [name for name in inside if name.startswith(("tests", "tools"))] == []
    assert {Path(name).name for name in inside if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_the_sdist_carries_what_the_wheel_and_the_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("src", "kernels", "weights", "tests", "tools")
    assert set().union(*(tree(folder, folder) for folder in folders)) - inside == set()
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "NOTICE", "Makefile", "pyproject.toml"} <= inside


# --- README -------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The shell commands in fenced blocks of `text`, split into words; comments and prompts taken off."""
    lines = []
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            parts = re.split(r"&&|\||;", line.removeprefix("$ "))
            # Settings before a command, as in NAME=value command, are the shell's.
            lines += [
                words
                for part in parts
                if (words := shlex.split(re.sub(r"^\s*([A-Z_]+=\S+\s+)+", "", part), comments=True))
            ]
    return lines


def help_of(program: list[str]) -> str:
    """What `program` prints for ``--help``."""
    environment = os.environ | {"PYTHONPATH": str(INSTALLED.parent), "COLUMNS": "200"}
    run = subprocess.run([*program, "--help"], capture_output=True, text=True, cwd=ROOT, env=environment)
    return run.stdout if run.returncode == 0 else f"(exit {run.returncode}) {run.stderr}"


def unknown_words(command: list[str]) -> list[str]:
    """What in a documented command the project does not have: programs, subcommands, options, targets, extras."""
    head, *rest = command
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if head == "qwen4b-asr":
        subcommand = rest[:1] if rest and rest[0] in ("convert", "verify", "train", "doctor") else []
        text = help_of([sys.executable, "-m", "qwen4b_asr", *subcommand])
    elif head.startswith("python") and rest and rest[0].endswith(".py"):
        if not (ROOT / rest[0]).is_file():
            return [rest[0]]
        text = help_of([sys.executable, rest[0]]) if options else ""
    elif head.startswith("python") and rest[:1] == ["-m"] and rest[1].startswith("qwen4b_asr"):
        text = help_of([sys.executable, *rest[:2]])
    elif head == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        return [word for word in rest if "=" not in word and word not in targets]
    elif rest[:1] == ["install"]:
        asked = set(re.findall(r"\.\[([\w,-]+)\]", " ".join(rest)))
        return [e for group in asked for e in group.split(",") if e not in PROJECT["optional-dependencies"]]
    else:
        return [] if head in KNOWN else [head]
    return sorted(option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text))


# Programs of others that the documents may name.
KNOWN = {"export", "pytest", "git", "cd", "pip", "python", "ruff", "mypy", "cat"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTED = [
    command
    for document in ("README.md", "CONTRIBUTING.md", "kernels/README.md")
    for command in commands((ROOT / document).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("command", DOCUMENTED, ids=" ".join)
def test_documented_commands_exist(command):
    assert unknown_words(command) == []


def test_the_readme_leads_with_its_two_commands():
    joined = [" ".join(command) for command in commands(README)]
    assert joined[:2] == ["pip install .", "qwen4b-asr --model demo weights/demo/sample.wav"]
    assert (ROOT / "weights/demo/sample.wav").is_file()
    assert joined[2:4] == ["pip install .[test]", "pytest"]


def test_the_check_script_runs_the_readmes_commands():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for words in commands(README)[:4]:
        line = shlex.join(words).replace("pip install", "pip install --quiet")
        assert re.search(rf"^{re.escape(line)}( |$)", script, re.MULTILINE), line


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("python tools/vendor.py encoder --to x --frobnicate", ["--frobnicate"]),
        ("python tools/nothing.py", ["tools/nothing.py"]),
        ("qwen4b-asr a.wav --no-such-option", ["--no-such-option"]),
        ("pip install '.[nothing]'", ["nothing"]),
        ("make check nonsense", ["nonsense"]),
        ("frobnicate", ["frobnicate"]),
    ],
)
def test_a_planted_wrong_command_is_seen(line, missing):
    (command,) = commands(f"```sh\n{line}\n```\n")
    assert unknown_words(command) == missing


def test_the_command_reader_splits_and_strips():
    text = "```sh\n$ a b && c 'd e'  # why\nf \\\n  g | H=1 h i=2\n```\ntext\n```python\nnot this\n```\n"
    assert commands(text) == [["a", "b"], ["c", "d e"], ["f", "g"], ["h", "i=2"]]


def test_options_named_in_the_readmes_text_exist():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    cli = [sys.executable, "-m", "qwen4b_asr"]
    known = "".join(help_of([*cli, *words]) for words in ([], ["convert"], ["verify"], ["train"], ["doctor"]))
    pip = {"--force-reinstall", "--no-deps"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) - pip
    assert {"--model", "--prompt-profile"} <= named | set(re.findall(r"--[a-z-]+", README))
    assert [option for option in sorted(named) if not re.search(rf"{option}(?![\w-])", known)] == []
