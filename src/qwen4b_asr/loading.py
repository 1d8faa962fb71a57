"""From the name of a model to one that is ready: found or fetched, filled with its weights, adapters beside them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from .config import ModelConfig
from .errors import ConfigError
from .lora import fuse_lora
from .machine import hold, kept_buffers, this_machine
from .memory import PROGRAM_BYTES, Work, plan_memory, require_room
from .prepare import prepare
from .recognise import Recogniser, find_pieces
from .tokenizer import Tokenizer
from .transcribe import Transcriber
from .weights.adapters import load_adapter
from .weights.load import load_model, resolve_dtype
from .weights.obtain import ProgressBar, no_progress, obtain_model


def load(
    path_or_name: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    lora: str = "keep",
    adapters: Mapping[str | os.PathLike[str], float] | None = None,
    join: bool = True,
    memory_limit: int | None = None,
    batch_size: int = 1,
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
        join: Make the model quick on its device, see `prepare`: projections of one input joined or, in float32 on a
            CPU, weights laid out anew and products left to NumPy. False keeps the modules that a checkpoint describes,
            which `mx.compile` and `mx.vmap` need.
        memory_limit: Bytes that the whole program may take, checked before anything is loaded; without it what the
            machine has, and a warning where little is left.
        batch_size: Windows that will be worked on at once, for what is checked against the memory.
        progress: Draws a bar while something is downloaded or converted; none by default.

    Returns:
        A transcriber, or a recogniser if the model has no language model; both have `transcribe`.

    Raises:
        ModelNotFoundError: If there is no such model.
        DownloadError: If it has to be fetched and cannot be.
        ConfigError: If its configuration cannot be used, or it needs too much memory.
        CheckpointError: If its weights do not fit.
        ValueError: On another dtype.
    """
    if lora not in ("keep", "merge"):
        raise ConfigError(f"lora {lora!r}: choose keep or merge")
    directory: Path = obtain_model(path_or_name, progress=progress)
    _make_room(directory, os.fspath(path_or_name), dtype, memory_limit, batch_size)
    model, config = load_model(directory, dtype=dtype)
    pieces = find_pieces(directory, config.ctc_size) if config.ctc_size and config.ctc_symbols is None else None
    if config.decoder is None:
        if adapters:
            raise ConfigError(f"{path_or_name}: has no language model that an adapter could change")
        if join:
            prepare(model)
        return Recogniser(model, config, pieces)
    for number, (folder, strength) in enumerate((adapters or {}).items()):
        load_adapter(model.decoder, Path(folder), name=f"user{number}", strength=strength)
    if lora == "merge":
        fuse_lora(model.decoder)
    if join:
        prepare(model)
    return Transcriber(model, config, Tokenizer(directory / "tokenizer.json"), pieces)


def _make_room(directory: Path, name: str, dtype: str, limit: int | None, batch: int) -> None:
    """Refuse a model that does not fit, warn of one that hardly does, and hold MLX to what was planned."""
    if limit is not None and limit < 1:
        raise ConfigError(f"memory_limit {limit}: must be a number of bytes from 1")
    config = ModelConfig.load(directory)
    decoder_dtype = "bfloat16" if resolve_dtype(dtype) == mx.bfloat16 else "float32"
    kept = kept_buffers()
    work = Work(batch=batch)
    plan = plan_memory(config, decoder_dtype, work, reserve=kept)
    warning = require_room(config, plan, this_machine(), limit, work=work, model=name)
    if warning:
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
    hold(plan.peak, None if limit is None else limit - kept - PROGRAM_BYTES)
