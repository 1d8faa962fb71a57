"""Configurations from checkpoints: sizes from the tensors' shapes, the rest from the files beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adaptor import AdaptorConfig
from ..decoder import DecoderConfig
from ..encoder import EncoderConfig
from ..errors import CheckpointError
from ..features import FrontendConfig
from .keymap import KeyMap, Shape

# The published checkpoints' heads are as wide as this; it decides only where config.yaml does not.
_ENCODER_HEAD_WIDTH = 128
_ADAPTOR_HEADS = 8


def encoder_config(
    shapes: Mapping[str, Shape],
    settings: Mapping[str, str],
    *,
    file: str,
    heads: int | None = None,
    section: str = "encoder_conf",
    queries: bool = True,
) -> EncoderConfig:
    """Read the encoder's sizes from its parameters' shapes.

    Args:
        shapes: Parameter name (as in SenseVoice's checkpoint) -> shape.
        settings: Scalars of ``config.yaml``; empty where there is none.
        file: The checkpoint, for messages.
        heads: Attention heads, where neither the file nor the width tells.
        section: Where in `settings` the encoder's are.
        queries: Whether it has SenseVoice's query frames.

    Raises:
        CheckpointError: If this is not a SenseVoice encoder or the heads cannot be told.
    """
    sizes = Sizes(shapes, file, "a SenseVoice encoder")
    width = sizes.get("encoder.encoders0.0.self_attn.linear_out.weight", 0, 2)
    if heads is None:
        told = number_of(settings, f"{section}.attention_heads", file)
        heads = int(told) if told is not None else width // _ENCODER_HEAD_WIDTH
        if told is None and (not heads or width % _ENCODER_HEAD_WIDTH):
            raise CheckpointError(
                f"{file}: the number of attention heads cannot be told from a width of {width}; put the checkpoint's "
                "config.yaml beside it or give --encoder-heads"
            )
    # FunASR spells it so.
    shift = number_of(settings, f"{section}.sanm_shfit", file) or number_of(settings, f"{section}.sanm_shift", file)
    try:
        return EncoderConfig(
            input_size=sizes.get("encoder.encoders0.0.norm1.weight", 0, 1),
            output_size=width,
            attention_heads=heads,
            linear_units=sizes.get("encoder.encoders0.0.feed_forward.w_1.weight", 0, 2),
            num_blocks=1 + sizes.count(r"encoder\.encoders\.(\d+)\..*"),
            tp_blocks=sizes.count(r"encoder\.tp_encoders\.(\d+)\..*"),
            kernel_size=sizes.get("encoder.encoders0.0.self_attn.fsmn_block.weight", 2, 3),
            sanm_shift=int(shift or 0),
            num_queries=sizes.get("embed.weight", 0, 2) if queries else 0,
            vocab_size=sizes.get("ctc.ctc_lo.weight", 0, 2) if "ctc.ctc_lo.weight" in shapes else 0,
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def frontend_config(input_size: int, settings: Mapping[str, str], *, file: str, cmvn: bool = True) -> FrontendConfig:
    """Read the front end's constants from ``config.yaml``, the published ones by default.

    Args:
        input_size: Width of the rows that the encoder takes.
        settings: Scalars of ``config.yaml``; empty where there is none.
        file: The checkpoint, for messages.
        cmvn: Whether the features are normalised.

    Raises:
        CheckpointError: If stacked mel bins do not give `input_size`, or a setting is not supported.
    """
    window = settings.get("frontend_conf.window", "hamming")
    if window != "hamming":
        raise CheckpointError(f"{file}: the front end has a hamming window, config.yaml asks for {window!r}")
    keys = {
        "sample_rate": ("fs", int),
        "num_mel_bins": ("n_mels", int),
        "frame_length_ms": ("frame_length", float),
        "frame_shift_ms": ("frame_shift", float),
        "lfr_m": ("lfr_m", int),
        "lfr_n": ("lfr_n", int),
    }
    values: dict[str, Any] = {}
    for name, (key, kind) in keys.items():
        number = number_of(settings, f"frontend_conf.{key}", file)
        if number is not None:
            values[name] = kind(number)
    if "num_mel_bins" not in values:
        lfr_m = values.get("lfr_m", FrontendConfig.lfr_m)
        values["num_mel_bins"] = max(1, input_size // lfr_m)
    try:
        config = FrontendConfig(**values, cmvn=cmvn)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if config.output_size != input_size:
        raise CheckpointError(
            f"{file}: the front end gives rows of {config.lfr_m} x {config.num_mel_bins} = {config.output_size}, "
            f"but the encoder takes {input_size}"
        )
    return config


def adaptor_config(
    sources: Mapping[str, Shape], keymap: KeyMap, *, file: str, heads: int | None = None
) -> AdaptorConfig:
    """Read the adaptor's sizes from its tensors, whichever of the known namings they have.

    Raises:
        CheckpointError: If this is not an adaptor, or the heads do not divide its width.
    """
    renamed = keymap.rename(sources)
    sizes = Sizes({target: sources[names[0]] for target, names in renamed.items()}, file, "an adaptor")
    try:
        return AdaptorConfig(
            input_size=sizes.get("input_proj.weight", 1, 2),
            hidden_size=sizes.get("input_proj.weight", 0, 2),
            output_size=sizes.get("output_proj.weight", 0, 2),
            num_layers=sizes.count(r"transformer\.layers\.(\d+)\..*"),
            num_heads=_ADAPTOR_HEADS if heads is None else heads,
            ffn_size=sizes.get("transformer.layers.0.linear1.weight", 0, 2),
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; give --adaptor-heads") from error


def decoder_config(path: Path) -> DecoderConfig:
    """Read a Hugging Face ``config.json``.

    Raises:
        CheckpointError: If it cannot be read or is not that of a Qwen3 that this decoder can be.
    """
    values = read_json_object(path)
    try:
        return DecoderConfig.from_huggingface(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: If it cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object but holds {type(values).__name__}")
    return values


class Sizes:
    """Looks up sizes in shapes with errors that say which tensor is wanting."""

    def __init__(self, shapes: Mapping[str, Shape], file: str, what: str) -> None:
        self._shapes, self._file, self._what = shapes, file, what

    def get(self, name: str, axis: int, axes: int) -> int:
        """Return one size of a tensor that has `axes` axes.

        Raises:
            CheckpointError: If the tensor is not there or has another number of axes.
        """
        shape = self._shapes.get(name)
        if shape is None:
            some = ", ".join(list(self._shapes)[:3]) or "nothing"
            raise CheckpointError(f"{self._file}: is not {self._what}: it has no {name!r} (it has {some} ...)")
        if len(shape) != axes:
            raise CheckpointError(f"{self._file}: tensor {name!r} should have {axes} axes but is {list(shape)}")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """Return how many values the pattern's group takes over all names."""
        return len({match[1] for name in self._shapes if (match := re.fullmatch(pattern, name))})


def number_of(settings: Mapping[str, str], key: str, file: str) -> float | None:
    """Return a number of ``config.yaml``, or None where it does not have one.

    Raises:
        CheckpointError: If it is not a number.
    """
    text = settings.get(key)
    if text is None or text in ("null", "~"):
        return None
    try:
        return float(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: config.yaml gives {key} as {text!r}, which is not a number") from error
