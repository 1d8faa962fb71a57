"""Run the CUDA text of a kernel on the CPU: slowly, but right or wrong as on a GPU.

`HostCuda()` is a factory for `kernels._loader.override("cuda", ...)`; what it stands on is in cuda_host.h.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.helpers.cuda_text import Text, mlx_text, whole_text

NEEDS = "g++ (12 or newer, for its half-precision type), on Linux"
POISON = 0xFF


def available() -> bool:
    """Whether texts can be run here."""
    return _compiles("_Float16 x = 1.0f; static_assert(sizeof(x) == 2); int main() {}")


@functools.lru_cache
def _compiles(program: str) -> bool:
    compiler = shutil.which("g++")
    command = [compiler or "", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    return bool(compiler) and subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0


class HostCuda:
    """Stands for `mx.fast.cuda_kernel`; outputs hold bytes of 0xFF before the kernel writes them."""

    def __call__(self, *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str,
                 header: str = "", ensure_row_contiguous: bool = True, shared_memory: int = 0) -> Any:  # fmt: skip
        """Build a callable kernel."""

        def launch(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: Sequence[int],
            threadgroup: Sequence[int],
            template: Iterable[tuple[str, Any]] = (),
            init_value: float | None = None,
        ) -> list[mx.array]:
            text = mlx_text(name, header, source, input_names, inputs, output_names, output_dtypes, list(template))
            entry = _entry(text)
            arrays = dict(zip(input_names, (_to_numpy(array) for array in inputs), strict=True))
            shapes = zip(output_names, output_shapes, output_dtypes, strict=True)
            outputs = {n: np.full((*shape, dtype.size), POISON, np.uint8) for n, shape, dtype in shapes}
            buffers = [_buffer(parameter, arrays | outputs) for parameter in text.parameters]
            pointers = (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers))
            entry(pointers, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*threadgroup))
            return [_to_mlx(outputs[n], dtype) for n, dtype in zip(output_names, output_dtypes, strict=True)]

        return launch


def _buffer(parameter: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The memory behind a parameter: an array's, or its shape or (row-contiguous) strides in ten places."""
    name = re.findall(r"\w+", parameter)[-1]
    if name in arrays:
        return arrays[name]
    array = arrays[name.rpartition("_")[0]]
    numbers = np.zeros(10, np.int64 if name.endswith("_strides") else np.int32)
    strides = [stride // max(array.itemsize, 1) for stride in array.strides]
    numbers[: array.ndim] = strides if name.endswith("_strides") else array.shape
    return numbers


def texts_run() -> int:
    """How many texts have been compiled to be run in this process."""
    return _entry.cache_info().currsize


@functools.cache
def _entry(text: Text) -> Any:
    """Compile a text and return ``entry(buffers, grid, threadgroup)``."""
    arguments = []
    for place, parameter in enumerate(text.parameters):
        kind = re.sub(r"\w+$", "", parameter.replace("__grid_constant__ ", "")).strip()
        star = "" if kind.endswith("*") else "*"
        arguments.append(f"{star}({kind}{star})buffers[{place}]")
    call = f"mlx::core::cu::{text.name}({', '.join(arguments)})"
    entry = (
        "static void* const* buffers;\nnamespace mlx::core::cu { static void call() { "
        f"{call}; }} }}\n"
        'extern "C" void entry(void* const* given, const unsigned* grid, const unsigned* threadgroup) {\n'
        "  buffers = given;\n  host::run(grid, threadgroup, mlx::core::cu::call);\n}\n"
    )
    here = Path(__file__).resolve().parent
    foundation = '#include "cuda_host.h"\n'
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernel.so")
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{here}", "-x", "c++", "-", "-o", library]
        source = whole_text([text], foundation) + entry
        run = subprocess.run(command, input=source, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"g++ does not take the text of {text.name}:\n{run.stderr[:4000]}")
        function = ctypes.CDLL(str(library)).entry
    function.restype = None
    return function


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)).reshape(
        array.shape
    )


def _to_mlx(raw: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """An array of the bytes that lie along the last axis."""
    if dtype == mx.bfloat16:
        return mx.array(raw.view(np.uint16)[..., 0]).view(mx.bfloat16)
    kind = np.dtype(str(dtype).removeprefix("mlx.core.").rstrip("_"))
    return mx.array(raw.view(kind)[..., 0])
