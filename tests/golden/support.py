"""Read golden files and compare with them, saying what differs and by how much."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors import safe_open

DATA = Path(__file__).parent / "data"
SCHEMA = 1


class GoldenMismatch(AssertionError):
    """A stage and the original code disagree by more than the stage's tolerance."""


class StaleGolden(AssertionError):
    """A golden file is of another schema than these tests, or of another set than its neighbours."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds on relative L2, largest and, where given, mean absolute difference."""

    relative: float
    largest: float
    mean: float | None = None


# float32 on the CPU against the original; what full-size models reach is in README.md.
TOLERANCES = {
    "fbank": Tolerance(relative=1e-4, largest=5e-3, mean=5e-5),
    "features": Tolerance(relative=1e-4, largest=5e-3, mean=5e-5),
    "encoder": Tolerance(relative=1e-5, largest=1e-4),
    "adaptor": Tolerance(relative=2e-5, largest=1e-4),
    "decoder": Tolerance(relative=2e-5, largest=2e-4),
    "whole": Tolerance(relative=2e-5, largest=2e-4),
    "exact": Tolerance(relative=0.0, largest=0.0),
}


@dataclass(frozen=True)
class Golden:
    """One file: tensors, and the settings under which the original code computed them."""

    name: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.tensors[key]

    def fact(self, key: str) -> Any:
        """Return a JSON entry of the metadata."""
        return json.loads(self.metadata[key])

    def weights(self, prefix: str = "weight/") -> dict[str, np.ndarray]:
        """Return the tensors under a prefix, without it."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}


def require_schema(name: str, found: object, regenerate: str) -> None:
    """Refuse a file of another schema.

    Raises:
        StaleGolden: If it is; the message holds the command that remakes the file.
    """
    if str(found) != str(SCHEMA):
        raise StaleGolden(
            f"tests/golden/data/{name} has schema {found}, these tests read schema {SCHEMA}. Regenerate it in the "
            f"reference environment (tests/golden/README.md):\n    {regenerate}"
        )


def load(name: str, data: Path = DATA) -> Golden:
    """Read data/NAME.safetensors and check its schema."""
    with safe_open(data / f"{name}.safetensors", "numpy") as file:
        metadata = file.metadata() or {}
        command = metadata.get("regenerate", f"python tools/golden/make_golden.py --only {name}")
        require_schema(f"{name}.safetensors", metadata.get("schema"), command)
        return Golden(name, {key: file.get_tensor(key) for key in file.keys()}, metadata)  # noqa: SIM118


@cache
def golden(name: str) -> Golden:
    """Read a golden file once per run."""
    return load(name)


def golden_json(name: str) -> Any:
    """Read data/NAME.json and check its schema."""
    content = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    require_schema(f"{name}.json", content.get("schema"), content.get("regenerate", ""))
    return content


def compare(actual: Any, expected: np.ndarray, stage: str, what: str) -> None:
    """Compare with a golden tensor in a stage's tolerance.

    Args:
        actual: mx.array or numpy array.
        expected: The golden tensor.
        stage: Key of `TOLERANCES`.
        what: Named in the message.

    Raises:
        GoldenMismatch: If shapes differ, a value is not finite, or a bound is exceeded.
    """
    tolerance = TOLERANCES[stage]
    found = np.asarray(actual, np.float64)
    wanted = np.asarray(expected, np.float64)
    if found.shape != wanted.shape:
        raise GoldenMismatch(f"{stage}: {what} has shape {found.shape}, the original {wanted.shape}")
    if found.size == 0:
        raise GoldenMismatch(f"{stage}: {what} is empty, so nothing was compared")
    if not np.isfinite(found).all():
        raise GoldenMismatch(f"{stage}: {what} holds {int((~np.isfinite(found)).sum())} values that are not finite")
    difference = np.abs(found - wanted)
    norm = float(np.linalg.norm(wanted))
    relative = float(np.linalg.norm(difference)) / norm if norm else float(np.linalg.norm(difference))
    largest, mean = float(difference.max()), float(difference.mean())
    good = relative <= tolerance.relative and largest <= tolerance.largest
    good = good and (tolerance.mean is None or mean <= tolerance.mean)
    if not good:
        worst = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
        raise GoldenMismatch(
            f"{stage}: {what} {found.shape} is off: relative L2 {relative:.2e} (allowed {tolerance.relative:.0e}), "
            f"largest {largest:.2e} (allowed {tolerance.largest:.0e}), mean {mean:.2e} (allowed {tolerance.mean}); "
            f"worst at {worst}: {found[worst]:.7g} instead of {wanted[worst]:.7g}"
        )


def compare_ids(actual: list[int], expected: list[int], what: str) -> None:
    """Compare token ids.

    Raises:
        GoldenMismatch: If they differ; the message names the first step that does.
    """
    if actual != expected:
        step = next(
            (i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b),
            min(len(actual), len(expected)),
        )
        raise GoldenMismatch(
            f"{what}: ids differ from step {step}: {actual[step:][:6]} instead of {expected[step:][:6]}"
        )


def fill(module: nn.Module, weights: Mapping[str, np.ndarray]) -> Any:
    """Fill a module with weights of the original: same names, each exactly once, each of the right shape.

    torch keeps the memory filters as (D, 1, K) where MLX's convolution reads (D, K, 1).

    Returns:
        The module, in evaluation mode.
    """
    pairs = [
        (name, mx.array(value.swapaxes(1, 2) if name.endswith("fsmn_block.weight") else value))
        for name, value in weights.items()
    ]
    module.load_weights(pairs, strict=True)
    module.eval()
    return module


@contextlib.contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, mx.array]]:
    """Record the last output of each module by its name while the block runs."""
    names = {id(module): name for name, module in modules.items()}
    outputs: dict[str, mx.array] = {}
    originals = {kind: kind.__call__ for kind in {type(module) for module in modules.values()}}

    def wrap(original: Any) -> Any:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if id(self) in names:
                outputs[names[id(self)]] = result
            return result

        return call

    for kind, original in originals.items():
        kind.__call__ = wrap(original)  # type: ignore[method-assign]
    try:
        yield outputs
    finally:
        for kind, original in originals.items():
            kind.__call__ = original  # type: ignore[method-assign]
