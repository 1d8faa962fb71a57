"""What a model, a checkpoint or a manifest consists of: parameters, sizes and types per part; headers only are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .catalog import stored_dtype
from .checkpoint import open_checkpoint
from .manifest import Manifest, load_manifest, manifest_names
from .safetensors_file import INDEX_FILE, SINGLE_FILE
from .tensors import TensorRef, item_size

_DEEPER = ("model", "perception")  # first words of names that say nothing alone
_GROUP_SIZE = 64  # MLX's own default
_WEIGHTS = (SINGLE_FILE, INDEX_FILE, "model.pt", "adapter_model.safetensors")


@dataclass(frozen=True)
class PartInfo:
    """One part of a model.

    Args:
        name: What the names of its tensors begin with.
        tensors: How many it has.
        parameters: Values that they stand for; of a packed tensor those that it was made from.
        nbytes: Bytes that they take.
        dtypes: Types that they are stored in, named as in safetensors, the largest share of bytes first.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """A model, a checkpoint or a manifest.

    Args:
        title: What it is.
        parts: Its parts, in the order of the file.
        manifests: The manifests that name exactly these tensors; models of one shape share them.
        quantization: ``bits`` and ``group_size`` of what is quantised of the language model, if anything is, and
            modules that have others.
        stages: The same of ``audio_encoder`` and ``adaptor``.
        recipe: What quantised it, where that is known.
    """

    title: str
    parts: tuple[PartInfo, ...]
    manifests: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: str | None = None

    @property
    def total(self) -> PartInfo:
        """All parts taken together."""
        dtypes = dict.fromkeys(dtype for part in self.parts for dtype in part.dtypes)
        return PartInfo(
            "total",
            sum(part.tensors for part in self.parts),
            sum(part.parameters for part in self.parts),
            sum(part.nbytes for part in self.parts),
            tuple(dtypes),
        )


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str


def describe_path(path: Path) -> Description:
    """Describe a model directory, a published checkpoint's directory, or a file of weights.

    Raises:
        CheckpointError: If no readable weights are there.
    """
    refs = open_checkpoint(_weights_in(path))
    settings = _settings(path, "config.json")
    quantization, stages = _quantization(settings), _stages(settings)
    tensors = [_Tensor(ref.name, ref.shape, ref.dtype) for ref in refs.values()]
    manifests = identify(refs)
    if "schema" in settings:
        title = f"model directory {settings.get('name') or path.name}"
    else:
        title = f"{' or '.join(manifests)} by its tensors" if manifests else "unknown checkpoint"
    everything = {**(quantization or {})}
    for stage, own in stages.items():
        everything |= {f"{stage}.{key}": value for key, value in own.items() if isinstance(value, dict)}
        everything[stage] = own
    recipe = _settings(path, "provenance.json").get("quantization")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return Description(title, _parts(tensors, everything), manifests, quantization, stages, name)


def describe_manifest(manifest: Manifest) -> Description:
    """Describe what a published checkpoint holds that is not on this machine."""
    tensors = [_Tensor(name, shape, stored_dtype(manifest, name)) for name, shape in manifest.tensors.items()]
    return Description(
        f"{manifest.name} by its manifest", _parts(tensors, _quantization(manifest.config)), (manifest.name,)
    )


def identify(refs: Mapping[str, TensorRef]) -> tuple[str, ...]:
    """Return the names of the manifests that a checkpoint's names and shapes fit exactly."""
    shapes = {name: ref.shape for name, ref in refs.items()}
    fitting = []
    for name in manifest_names():
        manifest = load_manifest(name)
        needed = dict(manifest.tensors)
        more = {key: shape for key, shape in shapes.items() if key not in needed}
        if needed.items() <= shapes.items() and more.items() <= dict(manifest.optional).items():
            fitting.append(name)
    return tuple(fitting)


def _weights_in(path: Path) -> Path:
    """The file to open of a directory; a directory of shards is opened by its index."""
    if not path.is_dir() or (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return path
    found = [path / name for name in _WEIGHTS if (path / name).is_file()]
    files = [*path.glob("*.safetensors"), *path.glob("*.pt")]
    return found[0] if found else files[0] if len(files) == 1 else path


def _settings(path: Path, file: str) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    try:
        values = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a file of weights needs none
    return values if isinstance(values, dict) else {}


def _quantization(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of MLX's quantisation, at the top as in its own checkpoints or beside the decoder's sizes."""
    for holder in (settings, settings.get("decoder")):
        found = holder.get("quantization") if isinstance(holder, dict) else None
        if isinstance(found, dict):
            return _flat(found)
    return None


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    if "default" in found:  # as a converted model writes it
        return {**found["default"], **{path: own for path, own in found["overrides"].items() if own}}
    return found


def _stages(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = settings.get("quantized_stages")
    stages = found.items() if "schema" in settings and isinstance(found, dict) else ()
    return {"audio_encoder" if name == "encoder" else name: _flat(own) for name, own in stages}


def _parts(tensors: Iterable[_Tensor], quantization: Mapping[str, Any] | None = None) -> tuple[PartInfo, ...]:
    tensors = list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    groups: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        words = tensor.name.split(".")
        depth = 2 if words[0] in _DEEPER and len(words) > 2 else 1
        groups.setdefault(".".join(words[:depth]), []).append(tensor)
    parts = []
    for name, group in groups.items():
        sizes: Counter[str] = Counter()
        for tensor in group:
            sizes[tensor.dtype] += _nbytes(tensor)
        parts.append(
            PartInfo(
                name=name,
                tensors=len(group),
                parameters=sum(_parameters(tensor, by_name, quantization or {}) for tensor in group),
                nbytes=sum(sizes.values()),
                dtypes=tuple(dtype for dtype, _ in sizes.most_common()),
            )
        )
    return tuple(parts)


def _nbytes(tensor: _Tensor) -> int:
    return prod(tensor.shape) * item_size(tensor.dtype)


def _parameters(tensor: _Tensor, others: Mapping[str, _Tensor], quantization: Mapping[str, Any]) -> int:
    """Values that a tensor stands for.

    MLX packs a matrix into 32-bit words ``weight`` with ``scales`` and ``biases``, one of each for a group of values in
    a row; the three stand for the matrix alone. The size of a group is in the configuration, for all matrices, for
    those of one part, or for one by its name.
    """
    stem, _, last = tensor.name.rpartition(".")
    packed, scales = others.get(f"{stem}.weight"), others.get(f"{stem}.scales")
    if packed is None or scales is None or packed.dtype != "U32":
        return prod(tensor.shape)
    if last == "weight":
        stem = stem.replace(".base_layer", "")
        part, _, path = stem.partition(".")
        own = quantization.get(stem) or quantization.get(part) or quantization.get(path)
        settings = own if isinstance(own, dict) else quantization
        return prod(scales.shape) * int(settings.get("group_size", _GROUP_SIZE))
    return 0 if last in ("scales", "biases") else prod(tensor.shape)
