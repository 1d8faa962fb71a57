"""Canary-Qwen's configuration: sizes from its tensors' shapes, the rest from the training settings beside them.

The settings are NeMo's, ``config.json`` in the published directory: ``perception.preprocessor``, ``.encoder``,
``.modality_adapter`` and ``lora``. Where they are silent, the published model's values are meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..decoder import DecoderConfig
from ..errors import CheckpointError
from ..fastconformer import FastConformerConfig
from ..mel import MelConfig
from ..projection import ProjectionConfig
from .derive import Sizes
from .keymap import Shape, load_keymap
from .manifest import load_manifest

_LLM = "qwen3-1.7b"
# What the modules of this package compute; with anything else in a checkpoint's settings its weights mean other maths.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "perception.preprocessor.window": ("hann",),
    "perception.preprocessor.normalize": ("per_feature",),
    "perception.preprocessor.log": (True,),
    "perception.preprocessor.frame_splicing": (1,),
    "perception.encoder.subsampling": ("dw_striding",),
    "perception.encoder.causal_downsampling": (False,),
    "perception.encoder.reduction": (None,),
    "perception.encoder.self_attention_model": ("rel_pos",),
    "perception.encoder.att_context_style": ("regular",),
    "perception.encoder.att_context_size": ([-1, -1], None),
    "perception.encoder.conv_norm_type": ("batch_norm",),
    "perception.encoder.conv_context_size": (None,),
}


@dataclass(frozen=True)
class CanaryConfigs:
    """Configurations of the stages; the adapters of the decoder are read apart."""

    frontend: MelConfig
    encoder: FastConformerConfig
    adaptor: ProjectionConfig
    decoder: DecoderConfig


def canary_configs(shapes: Mapping[str, Shape], settings: Mapping[str, Any], *, file: str) -> CanaryConfigs:
    """Read the configuration of every stage.

    Args:
        shapes: Name -> shape of the checkpoint's tensors.
        settings: Its parsed ``config.json``; empty where there is none.
        file: The checkpoint, for messages.

    Raises:
        CheckpointError: If a tensor that tells a size is missing, sizes are impossible, or the settings ask for what
            this package does not compute.
    """
    _check_settings(settings, file)
    renamed = load_keymap("canary").rename(shapes)
    sizes = Sizes({target: shapes[names[0]] for target, names in renamed.items()}, file, "Canary-Qwen")
    try:
        return CanaryConfigs(
            frontend=_frontend(sizes, _section(settings, "perception.preprocessor", file), file),
            encoder=_encoder(sizes, _section(settings, "perception.encoder", file)),
            adaptor=ProjectionConfig(
                input_size=sizes.get("adaptor.proj.weight", 1, 2), output_size=sizes.get("adaptor.proj.weight", 0, 2)
            ),
            decoder=_decoder(sizes),
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _frontend(sizes: Sizes, settings: Mapping[str, Any], file: str) -> MelConfig:
    rate = settings.get("sample_rate", MelConfig.sample_rate)
    config = MelConfig(
        sample_rate=rate,
        num_mel_bins=sizes.get("frontend.fb", 1, 3),
        frame_length_ms=1000 * sizes.get("frontend.window", 0, 1) / rate,
        frame_shift_ms=1000 * settings.get("window_stride", MelConfig.frame_shift_ms / 1000),
        fft_size=2 * (sizes.get("frontend.fb", 2, 3) - 1),
        preemphasis=settings.get("preemph", MelConfig.preemphasis),
    )
    told = {"features": config.num_mel_bins, "n_fft": config.fft_size, "window_size": config.frame_length / rate}
    for key, value in told.items():
        if settings.get(key, value) != value:
            raise CheckpointError(f"{file}: config.json gives {key} as {settings[key]!r}, but the tensors say {value}")
    return config


def _encoder(sizes: Sizes, settings: Mapping[str, Any]) -> FastConformerConfig:
    # One convolution of stride 2 stands alone; each further one comes with a pointwise one.
    strided = (sizes.count(r"audio_encoder\.pre_encode\.conv\.(\d+)\.weight") + 1) // 2
    layer = "audio_encoder.layers.0"
    return FastConformerConfig(
        input_size=sizes.get("frontend.fb", 1, 3),
        output_size=sizes.get("audio_encoder.pre_encode.out.weight", 0, 2),
        attention_heads=sizes.get(f"{layer}.self_attn.pos_bias_u", 0, 2),
        linear_units=sizes.get(f"{layer}.feed_forward1.linear1.weight", 0, 2),
        num_blocks=sizes.count(r"audio_encoder\.layers\.(\d+)\..*"),
        kernel_size=sizes.get(f"{layer}.conv.depthwise_conv.weight", 2, 3),
        subsampling_factor=2**strided,
        subsampling_channels=sizes.get("audio_encoder.pre_encode.conv.0.weight", 0, 4),
        scale_input=bool(settings.get("xscaling", False)),
    )


def _decoder(sizes: Sizes) -> DecoderConfig:
    """Read what shapes tell; theta, epsilon and context are those of the Qwen3 that the training began with."""
    layer = "decoder.model.layers.0"
    head_dim = sizes.get(f"{layer}.self_attn.q_norm.weight", 0, 1)
    # A layer with an adapter beside it has its own weight one name further down.
    adapted = sizes.count(r"decoder\.model\.layers\.(0)\.self_attn\.q_proj\.base_layer\.weight")
    queries = sizes.get(f"{layer}.self_attn.q_proj{'.base_layer' if adapted else ''}.weight", 0, 2)
    told = {
        "vocab_size": sizes.get("decoder.model.embed_tokens.weight", 0, 2),
        "hidden_size": sizes.get("decoder.model.norm.weight", 0, 1),  # of a quantised table the width is not its
        "intermediate_size": sizes.get(f"{layer}.mlp.gate_proj.weight", 0, 2),
        "num_hidden_layers": sizes.count(r"decoder\.model\.layers\.(\d+)\..*"),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": sizes.get(f"{layer}.self_attn.k_proj.weight", 0, 2) // head_dim,
        "head_dim": head_dim,
    }
    return DecoderConfig.from_huggingface({**load_manifest(_LLM).config, **told})


def _check_settings(settings: Mapping[str, Any], file: str) -> None:
    for path, allowed in _SUPPORTED.items():
        section, _, key = path.rpartition(".")
        found = _section(settings, section, file).get(key, allowed[0])
        if found not in allowed:
            raise CheckpointError(f"{file}: config.json gives {path} as {found!r}; only {allowed[0]!r} can be computed")
    connector = _section(settings, "perception.modality_adapter", file).get("_target_", "IdentityConnector")
    if not str(connector).endswith("IdentityConnector"):
        raise CheckpointError(f"{file}: config.json puts {connector} before the projection, which can not be computed")


def _section(settings: Mapping[str, Any], path: str, file: str) -> Mapping[str, Any]:
    """Return an object within the settings; empty if it is not there."""
    found: Any = settings
    for key in path.split("."):
        found = found.get(key) or {}
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{file}: config.json must hold an object as {path} but holds {found!r}")
    return found
