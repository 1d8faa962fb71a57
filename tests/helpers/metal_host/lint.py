"""Second check: address spaces and types, with clang as the reader.

A CPU has one address space, so the host runner cannot see a kernel mix up ``device``, ``constant``, ``threadgroup`` and
``thread`` pointers, which Metal refuses to compile. Clang can: given distinct ``address_space`` attributes and
declarations of Metal's vocabulary, it checks the text that MLX generates, without compiling it to anything.

Wants clang 14 or newer. It is told to parse for arm64, where half is a built-in type in every one of these versions;
no headers, libraries or back end of that machine are needed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from .translate import TranslationError, declarations, half_literals, split_top_level, without_comments

OLDEST_CLANG = 14
_INCLUDE = Path(__file__).parent / "lint_include"
_FLAGS = (
    "-fsyntax-only",
    "-x",
    "c++",
    "-std=c++17",
    "--target=aarch64-linux-gnu",
    "-ffreestanding",
    "-nostdinc",
    "-nostdinc++",
    "-fsigned-char",
    "-Xclang",
    "-fallow-half-arguments-and-returns",
    "-ferror-limit=20",
    "-fno-caret-diagnostics",
    # What is surely a mistake, besides errors.
    "-Wall",
    "-Wextra",
    "-Wvla",
    "-Werror",
    # Metal's own attributes and pragmas, and what generated texts cannot help.
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-pass-failed",
    "-Wno-unused",
    "-Wno-unused-parameter",
    "-Wno-duplicate-decl-specifier",
    "-Wno-sign-compare",
    "-Wno-undefined-inline",
    "-Wno-undefined-internal",
    "-Wno-undefined-var-template",
)
_DIAGNOSIS = re.compile(r"^([^:\n]+):(\d+):(?:\d+:)? (?:fatal )?error: (.*)$", re.M)
_VECTOR_CALL = re.compile(
    r"\b(?:(?:char|uchar|short|ushort|int|uint|long|ulong|half|float|bfloat)[234]|vec\s*<[^<>()]*>)\s*(?=\()"
)
LINTED: set[str] = set()
"""The texts that clang has read in this process."""

_INSTANTIATION = re.compile(r"\btemplate \[\[host_name\([^)]*\)\]\] \[\[kernel\]\]")


@functools.cache
def clang() -> str | None:
    """Return the newest clang at hand ($METAL_HOST_CLANG first) that is new enough."""
    named = os.environ.get("METAL_HOST_CLANG")
    candidates = [named] if named else ["clang", *(f"clang-{version}" for version in range(30, OLDEST_CLANG - 1, -1))]
    for name in candidates:
        if (path := shutil.which(name)) and clang_version(path) >= OLDEST_CLANG:
            return path
    return None


def clang_version(path: str) -> int:
    """Return a clang's major version by what it predefines: 0 where it is none, or does not run."""
    run = subprocess.run([path, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True)
    if "__apple_build_version__" in run.stdout:
        return OLDEST_CLANG  # numbered after Xcode; every one that runs Metal is new enough
    match = re.search(r"__clang_major__ (\d+)", run.stdout)
    return int(match.group(1)) if match else 0


def unavailable() -> str | None:
    """Return why texts cannot be linted here, or None where they can."""
    return None if clang() else f"the lint needs clang {OLDEST_CLANG} or newer"


def _make_vectors(text: str) -> str:
    """Spell ``float4(a, b)`` as a call: clang has no other way to put a vector together from shorter ones."""
    for call in reversed(list(_VECTOR_CALL.finditer(text))):
        depth, end = 1, call.end() + 1
        while depth and end < len(text):
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        inside = text[call.end() + 1 : end - 1]
        if len(split_top_level(inside)) > 1:
            text = f"{text[: call.start()]}make_vector<{call.group().strip()}>({inside}){text[end:]}"
    return text


def prepare(text: str) -> str:
    """Turn a Metal text, as MLX generates it, into what clang reads as C++.

    Raises:
        TranslationError: If a threadgroup variable has an initialiser.
    """
    bare = without_comments(text)
    pieces, position = [], 0
    for start, _, _, _ in declarations(bare):
        # A local variable cannot live in another address space; a static one can.
        keyword = "" if re.search(r"\bstatic\s+(?:const\s+)?$", bare[:start]) else "static "
        pieces += [bare[position:start], keyword]
        position = start
    bare = "".join([*pieces, bare[position:]])
    bare = _INSTANTIATION.sub("template", _make_vectors(half_literals(bare)))
    bare = re.sub(r"^\s*#include\s*<metal_\w+>", "", bare, flags=re.M)
    return f'#include "metal_lint.h"\n#line 1 "kernel"\n{bare}'


def lint(text: str) -> list[str]:
    """Find what Metal's compiler would refuse and the host runner cannot see.

    Args:
        text: Metal text, as MLX generates it (`capture`).

    Returns:
        One sentence each, with the line in the text; empty if all is well.

    Raises:
        RuntimeError: If there is no clang (ask `unavailable` first).
    """
    if reason := unavailable():
        raise RuntimeError(f"[lint] {reason}")
    found = [
        f"line {number}: Metal texts are ASCII, comments too, but this line has {letter!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for letter in sorted({letter for letter in line if ord(letter) > 127})
    ]
    try:
        prepared = prepare(text)
    except TranslationError as error:
        return [*found, str(error)]
    LINTED.add(text)
    command = [str(clang()), *_FLAGS, f"-I{_INCLUDE}", "-"]
    run = subprocess.run(command, input=prepared, capture_output=True, text=True)
    messages = [
        f"line {line}: {message}" if file == "kernel" else f"{Path(file).name}, line {line}: {message}"
        for file, line, message in _DIAGNOSIS.findall(run.stderr)
    ]
    if run.returncode and not messages:
        messages = [f"clang failed without saying where: {run.stderr[:500]}"]
    return [*found, *dict.fromkeys(messages)]
