"""What a conversion is going to do, before it does it: which tensor of which file fills which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig
from ..errors import CheckpointError
from ..quantization import Scheme
from .keymap import KeyMap, Plan, Shape
from .recipes import Recipe
from .tensors import FLOAT_DTYPES, TensorRef

Tensors = Mapping[str, TensorRef]


@dataclass(frozen=True)
class Fill:
    """One checkpoint's share of a model.

    Args:
        part: What it is in the provenance: ``encoder``, ``adaptor``, ``llm``, or ``model`` for all of it.
        prefix: What stands before the plan's targets in the model's names: ``audio_encoder.`` or nothing.
        refs: The checkpoint's tensors.
        plan: What happens to each.
        files: Small files that were read besides.
    """

    part: str
    prefix: str
    refs: Tensors
    plan: Plan
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """Everything that `convert` writes.

    Args:
        config: The new model's configuration.
        fills: Where its weights come from.
        vectors: Parameters that are computed rather than copied, float32.
        copies: Files that go along: name in the new directory -> file.
        fingerprint: Of a SANM encoder, kept in the provenance; empty for others.
        schemes: Path of a module in the model -> how the dense matrix that fills it is quantised.
        recipe: What asked for that.
    """

    config: ModelConfig
    fills: tuple[Fill, ...]
    vectors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    fingerprint: str = ""
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    recipe: Recipe | None = None


def shapes_of(refs: Tensors) -> dict[str, Shape]:
    """Return the shape of every tensor by name."""
    return {name: ref.shape for name, ref in refs.items()}


def renamed_shapes(refs: Tensors, keymap: KeyMap, parameters: Mapping[str, Shape] | None = None) -> dict[str, Shape]:
    """Return the tensors' shapes under the names of the parameters they fill, to read sizes from."""
    renamed = keymap.rename(shapes_of(refs), parameters)
    return {target: refs[names[0]].shape for target, names in renamed.items()}


def check_floats(refs: Tensors) -> None:
    """Refuse tensors that are no floating-point numbers.

    Raises:
        CheckpointError: Naming the first.
    """
    for ref in refs.values():
        if ref.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name!r} is {ref.dtype}, but these weights are floating point"
            )


def checked_mvn(values: np.ndarray[Any, Any], rows: int, file: Path) -> None:
    """Make sure that a normalisation fits the rows that it is for.

    Raises:
        CheckpointError: If it does not.
    """
    if values.size != rows:
        raise CheckpointError(f"{file}: normalises rows of {values.size}, but the encoder takes {rows}")
