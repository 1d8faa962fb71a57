"""From the name of a model to one that is ready: found or fetched, filled with its weights, adapters beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .errors import ConfigError
from .lora import fuse_lora
from .recognise import Recogniser, find_pieces
from .tokenizer import Tokenizer
from .transcribe import Transcriber
from .weights.adapters import load_adapter
from .weights.load import load_model
from .weights.obtain import ProgressBar, no_progress, obtain_model


def load(
    path_or_name: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    lora: str = "keep",
    adapters: Mapping[str | os.PathLike[str], float] | None = None,
    progress: ProgressBar = no_progress,
) -> Transcriber | Recogniser:
    """Load a model.

    Args:
        path_or_name: ``demo``, a directory that ``qwen4b-asr convert`` wrote, or a name that ``qwen4b-asr models``
            lists, or a hub id, which is downloaded if it is not on this machine.
        dtype: The decoder's: ``auto`` (float32 on the CPU, bfloat16 on a GPU), ``float32`` or ``bfloat16``.
            Encoder and adaptor are always float32.
        lora: ``keep`` low-rank adapters of the decoder apart, so that they can be changed; or ``merge`` them into its
            weights, which saves two small products per layer and token.
        adapters: PEFT directories to put beside the decoder's layers, and the strength of each; 1 is as trained.
        progress: Draws a bar while something is downloaded or converted; none by default.

    Returns:
        A transcriber, or a recogniser if the model has no language model; both have `transcribe`.

    Raises:
        ModelNotFoundError: If there is no such model.
        DownloadError: If it has to be fetched and cannot be.
        ConfigError: If its configuration cannot be used.
        CheckpointError: If its weights do not fit.
        ValueError: On another dtype.
    """
    if lora not in ("keep", "merge"):
        raise ConfigError(f"lora {lora!r}: choose keep or merge")
    directory: Path = obtain_model(path_or_name, progress=progress)
    model, config = load_model(directory, dtype=dtype)
    pieces = find_pieces(directory, config.ctc_size) if config.ctc_size and config.ctc_symbols is None else None
    if config.decoder is None:
        if adapters:
            raise ConfigError(f"{path_or_name}: has no language model that an adapter could change")
        return Recogniser(model, config, pieces)
    for number, (folder, strength) in enumerate((adapters or {}).items()):
        load_adapter(model.decoder, Path(folder), name=f"user{number}", strength=strength)
    if lora == "merge":
        fuse_lora(model.decoder)
    return Transcriber(model, config, Tokenizer(directory / "tokenizer.json"), pieces)
