"""The CUDA text that MLX makes of a kernel, and a compiler for it that needs no GPU.

`Recorder` takes the place of `mx.fast.cuda_kernel`: it builds the text of each launch as MLX does (described in
`kernels/_cuda.py` of the package) and gives back zeros. `compile_texts` hands texts to NVRTC, as MLX would, or to nvcc.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

COMPILED: set[Text] = set()
"""The launches that a CUDA compiler has read in this process."""

NEEDS = "a CUDA toolkit: nvcc, or libnvrtc with the toolkit's headers"

TYPES = {
    **{"bool": "bool", "uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t", "uint64": "uint64_t"},
    **{"int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t"},
    **{"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"},
}

# What MLX's own utils.cuh brings along, as far as kernels can see it.
FOUNDATION = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cooperative_groups.h>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
#define inf cuda::std::numeric_limits<float>::infinity()
"""


@dataclass(frozen=True)
class Text:
    """One launch's text.

    Attributes:
        name: Name of the function.
        header: What stands before the namespace.
        function: The function itself.
        parameters: Its parameters, ``type name`` each.
    """

    name: str
    header: str
    function: str
    parameters: tuple[str, ...]


def type_name(dtype: mx.Dtype) -> str:
    """What MLX calls an element type in CUDA."""
    return TYPES[str(dtype).removeprefix("mlx.core.")]


class Recorder:
    """A factory for `kernels._loader.override("cuda", ...)`.

    Attributes:
        texts: The text of every launch so far, each once.
    """

    def __init__(self) -> None:
        self.texts: dict[str, Text] = {}

    def __call__(self, *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str,
                 header: str = "", ensure_row_contiguous: bool = True, shared_memory: int = 0) -> Any:  # fmt: skip
        """Stand for `mx.fast.cuda_kernel`."""

        def launch(*, inputs: Sequence[mx.array], output_shapes: Sequence[Any], output_dtypes: Sequence[mx.Dtype],
                   grid: Any, threadgroup: Any, template: Iterable[tuple[str, Any]] = (),
                   init_value: float | None = None) -> list[mx.array]:  # fmt: skip
            text = mlx_text(name, header, source, input_names, inputs, output_names, output_dtypes, list(template))
            self.texts[text.name] = text
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch


def mlx_text(
    name: str,
    header: str,
    source: str,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]],
) -> Text:
    """Wrap a source as MLX 0.32 does."""
    parameters, settings, suffix = [], [], ""
    for array_name, array in zip(input_names, inputs, strict=True):
        parameters.append(f"const {type_name(array.dtype)}* {array_name}")
        for what, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if array.ndim and f"{array_name}_{what}" in source:
                parameters.append(f"const __grid_constant__ {kind} {array_name}_{what}")
    parameters += [f"{type_name(d)}* {n}" for n, d in zip(output_names, output_dtypes, strict=True)]
    for argument, value in template:
        if isinstance(value, mx.Dtype):
            settings.append(f"  using {argument} = {type_name(value)};\n")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            settings.append(f"  constexpr {kind} {argument} = {str(value).lower()};\n")
        suffix += f"_{re.sub('[^a-z0-9]', '', str(value).lower().removeprefix('mlx.core.'))}"
    function_name = f"custom_kernel_{name}{suffix}"
    joined = ",\n    ".join(parameters)
    function = f"__global__ void {function_name}(\n    {joined}) {{\n{''.join(settings)}\n{source}\n}}\n"
    return Text(function_name, header, function, tuple(parameters))


def whole_text(texts: Iterable[Text], foundation: str = FOUNDATION) -> str:
    """One compilation unit of several launches; their header goes in once, so all must have the same."""
    texts = list(texts)
    headers = {text.header for text in texts}
    assert len(headers) == 1, "texts with different headers cannot share a unit"
    functions = "\n".join(text.function for text in texts)
    opening = "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
    return f"{foundation}{headers.pop()}{opening}{functions}\n}}\n"


# --- Compilers ----------------------------------------------------------------------------------------------------


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit's headers, if it is installed."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(guess) for guess in guesses if guess] + ([Path(nvcc).resolve().parents[1]] if nvcc else [])
    return next((folder / "include" for folder in folders if (folder / "include/cuda_fp16.h").is_file()), None)


def nvrtc() -> ctypes.CDLL | None:
    """NVIDIA's run-time compiler, which is what MLX uses, if its library is installed."""
    for name in (ctypes.util.find_library("nvrtc"), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            if name:
                return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compiler() -> str | None:
    """Which compiler `compile_texts` will use: ``NVRTC``, ``nvcc`` or None."""
    if toolkit() and nvrtc():
        return "NVRTC"
    return "nvcc" if shutil.which("nvcc") and toolkit() else None


def compile_texts(
    texts: Iterable[Text], architectures: Sequence[str] = ("80", "90"), *, machine_code: bool = True
) -> str:
    """Compile launches for some GPUs.

    Args:
        texts: The launches.
        architectures: Compute capabilities without their dot.
        machine_code: Go on to the GPU's own code, which can take minutes for what is unrolled far; otherwise stop at
            PTX, when all that is written has been read and checked.

    Returns:
        What the compiler said; empty if it was content. The first line of a failure begins with ``error``.
    """
    texts = list(texts)
    source = whole_text(texts)
    COMPILED.update(texts)
    kind = "sm" if machine_code else "compute"
    if compiler() == "NVRTC":
        logs = [_run_nvrtc(source, f"{kind}_{architecture}") for architecture in architectures]
        return next((log for log in logs if log), "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cu")
        path.write_text(source, encoding="utf-8")
        targets = [f"-gencode=arch=compute_{a},code={kind}_{a}" for a in architectures]
        command = ["nvcc", "-std=c++17", "--fatbin", *targets, str(path), "-o", str(Path(folder, "kernels.fatbin"))]
        run = subprocess.run(command, capture_output=True, text=True)
    return "" if run.returncode == 0 else f"error from nvcc:\n{run.stderr}{run.stdout}"


def _run_nvrtc(source: str, architecture: str) -> str:
    library = nvrtc()
    assert library is not None
    include = toolkit()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    words = [f"--gpu-architecture={architecture}", f"--include-path={include}", f"--include-path={include}/cccl"]
    options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    status = library.nvrtcCompileProgram(program, len(words), options)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return f"error from NVRTC:\n{log.value.decode(errors='replace')}" if status else ""
