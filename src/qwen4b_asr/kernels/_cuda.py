"""Metal kernels as CUDA: the same body, with another vocabulary around it."""

from __future__ import annotations

from ._contract import Contract


def to_cuda(header: str, body: str, contract: Contract) -> tuple[str, str]:
    """Convert a kernel's text for `mx.fast.cuda_kernel`."""
    raise NotImplementedError("[to_cuda] the conversion is not written yet")
