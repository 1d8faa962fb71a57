"""Which model a checkpoint belongs to: by its names, and by a fingerprint where names and shapes are the same.

The encoders of SenseVoiceSmall and Fun-ASR-Nano have the same shapes and different weights. An adaptor only understands
the encoder that it was trained on, and the wrong one gives fluent nonsense, so the wrong one is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .tensors import TensorRef

# Family: what it is called in messages, and beginnings of names of which a checkpoint must have one of each.
_FAMILIES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "canary-qwen": ("Canary-Qwen", (("perception.",),)),
    "fun-asr-nano": (
        "Fun-ASR-Nano (or MLT-Nano)",
        (
            ("audio_encoder.encoders0.", "model.audio_tower.", "audio_tower."),
            ("audio_adaptor.", "model.multi_modal_projector.", "multi_modal_projector."),
        ),
    ),
    "sensevoice": ("SenseVoiceSmall", (("encoder.encoders0.", "model.encoder.encoders0."), ("embed.", "model.embed."))),
    "qwen3": ("a language model", (("model.layers.0.", "layers.0.self_attn.q_norm."), ("model.embed_tokens.",))),
}
_LAYERS = ("after_norm", "tp_norm", "encoders0.0.norm1", "encoders0.0.norm2")


def family(names: Iterable[str]) -> str | None:
    """Return which family a checkpoint's names belong to.

    Returns:
        ``canary-qwen``, ``fun-asr-nano``, ``sensevoice``, ``qwen3``, or None for anything else.
    """
    known = tuple(names)
    for key, (_, needed) in _FAMILIES.items():
        if all(any(name.startswith(starts) for name in known) for starts in needed):
            return key
    return None


def require_family(names: Iterable[str], wanted: str, *, file: str) -> None:
    """Refuse a checkpoint that is known to be of another family; what nobody knows is left to the key map.

    Args:
        names: The checkpoint's tensors.
        wanted: A family of `family`.
        file: The checkpoint, for messages.

    Raises:
        CheckpointError: Saying which model it is, and for the two encoders of the same shapes, why that matters.
    """
    found = family(names)
    if found is None or found == wanted:
        return
    reason = ""
    if {found, wanted} == {"sensevoice", "fun-asr-nano"}:
        reason = ": their encoders have the same shapes but different weights, and an adaptor understands only its own"
    raise CheckpointError(f"{file}: this is {_FAMILIES[found][0]}, not {_FAMILIES[wanted][0]}{reason}")


def encoder_fingerprint(tensors: Mapping[str, TensorRef], names: Mapping[str, str]) -> str:
    """Return a digest of an encoder's norms, the same whatever the layout and in float32 and bfloat16.

    Args:
        tensors: The checkpoint's tensors.
        names: Parameter of the SANM layers (``after_norm.weight``) -> its tensor.

    Returns:
        16 hexadecimal digits.

    Raises:
        KeyError: If a norm is not among `names`.
    """
    digest = hashlib.sha256()
    for layer in _LAYERS:
        for kind in ("weight", "bias"):
            ref = tensors[names[f"{layer}.{kind}"]]
            for block in ref.blocks():
                rounded = block.astype(mx.bfloat16, stream=mx.cpu)
                digest.update(np.array(mx.view(rounded, mx.uint16, stream=mx.cpu)).tobytes())
    return digest.hexdigest()[:16]
