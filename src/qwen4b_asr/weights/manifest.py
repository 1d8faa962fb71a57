"""Manifests: what is in a published checkpoint, name by name, without the checkpoint.

A manifest is a JSON file in the ``weights`` folder. Names are written with braces as in a
shell, ``{0..48}`` for numbers and ``{weight,bias}`` for alternatives, also nested, and expand
to the exact names. Conversion is tested against manifests, so no weights are needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .paths import weights_data

SCHEMA = 1
_RANGE = re.compile(r"(0|[1-9]\d*)\.\.(0|[1-9]\d*)")
_KEYS = {
    "schema": int,
    "kind": str,
    "name": str,
    "role": str,
    "source": str,
    "licence": str,
    "files": dict,
    "dtype": str,
    "tensor_count": int,
    "parameter_count": int,
    "tensors": dict,
    "optional": dict,
    "config": dict,
}
_ROLES = ("encoder", "adaptor", "decoder", "model")


@dataclass(frozen=True)
class Manifest:
    """One checkpoint.

    Args:
        name: Short name; also the file's.
        role: ``encoder``, ``adaptor`` or ``decoder``; ``model`` where one file holds all of them.
        source: Where it is published.
        licence: Under which licence.
        files: File name -> what it is for.
        dtype: Type of its tensors, named as in safetensors.
        tensors: Exact name -> shape of every tensor that the model needs.
        optional: The same for tensors that the file may hold besides and that conversion drops.
        config: The sizes that cannot be read from the shapes.
    """

    name: str
    role: str
    source: str
    licence: str
    files: Mapping[str, str]
    dtype: str
    tensors: Mapping[str, tuple[int, ...]]
    optional: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Number of values in all needed tensors."""
        return sum(prod(shape) for shape in self.tensors.values())


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern stands for, leftmost braces slowest.

    ``a.{0..1}.{x,y}`` gives ``a.0.x``, ``a.0.y``, ``a.1.x``, ``a.1.y``.

    Raises:
        ValueError: If braces do not pair, are empty, or a range runs backwards.
    """
    first = pattern.find("{")
    if first < 0:
        if "}" in pattern:
            raise ValueError(f"[expand_braces] braces must pair but got {pattern!r}")
        yield pattern
        return
    depth, cuts = 0, [first]
    for index in range(first, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[index], 0)
        if depth == 1 and pattern[index] == ",":
            cuts.append(index)
        if depth == 0:
            cuts.append(index)
            break
    if depth or "}" in pattern[:first]:
        raise ValueError(f"[expand_braces] braces must pair but got {pattern!r}")
    inside = [pattern[a + 1 : b] for a, b in pairwise(cuts)]
    numbers = _RANGE.fullmatch(inside[0]) if len(inside) == 1 else None
    if numbers:
        low, high = int(numbers[1]), int(numbers[2])
        if low > high:
            raise ValueError(f"[expand_braces] a range must run upwards but got {pattern!r}")
        inside = [str(n) for n in range(low, high + 1)]
    elif len(inside) == 1:
        raise ValueError(f"[expand_braces] braces must hold a range or alternatives but got {pattern!r}")
    head, tail = pattern[:first], pattern[cuts[-1] + 1 :]
    for alternative in inside:
        for middle in expand_braces(alternative):
            for rest in expand_braces(tail):
                yield head + middle + rest


def load_manifest(name: str, folder: Path | None = None) -> Manifest:
    """Read and check a manifest of the package.

    Args:
        name: Its name, such as ``sensevoice-small``.
        folder: Where to look; the package's own data by default.

    Raises:
        ConfigError: If it is missing or breaks its schema: unknown or missing keys, malformed
            shapes, a name given twice, or counts that are not those of its tensors.
    """
    path = (folder or weights_data()) / f"{name}.json"
    values = read_schema(path, "manifest", _KEYS)
    if values["name"] != name or values["role"] not in _ROLES:
        raise ConfigError(f"{path}: name must be {name!r} and role one of {', '.join(_ROLES)}")
    manifest = Manifest(
        name=name,
        role=values["role"],
        source=values["source"],
        licence=values["licence"],
        files=values["files"],
        dtype=values["dtype"],
        tensors=_expand(path, values["tensors"]),
        optional=_expand(path, values["optional"]),
        config=values["config"],
    )
    twice = manifest.tensors.keys() & manifest.optional.keys()
    if twice:
        raise ConfigError(f"{path}: {min(twice)!r} is both needed and optional")
    for key, count in (("tensor_count", len(manifest.tensors)), ("parameter_count", manifest.parameters)):
        if values[key] != count:
            raise ConfigError(f"{path}: {key} is {values[key]} but the tensors give {count}")
    return manifest


def manifest_names(folder: Path | None = None) -> list[str]:
    """Return the names of all manifests of the package."""
    names = []
    for path in sorted((folder or weights_data()).glob("*.json")):
        try:
            kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is no manifest or key map ({error!r})") from error
        if kind == "manifest":
            names.append(path.stem)
    return names


def read_schema(path: Path, kind: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """Read a JSON object that has exactly the given keys with the given types.

    Raises:
        ConfigError: If it is missing, is not JSON, or has other keys or types.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict) or values.keys() != keys.keys():
        wrong = sorted(values.keys() ^ keys.keys()) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{path}: keys must be {', '.join(keys)}; missing or unknown: {wrong}")
    for key, wanted in keys.items():
        if type(values[key]) is not wanted:
            raise ConfigError(f"{path}: {key} must be {wanted.__name__} but is {type(values[key]).__name__}")
    if values["schema"] != SCHEMA or values["kind"] != kind:
        raise ConfigError(f"{path}: must be a {kind} of schema {SCHEMA}")
    return values


def _expand(path: Path, patterns: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {}
    for pattern, shape in patterns.items():
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise ConfigError(f"{path}: the shape of {pattern!r} must be a list of positive integers but is {shape!r}")
        try:
            names = list(expand_braces(pattern))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        for name in names:
            if name in tensors:
                raise ConfigError(f"{path}: {name!r} is given twice")
            tensors[name] = tuple(shape)
    return tensors
