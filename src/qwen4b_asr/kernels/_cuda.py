"""Metal kernels as CUDA: the same body, with another vocabulary around it.

What MLX (0.32, ``mlx/backend/cuda/custom_kernel.cpp``) makes of the text that `mx.fast.cuda_kernel` is given::

    #include "mlx/backend/cuda/device/utils.cuh"      cuda_fp16, cuda_bf16, Shape and Strides as cuda::std::array
    #include <cooperative_groups.h>
    #define inf cuda::std::numeric_limits<float>::infinity()
    HEADER
    namespace mlx::core::cu {
    namespace cg = cooperative_groups;
    __global__ void custom_kernel_NAME_TEMPLATE(
        const T* x,                                    every input, also one of no axes
        const __grid_constant__ Shape x_shape,         if SOURCE has the text x_shape; likewise x_strides, x_ndim;
        ...                                            none of them for an input of no axes
        T* y) {                                        every output
      using T = float;  constexpr int K = 11;          template arguments
      SOURCE
    }}

It is compiled by NVRTC in its default language (C++17) for the GPU at hand, and kept under the function's name, in
memory and in a folder for temporary files that outlives the process. So the name must change with the text, and
`Kernel` puts a hash of it there. The grid is rounded up to whole threadgroups, so bodies check their bounds.
"""

from __future__ import annotations

import re

from ._contract import Contract
from ._sources import read_source

PRELUDE = "cuda_prelude.h"

_LINEAR = "(threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x"
_ATTRIBUTES = {
    "thread_position_in_grid": (
        "uint3",
        "make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, "
        "blockIdx.z * blockDim.z + threadIdx.z)",
    ),
    "thread_position_in_threadgroup": ("uint3", "threadIdx"),
    "threadgroup_position_in_grid": ("uint3", "blockIdx"),
    "threadgroups_per_grid": ("uint3", "make_uint3(gridDim.x, gridDim.y, gridDim.z)"),
    "threads_per_threadgroup": ("uint3", "make_uint3(blockDim.x, blockDim.y, blockDim.z)"),
    "thread_index_in_threadgroup": ("uint", _LINEAR),
    "thread_index_in_simdgroup": ("uint", f"({_LINEAR}) & 31u"),
    "simdgroup_index_in_threadgroup": ("uint", f"({_LINEAR}) >> 5"),
    "simdgroups_per_threadgroup": ("uint", "(blockDim.x * blockDim.y * blockDim.z + 31u) >> 5"),
    "threads_per_simdgroup": ("uint", "32u"),
}
# CUDA does not know the size of a grid that is no multiple of the threadgroup's, and has no groups of four.
_UNKNOWN = (
    *("threads_per_grid", "grid_size", "grid_origin", "dispatch_threads_per_threadgroup"),
    *("thread_index_in_quadgroup", "quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup"),
)

# `threadgroup float a[3], b[4];` reserves memory; with a `*` or `&` it would only say where something points to.
_RESERVATION = re.compile(
    r"\bthreadgroup\s+((?:const\s+)?[\w:]+(?:\s*<[^;{}()]*>)?)\s+(?=\w+\s*(?:\[[^;]*\]\s*)*(?:,[^;()]*)?;)"
)
_ADDRESS_SPACE = re.compile(r"\b(?:device|constant|thread|threadgroup)\b(?=\s+[\w:])\s+")
_GLOBAL_CONSTANT = re.compile(r"^(?:static\s+)?constant\s+(?!constexpr\b)(?=[^()\n]*[\[=])", re.MULTILINE)
_FUNCTION = re.compile(r"^((?:static\s+)?(?:inline|constexpr)\s+)(?=[^;={]*\()", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def to_cuda(header: str, body: str, contract: Contract) -> tuple[str, str]:
    """Convert a kernel's text for `mx.fast.cuda_kernel`.

    Args:
        header: Helper code. Its functions must be marked ``METAL_FUNC``, ``inline`` or ``constexpr``.
        body: The kernel's body.
        contract: Which inputs there are.

    Returns:
        Header, with `PRELUDE` in front, and source.

    Raises:
        ValueError: If the body asks for something that CUDA cannot tell.
    """
    code = _COMMENT.sub("", body)
    if missing := [name for name in _UNKNOWN if _has_word(code, name)]:
        raise ValueError(f"[{contract.name}] the body must do without {missing[0]} to run on CUDA but got it")
    ids = [f"const {kind} {name} = {value};" for name, (kind, value) in _ATTRIBUTES.items() if _has_word(code, name)]
    # A parameter cannot be declared anew beside itself, only in a block inside: hence two steps and a block.
    outer, inner = [], []
    for spec in contract.inputs:
        if not spec.shape:
            outer.append(f"const auto* const {spec.name}_pointer = {spec.name};")
            inner.append(f"const auto& {spec.name} = *{spec.name}_pointer;")
        for name in (f"{spec.name}_shape", f"{spec.name}_strides"):
            if _has_word(code, name):
                outer.append(f"const auto* const {name}_pointer = {name}.data();")
                inner.append(f"const auto* const {name} = {name}_pointer;")
    lines = [*ids, *outer, "{", *inner, _translate(body).strip("\n"), "}"]
    helpers = _FUNCTION.sub(r"__device__ \1", _GLOBAL_CONSTANT.sub("__constant__ const ", header))
    return f"{read_source(PRELUDE)}\n{_translate(helpers)}", "\n".join(lines) + "\n"


def _translate(text: str) -> str:
    """Take the address spaces away, but for memory that a threadgroup shares."""
    return _ADDRESS_SPACE.sub("", _RESERVATION.sub(r"__shared__ \1 ", text))


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None
