"""The folder of Metal sources, and what a source is made of."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

HEADER_MARK = "// --- header"
BODY_MARK = "// --- body"

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([\w./-]+)"[^\n]*$', re.MULTILINE)


def kernel_sources() -> Path:
    """Return the folder of Metal sources.

    An installed package carries it as ``metal`` beside this file; a checkout keeps it at the top level as ``kernels``.
    The module's own copy comes first, so an old installation is never read by a newer checkout.

    Raises:
        FileNotFoundError: If neither folder is there, that is, the installation is damaged.
    """
    here = Path(__file__).resolve().parent
    candidates = [here / "metal"]
    if len(here.parents) > 2:
        candidates.append(here.parents[2] / "kernels")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"[kernel_sources] the Metal sources must be in one of {[str(c) for c in candidates]}")


def read_source(name: str) -> str:
    """Read one file of the folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not plain ASCII, which Metal's compiler needs even in comments.
    """
    text = (kernel_sources() / name).read_text(encoding="utf-8")
    if not text.isascii():
        strange = sorted({character for character in text if not character.isascii()})
        raise ValueError(f"[{name}] must be plain ASCII, comments too, but got {' '.join(strange)}")
    return text


def split_source(text: str, name: str) -> tuple[str, str]:
    """Take a source apart.

    Args:
        text: The source.
        name: Its file name, for the message.

    Returns:
        Helper code, with the folder's own files in place of ``#include "..."``, and the kernel's body.

    Raises:
        ValueError: If there is not exactly one body, or code that is in neither part.
    """
    head, _, body = text.partition(f"{BODY_MARK}\n")
    marks = [line for line in text.splitlines() if line.rstrip() == BODY_MARK]
    if len(marks) != 1 or not body.strip():
        raise ValueError(f"[{name}] must have one line `{BODY_MARK}` and code after it but got {len(marks)}")
    contract, _, header = head.partition(f"{HEADER_MARK}\n")
    if stray := [line for line in contract.splitlines() if line.strip() and not line.startswith("//")]:
        raise ValueError(f"[{name}] helper code must be behind `{HEADER_MARK}` but got {stray[0]!r} before it")
    return _with_includes(header, {name}), body


def digest(*texts: str) -> str:
    """Return one hash of some texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _with_includes(text: str, seen: set[str]) -> str:
    """Put in each included file once; MLX hands the compiler a text, which has no folder to look in."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        return _with_includes(read_source(name), seen)

    return _INCLUDE.sub(replace, text)
