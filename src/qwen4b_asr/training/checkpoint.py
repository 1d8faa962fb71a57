"""Training state on disk: weights, averages, optimiser, place in the recipe. Written whole or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import CheckpointError

FILE_NAME = "training.safetensors"


@dataclass
class TrainingState:
    """Everything a run needs to go on as if it had not stopped.

    Args:
        phase: Index of the phase under way.
        step: Steps of that phase already done.
        weights: Parameters, nested.
        average: Their moving averages, nested.
        optimizer: The optimiser's state, nested; empty at the start of a phase.
    """

    phase: int
    step: int
    weights: Any
    average: Any
    optimizer: Any


def save_state(state: TrainingState, directory: Path, fingerprint: str) -> None:
    """Write the state through a temporary name and one rename.

    Args:
        state: What to write.
        directory: Where; made if missing.
        fingerprint: What identifies recipe and data; `load_state` insists on the same.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, mx.array] = {}
    for part in ("weights", "average", "optimizer"):
        flat: Any = tree_flatten(getattr(state, part))
        for name, value in flat:
            arrays[f"{part}.{name}"] = value
    metadata = {"phase": str(state.phase), "step": str(state.step), "fingerprint": fingerprint}
    partial = directory / f".partial-{os.getpid()}.safetensors"
    try:
        mx.save_safetensors(str(partial), arrays, metadata)
        os.replace(partial, directory / FILE_NAME)
    finally:
        partial.unlink(missing_ok=True)


def load_state(directory: Path, fingerprint: str) -> TrainingState:
    """Read the state that `save_state` wrote.

    Raises:
        CheckpointError: If there is none, it cannot be read, or it belongs to another recipe or other data.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: no training state to resume; start without --resume")
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        phase, step = int(metadata["phase"]), int(metadata["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a training state ({error})") from error
    if metadata.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to a run with other settings or other recordings; give the same options as then, "
            "or start without --resume"
        )
    parts: dict[str, list[tuple[str, mx.array]]] = {"weights": [], "average": [], "optimizer": []}
    for name, value in arrays.items():
        part, _, rest = name.partition(".")
        parts[part].append((rest, value))
    trees = {part: tree_unflatten(items) if items else {} for part, items in parts.items()}
    # `mx.load` reads lazily; the file must not be replaced before everything is in memory.
    mx.eval(trees)
    return TrainingState(phase, step, trees["weights"], trees["average"], trees["optimizer"])
