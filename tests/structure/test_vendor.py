"""tools/vendor.py on a small planted checkout: what is copied, what is refused, what drift is seen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vendor
from package_imports import ImportReadError, Source

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "pyproject.toml": '[project]\nname = "toy"\nversion = "1.2.3"\nlicense = "MIT"\ndependencies = [\n'
    '  "mlx[cpu]>=0.32; sys_platform == \'linux\'",\n  "a-b>=2,<3",\n]\n',
    "LICENSE": "Be kind.\n",
    "src/qwen4b_asr/__init__.py": "from .loading import load\n",
    "src/qwen4b_asr/py.typed": "",
    "src/qwen4b_asr/errors.py": "class E(Exception): ...\n",
    "src/qwen4b_asr/encoder.py": "import os\nimport mlx.core as mx\nfrom .errors import E\nfrom .kernels import fsmn\n",
    "src/qwen4b_asr/decoder.py": "import mlx.core\nfrom typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    import numpy\nelse:\n    import os\ndef f():\n    from .cache import C\n    import a_b\n",
    "src/qwen4b_asr/cache.py": "from . import errors\n",
    "src/qwen4b_asr/kernels/__init__.py": "'''Real.'''\n",
    "src/qwen4b_asr/kernels/_loader.py": "NAME = 'metal/{}.metal'\n",
    "src/qwen4b_asr/kernels/fsmn.py": "'See fsmn.metal.'\nfrom ._loader import NAME\nEXTRA = 'other.metal'\n",
    "src/qwen4b_asr/weights/__init__.py": "'''Real.'''\nVERSION = 1\n",
    "src/qwen4b_asr/weights/paths.py": "",
    "src/qwen4b_asr/weights/keymap.py": "from ..errors import E\nfrom . import paths\n",
    "src/qwen4b_asr/weights/load.py": "from . import VERSION\nfrom .keymap import K\n",
    "src/qwen4b_asr/transcribe.py": "from .encoder import X\nfrom .weights.load import L\n",
    "kernels/fsmn.metal": '#include "common.h"\n#include <metal_stdlib>\n',
    "kernels/common.h": "// shared\n",
    "kernels/other.metal": "// named by a string\n",
    "kernels/unused.metal": "// nobody's\n",
    "weights/maps/encoder.json": "{}\n",
    "weights/demo/model.safetensors": "heavy",
}


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout in small."""
    for name, text in FILES.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "checkout"


@pytest.fixture
def target(tmp_path) -> Path:
    """Where to copy to; not made yet."""
    return tmp_path / "app" / "asr"


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


COMMON = {"__init__.py", "py.typed", "LICENSE", "VENDORED.json"}


def test_a_stage_comes_with_its_imports_and_kernels(root, target):
    vendor.vendor(root, target, ["encoder"])
    code = {"encoder.py", "errors.py", "kernels/__init__.py", "kernels/_loader.py", "kernels/fsmn.py"}
    metal = {"kernels/metal/fsmn.metal", "kernels/metal/common.h", "kernels/metal/other.metal"}
    assert listing(target) == COMMON | code | metal
    for name in code - {"kernels/__init__.py"}:
        assert (target / name).read_text() == FILES[f"src/qwen4b_asr/{name}"]
    # Neither package's own __init__ is needed, and the real ones would drag in the rest.
    assert (target / "__init__.py").read_bytes() == (target / "kernels/__init__.py").read_bytes() == vendor.EMPTY_INIT


def test_imports_inside_functions_count(root, target):
    plan = vendor.vendor(root, target, ["decoder"])
    assert listing(target) == COMMON | {"decoder.py", "cache.py", "errors.py"}
    assert plan.needs == ["a-b>=2,<3", "mlx>=0.32"]


def test_a_package_init_is_copied_where_it_is_used(root, target):
    vendor.vendor(root, target, ["weights.load"])
    assert (target / "weights/__init__.py").read_text() == FILES["src/qwen4b_asr/weights/__init__.py"]


def test_data_goes_with_the_module_that_finds_it_and_the_demo_stays(root, target):
    vendor.vendor(root, target, ["weights/keymap.py"])
    data = {name for name in listing(target) if name.startswith("weights/data")}
    assert data == {"weights/data/maps/encoder.json"}


