"""The Metal text that MLX generates for a kernel, obtained without a GPU.

`mx.fast.metal_kernel` builds the whole text before it asks for a GPU, and prints it when called with ``verbose=True``.
Exporting a function that calls the kernel traces the call without evaluating it, so nothing needs Metal. MLX prints
through C++'s standard output, so the file descriptor itself is redirected for that moment.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

_LOCK = threading.Lock()  # there is one standard output
_GENERATED = re.compile(r"Generated source code for `[^`]*`:\n```\n(.*)```", re.S)
SMALL = 8  # inputs with fewer elements are passed in Metal's `constant` address space


def text_form(inputs: Sequence[mx.array]) -> tuple[Any, ...]:
    """Return all that the generated text depends on of the inputs, besides their names."""
    return tuple((x.dtype, x.size < SMALL, x.ndim == 0) for x in inputs)


def capture(kernel: Any, inputs: Sequence[mx.array], **launch: Any) -> str:
    """Return the text that MLX would hand to the Metal compiler, less its own headers.

    Args:
        kernel: What `mx.fast.metal_kernel` returned.
        inputs: As for the kernel; only shapes and dtypes matter, values are not read.
        launch: The other arguments of the kernel's call.

    Raises:
        ValueError: Whatever MLX finds wrong with the call.
        RuntimeError: If MLX printed nothing that looks like a kernel (a version that does it differently).
    """
    stand_ins = [mx.zeros(x.shape, dtype=x.dtype) for x in inputs]

    def call(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), verbose=True, **launch)

    with _LOCK, ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        printed = stack.enter_context(tempfile.TemporaryFile())
        sys.stdout.flush()
        libc = ctypes.CDLL(None)
        libc.fflush(None)
        standard_output = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(os.path.join(folder, "call.mlxfn"), call, *stand_ins)
        finally:
            libc.fflush(None)
            os.dup2(standard_output, 1)
            os.close(standard_output)
        printed.seek(0)
        text = printed.read().decode()
    if not (found := _GENERATED.search(text)):
        raise RuntimeError(f"[capture] MLX should print the kernel it generated but printed {text[:200]!r}")
    return found.group(1)


class Recorder:
    """A factory for `kernels._loader.override("metal", ...)` that runs nothing: results are zeros.

    Attributes:
        texts: The Metal text of every launch so far, in order, each once.
    """

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}

    def __call__(self, **parameters: Any) -> Any:
        """Stand for `mx.fast.metal_kernel`."""
        kernel = mx.fast.metal_kernel(**parameters)

        def launch(*, inputs: Sequence[mx.array], **call: Any) -> list[mx.array]:
            self.texts[capture(kernel, inputs, **call)] = None
            shapes = zip(call["output_shapes"], call["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return launch
