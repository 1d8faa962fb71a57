"""Who may import whom: what makes a file liftable, and the start quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen4b_asr
from package_imports import Source

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "qwen4b_asr"
INSTALLED = Path(qwen4b_asr.__file__).parent

BANNED = {"torch", "torchaudio", "transformers", "mlx_lm", "mlx_audio", "funasr", "funasr_mlx", "librosa", "peft"}
# Where the originals run: in environments of their own, never in this one.
TORCH_ROOMS = ("tools/golden/", "tools/bench/peer_worker_")

# From the ground up: a module may import from rows above its own and, but for the stages, from its own row.
# A name stands for a module or for a package with all that is in it; the longest match counts.
ROOMS = [
    ("ground", ["errors", "version", "_blas", "kernels"]),
    (
        "helpers",
        [
            "cache",
            "sampling",
            "tokenizer",
            "segment",
            "ctc",
            "pieces",
            "byte_pieces",
            "rich",
            "joined",
            "prefix",
            "cpu.columns",
            "cpu.codes",
            "cpu.products",
            "cpu.arithmetic",
            "cpu.heap",
            "lora",
            "quantization",
            "machine",
            "batch_cache",
            "batch_sampling",
        ],
    ),
    (
        "stages",
        [
            "audio",
            "features",
            "encoder",
            "adaptor",
            "prompt",
            "fastconformer",
            "mel",
            "projection",
            "decoder",
            "text",
            "nano_adaptor",
            "nano_prompt",
        ],
    ),
    ("stages on NumPy", ["cpu"]),
    ("readers", ["config", "weights"]),
    (
        "composers",
        [
            "model",
            "generate",
            "batch_generate",
            "batch_audio",
            "transcript",
            "rich_decoding",
            "listen",
            "prompt_rows",
            "written",
            "draft",
            "pass_costs",
            "speculate",
        ],
    ),
    (
        "checkpoints",
        [
            f"weights.{name}"
            for name in (
                "directory",
                "load",
                "parts",
                "conversion",
                "families",
                "recipes",
                "quantize",
                "fidelity",
                "convert",
                "verify",
                "obtain",
                "expected",
            )
        ],
    ),
    ("planners", ["memory"]),
    ("pipeline", ["prepare", "recognise", "batch", "transcribe", "loading"]),
    ("training", ["training"]),
    ("doors", ["cli", "server", "__main__"]),
]
FRONT_DOOR = ""  # the package's own __init__ hands names on lazily, from anywhere


def room(module: str) -> int | None:
    """Row of `module` in `ROOMS`; None for a module that has no room."""
    matches = [
        (len(name), row)
        for row, (_, names) in enumerate(ROOMS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    return max(matches)[1] if matches else None


def layering_violations(source: Source) -> list[str]:
    """Imports that point upwards, from one stage to another, or from and to modules without a room."""
    violations = []
    for module in source.modules:
        own = room(module)
        if own is None and module != FRONT_DOOR:
            violations.append(f"{module} has no room: add it to ROOMS")
        for found in source.imports(module):
            if not found.relative or module == FRONT_DOOR or own is None:
                continue
            other = room(found.target)
            if found.target == FRONT_DOOR:
                violations.append(f"{module}:{found.line} imports from the package's own __init__")
            elif other is None or other > own:
                violations.append(f"{module}:{found.line} imports {found.target}, which is above it")
            elif other == own and ROOMS[own][0] == "stages" and found.target != module:
                violations.append(f"{module}:{found.line} imports {found.target}, another stage")
    return violations


def banned_imports(path: Path, banned: set[str]) -> list[str]:
    """Imports of `banned` packages anywhere in the file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found += [f"{path.name}:{node.lineno} {name}" for name in names if name.partition(".")[0] in banned]
    return found


def names_own_package(source: Source) -> list[str]:
    """Absolute imports of the package by itself, and hidden ones through import_module."""
    found = [
        f"{module}:{imported.line} imports {imported.target}"
        for module in source.modules
        for imported in source.imports(module)
        if not imported.relative and imported.target.partition(".")[0] == PACKAGE
    ]
    for module, path in source.modules.items():
        for node in ast.walk(ast.parse(path.read_bytes())):
            # Reading imports from the text must find all there are, or a copy would lack a file.
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                found.append(f"{module}:{node.lineno} imports by a string")
    return found


