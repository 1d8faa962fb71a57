"""Compiles the engine and kernels with the C++ compiler at hand; keeps what it built in a cache folder.

Everything is built under a name that is a hash of all that went into it, written beside and moved into place: any
number of processes may share the folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from .errors import CompileError
from .translate import Translation

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
MLX_KERNELS = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
"""MLX's own Metal headers, which its wheels carry."""
MLX_HEADERS = ("bf16.h", "bf16_math.h", "complex.h", "defines.h", "utils.h")
"""What MLX puts before every kernel, in order: utils.h and what it includes, less logging.h, which nobody uses here."""

# Undefined behaviour that the compiler can watch for; include/metal_host/checks.h turns it into errors.
_CHECKS = (
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift-exponent,null,return,unreachable",
    "-fno-sanitize-recover=all",
)
_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fsigned-char",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
)
# Unknown attributes and pragmas are Metal's or Apple's. Local variables start out as a pattern that no kernel expects.
_KERNEL_FLAGS = (
    *_FLAGS,
    "-O2",
    "-g1",
    *_CHECKS,
    "-ftrivial-auto-var-init=pattern",
    "-Wno-attributes",
    "-Wno-unknown-attributes",
    "-Wno-unknown-pragmas",
)


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler: $METAL_HOST_CXX, $CXX, or the first found of c++, g++ and clang++."""
    for name in (os.environ.get("METAL_HOST_CXX"), os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def unavailable() -> str | None:
    """Return why kernels cannot be run on this host, or None where they can."""
    if sys.platform not in ("linux", "darwin"):
        return f"the host runner is made for Linux and macOS, not {sys.platform}"
    if compiler() is None:
        return "the host runner needs a C++20 compiler (g++ 11, clang 14 or newer)"
    if missing := [name for name in MLX_HEADERS if not (MLX_KERNELS / name).is_file()]:
        return f"the host runner needs MLX's Metal headers; this MLX comes without {', '.join(missing)}"
    return None


def cache_folder() -> Path:
    """Return the folder of what was built: $METAL_HOST_CACHE, or one of this user's in the temporary folder."""
    if named := os.environ.get("METAL_HOST_CACHE"):
        folder = Path(named)
    else:
        folder = Path(tempfile.gettempdir()) / f"metal_host-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CompileError(f"{folder} should be this user's own folder but belongs to somebody else")
    return folder


@functools.cache
def _compiler_version() -> str:
    run = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True)
    return run.stdout


def _machine_flags() -> tuple[str, ...]:
    return ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()


def extra_flags() -> tuple[str, ...]:
    """Return macros for testing the portable parts on any machine: $METAL_HOST_FLAGS, split at spaces."""
    return tuple(os.environ.get("METAL_HOST_FLAGS", "").split())


@functools.cache
def _tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(*parts: object) -> str:
    text = "\0".join([_compiler_version(), platform.node(), *map(repr, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _compile(command: list[str], product: Path, label: str) -> None:
    """Run the compiler; its output appears under the product's name only when complete."""
    with tempfile.TemporaryDirectory(dir=product.parent) as folder:
        unfinished = Path(folder) / product.name
        run = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if run.returncode:
            raise CompileError(f"[{label}] does not compile:\n{_essence(run.stderr)}")
        unfinished.replace(product)


def _essence(messages: str) -> str:
    """The errors of a compiler's output, each with the lines that show it."""
    lines = [line for line in messages.splitlines() if "unrecognized command-line option" not in line]
    kept: list[str] = []
    for number, line in enumerate(lines):
        if re.search(r"\b(?:fatal )?error: ", line):
            kept += lines[number : number + 3]
    return "\n".join(kept[:40] or lines[:40])


def engine() -> Path:
    """Return the engine's library, built when needed.

    Raises:
        CompileError: If it does not compile.
    """
    flags = (*_FLAGS, "-O2", "-U_FORTIFY_SOURCE", "-fno-exceptions", "-shared", *extra_flags())
    key = _key("engine", _tree_hash(HERE / "engine"), _tree_hash(INCLUDE), compiler(), flags)
    library = cache_folder() / f"engine-{key}.so"
    if not library.exists():
        sources = [str(path) for path in sorted((HERE / "engine").glob("*.cpp"))]
        _compile([str(compiler()), *flags, "-fvisibility=default", *sources], library, "engine")
    return library


def mlx_prelude() -> str:
    """Return what MLX puts before every kernel: its headers with their includes of one another resolved.

    complex.h is replaced: it overloads constructors on address spaces alone, which no C++ can tell apart.
    """
    pieces = ["#include <metal_stdlib>\n"]
    for name in MLX_HEADERS:
        path = INCLUDE / "metal_host" / "mlx_complex.h" if name == "complex.h" else MLX_KERNELS / name
        text = re.sub(r'^\s*#(?:include "[^"]*"|pragma once).*$', "", path.read_text(encoding="utf-8"), flags=re.M)
        pieces.append(f'#line 1 "{name}"\n{text}\n')
    return "".join(pieces)


def _prelude(flags: tuple[str, ...]) -> Path:
    """Return the prelude as a header with its precompiled form beside it: a kernel then compiles in a fraction."""
    text = mlx_prelude()
    key = _key("prelude", text, _tree_hash(INCLUDE), compiler(), flags)
    header = cache_folder() / f"prelude-{key}.h"
    precompiled = header.with_name(header.name + ".gch")
    if not precompiled.exists():
        header.write_text(text, encoding="utf-8")
        command = [str(compiler()), *flags, f"-I{INCLUDE}", "-x", "c++-header", str(header)]
        _compile(command, precompiled, "MLX's Metal headers")
    return header


def kernel_library(translation: Translation, label: str) -> Path:
    """Return the library of a translated kernel, built when needed.

    Raises:
        CompileError: If it does not compile; quotes the compiler, with line numbers of the generated Metal text.
    """
    flags = (*_KERNEL_FLAGS, *_machine_flags(), *extra_flags())
    header = _prelude(flags)
    key = _key("kernel", translation.text, header.name, compiler(), flags)
    library = cache_folder() / f"kernel-{key}.so"
    if not library.exists():
        source = cache_folder() / f"kernel-{key}.cpp"
        source.write_text(translation.text, encoding="utf-8")
        unlinked = library.with_suffix(".o")
        _compile([str(compiler()), *flags, "-include", str(header), f"-I{INCLUDE}", "-c", str(source)], unlinked, label)
        # Linked without the flags of the checks: they would ask for the sanitizer's library.
        _compile([str(compiler()), "-shared", str(unlinked)], library, label)
    return library