def test_a_package_name_takes_all_its_modules(root, target):
    vendor.vendor(root, target, ["weights"])
    assert {"weights/load.py", "weights/keymap.py", "weights/paths.py", "errors.py"} < listing(target)


def test_the_note_says_where_from(root, target):
    vendor.vendor(root, target, ["encoder"])
    note = json.loads((target / "VENDORED.json").read_text())
    assert (note["project"], note["version"], note["commit"], note["licence"]) == ("toy", "1.2.3", None, "MIT")
    assert note["stages"] == ["encoder"]
    assert note["needs"] == ["mlx>=0.32"]
    assert note["files"]["encoder.py"]["source"] == "src/qwen4b_asr/encoder.py"
    assert note["files"]["kernels/metal/fsmn.metal"]["source"] == "kernels/fsmn.metal"
    assert set(note["files"]) == listing(target) - {"VENDORED.json"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_note_names_the_commit(root, target):
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "One"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    vendor.vendor(root, target, ["decoder"])
    assert json.loads((target / "VENDORED.json").read_text())["commit"] == head
    (root / "src/qwen4b_asr/transcribe.py").write_text("# not copied\n")
    vendor.vendor(root, target)
    assert json.loads((target / "VENDORED.json").read_text())["commit"] == head
    (root / "src/qwen4b_asr/cache.py").write_text("# copied\n")
    vendor.vendor(root, target)
    assert json.loads((target / "VENDORED.json").read_text())["commit"] == head + "+changes"


def test_a_second_stage_joins_and_a_refresh_repeats(root, target):
    vendor.vendor(root, target, ["encoder"])
    vendor.vendor(root, target, ["decoder"])
    once = {name: (target / name).read_bytes() for name in listing(target)}
    assert {"encoder.py", "decoder.py"} < set(once)
    vendor.vendor(root, target)
    assert {name: (target / name).read_bytes() for name in listing(target)} == once


@pytest.mark.parametrize(
    ("stages", "edit", "said"),
    [
        (["nonsense"], None, "no stage is called 'nonsense'; there are cache, decoder"),
        ([], None, "name a stage"),
        (["encoder"], ("src/qwen4b_asr/kernels/fsmn.py", "A = 'gone.metal'"), "gone.metal"),
        (["cache"], ("src/qwen4b_asr/cache.py", "from .nowhere import x"), "cache.py:1: imports .nowhere"),
        (["cache"], ("src/qwen4b_asr/cache.py", "from ..above import x"), "leaves the package"),
    ],
)
def test_what_cannot_be_copied_is_said(root, target, stages, edit, said):
    if edit:
        (root / edit[0]).write_text(edit[1])
    with pytest.raises((vendor.VendorError, ImportReadError)) as caught:
        vendor.vendor(root, target, stages)
    assert said in str(caught.value)
    assert not target.exists()


def test_other_peoples_files_are_not_touched(root, target):
    target.mkdir(parents=True)
    (target / "encoder.py").write_text("mine")
    with pytest.raises(vendor.VendorError, match="choose a new folder"):
        vendor.vendor(root, target, ["encoder"])
    assert listing(target) == {"encoder.py"}
    vendor.vendor(root, target, ["encoder"], force=True)
    assert (target / "encoder.py").read_text() == FILES["src/qwen4b_asr/encoder.py"]


def test_local_changes_are_not_overwritten(root, target):
    vendor.vendor(root, target, ["encoder"])
    (target / "encoder.py").write_text("patched here")
    (root / "src/qwen4b_asr/errors.py").write_text("class E2(Exception): ...\n")
    with pytest.raises(vendor.VendorError, match=r"without --force: encoder\.py$"):
        vendor.vendor(root, target)
    # All or nothing: the other file is not refreshed either.
    assert (target / "errors.py").read_text() == FILES["src/qwen4b_asr/errors.py"]
    vendor.vendor(root, target, force=True)
    assert vendor.check(root, target) == []


def test_the_change_that_upstream_made_too_is_not_in_the_way(root, target):
    vendor.vendor(root, target, ["decoder"])
    same_edit_on_both_sides(root, target)
    vendor.vendor(root, target)
    assert vendor.check(root, target) == []


def test_byte_code_is_no_drift(root, target):
    vendor.vendor(root, target, ["cache"])
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "cache.cpython-311.pyc").write_bytes(b"x")
    assert vendor.check(root, target) == []
    vendor.vendor(root, target)