def plant(folder: Path, **files: str) -> Source:
    """A package in `folder`; ``__`` in a name stands for a folder separator, as in ``weights__load``."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / f"{name if name.startswith('__') else name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Source.scan(folder)


SOURCE = Source.scan(ROOT / "src" / PACKAGE)


def test_imports_point_one_way():
    assert layering_violations(SOURCE) == []


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("encoder", "def f():\n    from . import model", "above it"),
        ("decoder", "from .encoder import Encoder", "another stage"),
        ("weights__keymap", "from .load import load_model", "above it"),
        ("weights__keymap", "from ..transcribe import load", "above it"),
        ("errors", "from . import __version__", "own __init__"),
        ("cache", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .decoder import Qwen3", "above it"),
        ("gadget", "", "no room"),
    ],
)
def test_a_planted_upward_import_is_seen(tmp_path, module, text, said):
    others = {"encoder": "", "model": "", "weights__load": "", "transcribe": "", "decoder": ""}
    violations = layering_violations(plant(tmp_path, **{**others, module: text}))
    assert len(violations) == 1, violations
    assert said in violations[0]


def test_downward_imports_are_allowed(tmp_path):
    planted = plant(
        tmp_path,
        errors="",
        cache="from .errors import X",
        decoder="from . import cache\nfrom .errors import X",
        weights__keymap="from ..errors import X\nfrom . import manifest",
        weights__manifest="",
        weights__load="from ..model import M\nfrom .keymap import K",
        model="from .decoder import Qwen3",
        cli__main="from ..weights import load",
    )
    assert layering_violations(planted) == []


def test_nothing_at_run_time_imports_the_reference_implementations():
    assert [hit for path in SOURCE.modules.values() for hit in banned_imports(path, BANNED)] == []


def test_only_the_golden_tools_and_the_peers_import_torch():
    outside = [
        path
        for folder in ("tools", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if not path.relative_to(ROOT).as_posix().startswith(TORCH_ROOMS)
    ]
    assert outside
    assert [hit for path in outside for hit in banned_imports(path, BANNED)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch",
        "import os, torch.nn as nn",
        "from transformers import AutoModel",
        "def f():\n    import mlx_lm.utils",
        "try:\n    import librosa\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('funasr.models')",
    ],
)
def test_a_planted_banned_import_is_seen(tmp_path, text):
    path = tmp_path / "a.py"
    path.write_text(text, encoding="utf-8")
    assert len(banned_imports(path, BANNED)) == 1


def test_similar_names_are_not_banned(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("from .torch_zip import read\nimport torchless\nname = 'torch'", encoding="utf-8")
    assert banned_imports(path, BANNED) == []


def test_the_package_never_names_itself():
    assert names_own_package(SOURCE) == []


@pytest.mark.parametrize(
    "text",
    [
        f"import {PACKAGE}.errors",
        f"def f():\n    from {PACKAGE} import errors",
        "from importlib import import_module\nimport_module('.errors', __package__)",
    ],
)
def test_a_planted_own_name_is_seen(tmp_path, text):
    assert len(names_own_package(plant(tmp_path, a=text, errors=""))) == 1


# --- Import time --------------------------------------------------------------------------------------------------

HEAVY = ["mlx", "numpy", "soundfile", "soxr", "tokenizers", "safetensors", "huggingface_hub", "tqdm"]
LOADED = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
importlib.import_module(sys.argv[2])
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[3].split(","))))
"""


def loaded_by(module: str, folder: Path) -> list[str]:
    """Which of `HEAVY` a fresh interpreter has loaded after importing `module` from `folder`."""
    command = [sys.executable, "-I", "-c", LOADED, str(folder), module, ",".join(HEAVY)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli.main", f"{PACKAGE}.errors"])
def test_the_front_doors_load_nothing_heavy(module):
    assert loaded_by(module, INSTALLED.parent) == []


def test_a_planted_heavy_import_is_seen(tmp_path):
    plant(tmp_path / "eager", a="import numpy")
    assert loaded_by("eager.a", tmp_path) == ["numpy"]


# Types and their scalars; everything else of a third party is work and waits for its first use.
CHEAP_CALLS = {"numpy.dtype", "numpy.float32"}
STATEMENTS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef, ast.If, ast.Try)


def import_time_work(path: Path) -> list[str]:
    """Loops, calls for their effect, and calls into third parties or files, at the top of a module."""
    tree = ast.parse(path.read_bytes())
    aliases = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            aliases |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                        for a in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, STATEMENTS):
            found.append(f"{path.name}:{node.lineno} {type(node).__name__} at the top of a module")
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for call in ast.walk(node.value):
            if isinstance(call, ast.Call):
                head, _, rest = ast.unparse(call.func).partition(".")
                name = f"{aliases.get(head, head)}.{rest}".strip(".")
                outside = head in aliases and name.partition(".")[0] not in sys.stdlib_module_names
                if (outside and name not in CHEAP_CALLS) or name == "open" or name.endswith((".read_text", ".open")):
                    found.append(f"{path.name}:{call.lineno} calls {name}")
    return found


def test_modules_do_no_work_when_imported():
    main_modules = [path for path in SOURCE.modules.values() if path.name != "__main__.py"]
    assert [hit for path in main_modules for hit in import_time_work(path)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import mlx.core as mx\nTABLE = mx.arange(4)",
        "import numpy as np\nWINDOW = {'a': np.hamming(400)}",
        "from numpy import hamming as h\nWINDOW: object = h(400)",
        "import json\nDATA = json.loads(open('a').read())",
        "print('hello')",
        "for x in (1, 2):\n    y = x",
    ],
)
def test_planted_work_is_seen(tmp_path, text):
    path = tmp_path / "a.py"
    path.write_text(text, encoding="utf-8")
    assert len(import_time_work(path)) == 1


def test_constants_are_no_work(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "'''Doc.'''\nimport re\nimport numpy as np\nA = re.compile('a')\nB = np.dtype('f4')\nC = {'x': np.float32}\n"
        "D = frozenset({1})\ndef f():\n    return np.hamming(3)\n",
        encoding="utf-8",
    )
    assert import_time_work(path) == []
