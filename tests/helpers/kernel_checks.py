"""Which checks of the kernels' texts took place in this process: one that did not must not go unnoticed."""

from __future__ import annotations

from . import cuda_host, cuda_text, metal_host
from .metal_host.build import compiler
from .metal_host.lint import LINTED, clang
from .metal_host.runner import BUILT


def report() -> list[str]:
    """Return a line for each check: how many texts it saw and by which tool, or why it saw none."""
    cuda = f"needs {cuda_text.NEEDS}" if cuda_text.compiler() is None else None
    cuda_run = None if cuda_host.available() else f"needs {cuda_host.NEEDS}"
    return [
        _line("Metal, run on the CPU", len(BUILT), compiler(), metal_host.unavailable()),
        _line("Metal, linted", len(LINTED), clang(), metal_host.lint_unavailable()),
        _line("CUDA, compiled", len(cuda_text.COMPILED), cuda_text.compiler(), cuda),
        _line("CUDA, run on the CPU", cuda_host.texts_run(), "g++", cuda_run),
    ]


def _line(check: str, texts: int, tool: str | None, lack: str | None) -> str:
    if texts:
        return f"kernels · {check}: {texts} {'text' if texts == 1 else 'texts'}, by {tool}"
    return f"kernels · {check}: none ({lack or 'no such test was chosen'})"