def test_a_file_that_upstream_dropped_goes_unless_it_was_changed(root, target):
    vendor.vendor(root, target, ["encoder"])
    (root / "src/qwen4b_asr/encoder.py").write_text("import mlx.core\n")
    (target / "kernels/fsmn.py").write_text("patched here")
    with pytest.raises(vendor.VendorError, match=r"kernels/fsmn\.py"):
        vendor.vendor(root, target)
    (target / "kernels/fsmn.py").write_text(FILES["src/qwen4b_asr/kernels/fsmn.py"])
    vendor.vendor(root, target)
    assert listing(target) == COMMON | {"encoder.py"}


def edit_here(root, target):
    (target / "cache.py").write_text("here")


def edit_upstream(root, target):
    (root / "src/qwen4b_asr/cache.py").write_text("upstream")


def edit_both(root, target):
    edit_here(root, target)
    edit_upstream(root, target)


def same_edit_on_both_sides(root, target):
    (target / "cache.py").write_text("# same")
    (root / "src/qwen4b_asr/cache.py").write_text("# same")


def drop_upstream(root, target):
    (root / "src/qwen4b_asr/cache.py").write_text("from .kernels import fsmn\n")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda root, target: None, []),
        (edit_here, ["changed here: cache.py"]),
        (edit_upstream, ["changed upstream: cache.py", "gone upstream: errors.py"]),
        (edit_both, ["changed here and upstream: cache.py", "gone upstream: errors.py"]),
        (same_edit_on_both_sides, ["gone upstream: errors.py"]),
        (lambda root, target: (target / "errors.py").unlink(), ["missing: errors.py"]),
        (lambda root, target: (target / "notes.txt").write_text("x"), ["extra: notes.txt"]),
        (
            drop_upstream,
            ["changed upstream: cache.py", "gone upstream: errors.py"]
            + [f"new upstream: kernels/{n}" for n in ("__init__.py", "_loader.py", "fsmn.py")]
            + [f"new upstream: kernels/metal/{n}" for n in ("common.h", "fsmn.metal", "other.metal")],
        ),
    ],
)
def test_drift_is_reported(root, target, change, lines):
    vendor.vendor(root, target, ["decoder"])
    change(root, target)
    assert vendor.check(root, target) == lines


def test_a_copy_that_is_none_and_a_damaged_note_are_refused(root, target):
    with pytest.raises(vendor.VendorError, match="not a copy"):
        vendor.check(root, target)
    vendor.vendor(root, target, ["cache"])
    note = target / "VENDORED.json"
    good = json.loads(note.read_text())
    for text, said in [
        ("{", "damaged"),
        (json.dumps({**good, "schema": 99}), "schema 99"),
        (json.dumps({**good, "files": {"../x": {"sha256": ""}}}), "outside the copy"),
        (json.dumps({**good, "files": ["x"]}), "damaged"),
    ]:
        note.write_text(text)
        with pytest.raises(vendor.VendorError, match=said):
            vendor.check(root, target)


def test_the_command_line_and_its_exit_status(root, target):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/vendor.py"), "--source", str(root), "--to", str(target), *words]
        return subprocess.run(command, capture_output=True, text=True)

    first = run("cache")
    assert (first.returncode, first.stderr) == (0, "")
    assert "copied 5 files for cache" in first.stdout
    assert run("--check").stdout == "no drift\n"
    edit_here(root, target)
    drifted = run("--check")
    assert (drifted.returncode, drifted.stdout) == (1, "changed here: cache.py\n")
    refused = run()
    assert refused.returncode == 2
    assert "changed by hand" in refused.stderr
    assert run("--force").returncode == 0
    assert run("--check").returncode == 0
    assert run("nonsense").returncode == 2


def test_relative_imports_resolve_as_python_resolves_them(root):
    source = Source.scan(root / "src/qwen4b_asr")
    assert [i.target for i in source.imports("weights.keymap")] == ["errors", "weights.paths"]
    assert [i.target for i in source.imports("weights.load")] == ["weights", "weights.keymap"]
    assert [(i.target, i.typing_only) for i in source.imports("decoder")] == [
        ("mlx.core", False),
        ("typing", False),
        ("numpy", True),
        ("os", False),
        ("cache", False),
        ("a_b", False),
    ]
