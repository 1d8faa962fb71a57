"""Custom kernels for GPUs, each with the plain operations that it must equal.

A module per operation, of the name of its Metal source: ``fsmn.fsmn`` is the operation, ``fsmn.fsmn_reference`` the
plain operations, ``fsmn.CASES`` what both are compared and timed on. `use` and the environment variable
`QWEN4B_ASR_KERNELS` choose which kernels may be used, `operations` lists them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._switch import NAMES, use

if TYPE_CHECKING:
    from ._dispatch import Operation

__all__ = ["NAMES", "operations", "use"]


def operations() -> dict[str, Operation]:
    """Return every operation that has a kernel, by name; imports their modules."""
    from . import add_rms_norm, attention, fsmn, lfr_cmvn, logits_argmax, qk_norm_rope

    modules = (add_rms_norm, attention, fsmn, lfr_cmvn, logits_argmax, qk_norm_rope)
    return {module.OPERATION.name: module.OPERATION for module in modules}
