"""What every file keeps to: length, docstrings, and nothing of the machine it was written on."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400  # aim at 300: a file is read in one sitting


def project_files() -> list[Path]:
    """The tracked files; outside git, as in an unpacked sdist, all but hidden folders and byte code."""
    try:
        run = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
        names = [name for name in run.stdout.split("\0") if name] if run.returncode == 0 else []
    except OSError:
        names = []
    paths = [ROOT / name for name in names] or [
        path
        for path in ROOT.rglob("*")
        if not any(part.startswith((".", "__py")) for part in path.relative_to(ROOT).parts)
    ]
    return sorted(path for path in paths if path.is_file())


FILES = project_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SOURCES = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("src", "tools")]


def test_there_are_files_to_look_at():
    assert ROOT / "pyproject.toml" in FILES
    assert len(SOURCES) >= 5


# --- Length -------------------------------------------------------------------------------------------------------


def too_long(path: Path) -> bool:
    """Whether the file has more than `MAX_LINES` lines."""
    return path.read_bytes().count(b"\n") > MAX_LINES


def test_files_stay_readable():
    assert [str(path.relative_to(ROOT)) for path in PYTHON if too_long(path)] == []


def test_a_planted_long_file_is_seen(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n" * MAX_LINES, encoding="utf-8")
    assert not too_long(path)
    path.write_text("x = 1\n" * (MAX_LINES + 1), encoding="utf-8")
    assert too_long(path)


# --- Docstrings ---------------------------------------------------------------------------------------------------


def without_docstring(path: Path) -> list[str]:
    """The module, public classes, and public functions and methods (`__call__` too) that say nothing of themselves."""
    tree = ast.parse(path.read_bytes())
    found = [] if ast.get_docstring(tree) or not tree.body else [f"{path.name}: the module"]
    waiting: list[ast.AST] = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.If | ast.Try):
                waiting.append(node)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_") and node.name != "__call__":
                continue
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
            if not ast.get_docstring(node) and not marks & {"overload", "setter", "override"}:
                found.append(f"{path.name}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef):
                waiting.append(node)
    return found


def test_public_things_have_docstrings():
    assert [hit for path in SOURCES for hit in without_docstring(path)] == []


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        '"""D."""\ndef f():\n    return 1',
        '"""D."""\nclass A:\n    x = 1',
        '"""D."""\nclass A:\n    """D."""\n    def f(self):\n        return 1',
        '"""D."""\nclass A:\n    """D."""\n    def __call__(self, x):\n        return x',
        '"""D."""\nif True:\n    def f():\n        return 1',
    ],
)
def test_a_planted_missing_docstring_is_seen(tmp_path, text):
    path = tmp_path / "a.py"
    path.write_text(text, encoding="utf-8")
    assert len(without_docstring(path)) == 1


def test_private_and_nested_things_may_go_without(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""D."""\ndef _f():\n    pass\nclass _A:\n    def f(self):\n        pass\n'
        'def g():\n    """D."""\n    def inner():\n        pass\n'
        'class B:\n    """D."""\n    def __init__(self):\n        pass\n',
        encoding="utf-8",
    )
    assert without_docstring(path) == []


# --- Traces of a machine ------------------------------------------------------------------------------------------

# Spelled in two halves, so that this file does not find itself.
TRACES = [
    re.compile(r"(?<![\w.~}])/(?:work|root|home/\w+|Users/\w+)" + r"/[\w.]"),
    re.compile(r"(?i)index[-_]" + r"url|npm_config_" + r"registry|PIP_" + r"INDEX"),
    re.compile(r"https?://" + r"(?:[^/\s:@]+:[^/\s@]+@|10\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"),
    re.compile(r"https?://" + r"[\w.-]+\.(?:internal|local|lan|corp|example)\b"),
]


def traces(path: Path) -> list[str]:
    """Home folders, package indexes and private hosts named in a text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    return [f"{path.name}: {match.group()}" for trace in TRACES for match in trace.finditer(text)]


def test_no_file_names_the_machine_it_was_written_on():
    assert [hit for path in FILES for hit in traces(path)] == []


@pytest.mark.parametrize(
    "text",
    [
        "cd /wo" + "rk/main",
        'open("/ho' + 'me/ann/talk.wav")',
        "/Us" + "ers/bob/x",
        "pip install --index-" + "url x",
        "http://" + "10.0.0.1/simple",
        "https://" + "user:secret@host.org/",
        "https://" + "mirror.internal/pypi",
    ],
)
def test_a_planted_trace_is_seen(tmp_path, text):
    path = tmp_path / "a.md"
    path.write_text(text, encoding="utf-8")
    assert len(traces(path)) == 1


def test_public_addresses_and_relative_paths_are_no_traces(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("https://github.com/a/b src/work/x ~/work/x ${HOME}/work/x docs/home/ann/x", encoding="utf-8")
    assert traces(path) == []
