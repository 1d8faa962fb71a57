"""Low-rank adapters as checkpoints have them: a PEFT directory, or beside the base weights in one file.

Names end in ``PATH.lora_A.weight`` and ``PATH.lora_B.weight`` or, with the adapter's name between, in
``PATH.lora_A.default.weight``; within a checkpoint the layer's own weight is then ``PATH.base_layer.weight``.
Source: PEFT's ``utils/save_and_load.py`` and ``tuners/lora/config.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointError
from ..joined import apart
from ..lora import DEFAULT_NAME, LoraConfig, add_lora, dense_weight, lora_layers, set_lora_strength
from .checkpoint import open_checkpoint
from .derive import read_json_object
from .tensors import FLOAT_DTYPES, TensorRef

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

Factors = dict[str, tuple[TensorRef, TensorRef]]

_NAME = re.compile(r"(?P<stem>.+)\.lora_(?P<letter>[AB])(?:\.(?P<name>[^.]+))?\.weight")
_PEFT_ROOT = "base_model.model."
# Settings under which an adapter is more than scale * B @ A.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Ways to begin a training that change the base weights too, so that the factors fit no published weights.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory, indexed; nothing but headers has been read.

    Args:
        config: Ranks and scales.
        factors: Path of a layer in the base model -> A (r, C) and B (R, r).
        source: The directory.
    """

    config: LoraConfig
    factors: Mapping[str, tuple[TensorRef, TensorRef]]
    source: Path


def lora_config(values: Mapping[str, Any], *, file: str, name: str = DEFAULT_NAME) -> LoraConfig:
    """Read PEFT's settings.

    Args:
        values: ``adapter_config.json``, or the same keys from a checkpoint's own configuration.
        file: Where they come from, for messages.
        name: The adapter's name.

    Raises:
        CheckpointError: If the adapter is not plain LoRA, or a setting is malformed.
    """
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type must be 'LORA' but is {kind!r}")
    bad = [key for key in _UNSUPPORTED if values.get(key)]
    if values.get("bias", "none") != "none":
        bad.append("bias")
    if bad:
        shown = ", ".join(f"{key} = {values[key]!r}" for key in bad)
        raise CheckpointError(f"{file}: only plain LoRA can be loaded, but this adapter has {shown}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which changed the base weights before the training; "
            "have PEFT convert the adapter to plain LoRA when it saves it"
        )
    missing = [key for key in ("r", "lora_alpha") if key not in values]
    if missing:
        raise CheckpointError(f"{file}: {' and '.join(missing)} must be given; without them the scale is not known")
    targets = values.get("target_modules") or ()
    try:
        return LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            target_modules=() if isinstance(targets, str) else tuple(sorted(targets)),
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            rank_stabilised=bool(values.get("use_rslora")),
            name=name,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_adapter(directory: str | Path, *, name: str = DEFAULT_NAME) -> Adapter:
    """Index a PEFT adapter directory.

    Args:
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        name: The name to give the adapter.

    Raises:
        CheckpointError: If a file is missing or damaged, a tensor is not understood, or ranks are not the settings'.
    """
    directory = Path(directory).expanduser()
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"{directory}: {CONFIG_FILE} is missing; this is not a PEFT adapter")
    config = lora_config(read_json_object(directory / CONFIG_FILE), file=str(directory / CONFIG_FILE), name=name)
    path = next((directory / file for file in WEIGHT_FILES if (directory / file).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory}: the weights are missing: {' or '.join(WEIGHT_FILES)}")
    found, others = _factors(open_checkpoint(path), file=str(path))
    if others:
        raise CheckpointError(f"{path}: tensor {others[0]!r} is no part of plain LoRA")
    if len(found) != 1:
        raise CheckpointError(f"{path}: must hold one adapter but holds {sorted(found) or 'none'}")
    factors = {_layer_path(stem): pair for stem, pair in found.popitem()[1].items()}
    _check_ranks(factors, config, file=str(path))
    return Adapter(config, factors, directory)


def load_adapter(
    model: nn.Module, directory: str | Path, *, name: str = DEFAULT_NAME, strength: float = 1.0
) -> Adapter:
    """Put a PEFT adapter beside the layers of a decoder; `lora.merge_lora` and the rest work on it.

    Args:
        model: The decoder, filled. The factors take the types of its weights.
        directory: See `read_adapter`.
        name: The name to give the adapter; one of that name is replaced.
        strength: Multiplies the scale; 1 is as trained.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: If the adapter cannot be read or is not for this model.
    """
    adapter = read_adapter(directory, name=name)
    with apart(model):
        _put_beside(model, adapter)
    set_lora_strength(model, strength, name)
    return adapter


def _put_beside(model: nn.Module, adapter: Adapter) -> None:
    modules = dict(model.named_modules())
    held = lora_layers(model)
    factors = {}
    for path, pair in adapter.factors.items():
        # Trained on the model without its head, the paths lack the first step.
        target = path if path in modules else f"model.{path}"
        layer = held[target].base_layer if target in held else modules.get(target)
        dtype = dense_weight(layer)[1] if isinstance(layer, (nn.Linear, nn.QuantizedLinear)) else mx.float32
        a, b = (ref.read().astype(dtype) for ref in pair)
        factors[target] = a, b
    try:
        add_lora(model, factors, adapter.config)
    except ValueError as error:
        raise CheckpointError(f"{adapter.source}: is not an adapter of this model: {error}") from error


def checkpoint_adapter(refs: Mapping[str, TensorRef], values: Mapping[str, Any], *, file: str) -> LoraConfig | None:
    """Describe the adapter that a checkpoint holds beside its base weights, to keep it apart.

    The result is for `DecoderConfig.lora`: with it the decoder has parameters of the checkpoint's own names.

    Args:
        refs: The checkpoint's tensors, or those of its language model.
        values: Its LoRA settings under PEFT's keys.
        file: The checkpoint, for messages.

    Returns:
        The adapter's settings; None if there is no adapter.

    Raises:
        CheckpointError: If there is more than one, a factor or a base weight is missing, or ranks are not the
            settings'.
    """
    found, _ = _factors(refs, file=file)
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(f"{file}: must hold one adapter but holds {', '.join(sorted(found))}")
    ((name, factors),) = found.items()
    layers = {_layer_path(stem): pair for stem, pair in factors.items()}
    _check_ranks(layers, lora_config(values, file=file, name=name), file=file)
    bases = {stem[: -len(".base_layer.weight")] for stem in refs if stem.endswith(".base_layer.weight")}
    for stem in sorted(bases ^ factors.keys()):
        what = "the adapter" if stem in bases else "the tensor '.base_layer.weight'"
        raise CheckpointError(f"{file}: {what} of {stem!r} is missing")
    ends = sorted({path.rpartition(".")[2] for path in layers})
    # One layer may lack what its neighbours have: then every path is spelled out.
    rooted = any(_PEFT_ROOT in stem for stem in factors)
    matrices = [stem for stem in _matrices(refs) if stem.rpartition(".")[2] in ends and (_PEFT_ROOT in stem) == rooted]
    targets = ends if layers.keys() == {_layer_path(stem) for stem in matrices} else sorted(layers)
    return lora_config({**values, "target_modules": targets}, file=file, name=name)


def merged_tensors(refs: Mapping[str, TensorRef], values: Mapping[str, Any], *, file: str) -> dict[str, TensorRef]:
    """Return a checkpoint's tensors with its adapter merged: no factors, and the base weights' plain names.

    Nothing is computed before a tensor's blocks are read.

    Args:
        refs: The checkpoint's tensors.
        values: Its LoRA settings under PEFT's keys.
        file: The checkpoint, for messages.

    Raises:
        CheckpointError: As `checkpoint_adapter`, or if the base weights are quantised.
    """
    config = checkpoint_adapter(refs, values, file=file)
    if config is None:
        return dict(refs)
    found, others = _factors(refs, file=file)
    factors = found[config.name]
    merged: dict[str, TensorRef] = {}
    for name in others:
        stem = name.removesuffix(".base_layer.weight")
        if stem in factors:
            merged[f"{stem}.weight"] = MergedTensor.join(refs[name], *factors[stem], config.scale_of(_layer_path(stem)))
        else:
            merged[name.replace(".base_layer.", ".")] = refs[name]
    return merged


@dataclass(frozen=True, eq=False)
class MergedTensor(TensorRef):
    """A weight W (R, C) that gives ``W + scale * B @ A`` when it is read, in float32.

    Rounding is left to whoever writes it: `dtype` is that of W.

    Args:
        a: A (r, C).
        b: B (R, r).
        scale: Factor of the product.
    """

    a: TensorRef | None = None
    b: TensorRef | None = None
    scale: float = 0.0

    @classmethod
    def join(cls, base: TensorRef, a: TensorRef, b: TensorRef, scale: float) -> MergedTensor:
        """Join a weight and its factors.

        Raises:
            CheckpointError: If shapes do not fit, or the weight is not floating point.
        """
        if base.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{base.file}: tensor {base.name!r} is {base.dtype}: an adapter cannot be merged into quantised "
                "weights; keep it apart"
            )
        if base.shape != (b.shape[0], a.shape[1]):
            shapes = f"{list(base.shape)}, A {list(a.shape)} and B {list(b.shape)}"
            raise CheckpointError(f"{base.file}: tensor {base.name!r} does not fit its adapter: {shapes}")
        values = {f.name: getattr(base, f.name) for f in fields(TensorRef)}
        return cls(**values, a=a, b=b, scale=scale)

    def read(self) -> mx.array:
        """Compute the whole tensor."""
        return mx.concatenate(list(self.blocks())).reshape(self.shape)

    def blocks(self, max_bytes: int = 1 << 22) -> Iterator[mx.array]:
        """Yield the elements in row-major order as flat float32 arrays of about `max_bytes` each."""
        if self.a is None or self.b is None:
            raise ValueError("[MergedTensor] a and b are needed but got none")
        rows, columns = self.shape
        a, b = (ref.read().astype(mx.float32, stream=mx.cpu) for ref in (self.a, self.b))
        step = max(1, max_bytes // (4 * columns))
        view = self._view()
        for first in range(0, rows, step):
            block = self._to_mlx(np.ascontiguousarray(view[first : first + step])).astype(mx.float32, stream=mx.cpu)
            product = mx.matmul(b[first : first + step], a, stream=mx.cpu)
            yield mx.add(block, self.scale * product, stream=mx.cpu).reshape(-1)
            self._release()


def _factors(refs: Mapping[str, TensorRef], *, file: str) -> tuple[dict[str, Factors], list[str]]:
    """Pair the factors: adapter name -> what stands before ``.lora_A`` -> A and B; and the names of other tensors."""
    halves: dict[str, dict[str, dict[str, TensorRef]]] = {}
    others = []
    for name, ref in refs.items():
        match = _NAME.fullmatch(name)
        if match is None:
            if ".lora_" in name:
                raise CheckpointError(f"{file}: tensor {name!r} is no part of plain LoRA")
            others.append(name)
            continue
        if ref.dtype not in FLOAT_DTYPES or len(ref.shape) != 2:
            raise CheckpointError(
                f"{file}: tensor {name!r} must be a floating-point matrix, not {ref.dtype} {ref.shape}"
            )
        adapter = halves.setdefault(match["name"] or DEFAULT_NAME, {})
        adapter.setdefault(match["stem"], {})[match["letter"]] = ref
    for adapter in halves.values():
        for stem, pair in adapter.items():
            if len(pair) != 2:
                raise CheckpointError(f"{file}: {stem!r} has lora_{next(iter(pair))} only")
    return {n: {s: (p["A"], p["B"]) for s, p in adapter.items()} for n, adapter in halves.items()}, others


def _check_ranks(factors: Mapping[str, tuple[TensorRef, TensorRef]], config: LoraConfig, *, file: str) -> None:
    for path, (a, b) in factors.items():
        if (a.shape[0], b.shape[1]) != (config.rank_of(path),) * 2:
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise CheckpointError(
                f"{file}: the settings give {path!r} rank {config.rank_of(path)}, but its factors are {shapes}"
            )


def _layer_path(stem: str) -> str:
    """Return the path within the language model: what follows PEFT's root."""
    return stem.rpartition(_PEFT_ROOT)[2]


def _matrices(refs: Mapping[str, TensorRef]) -> Iterator[str]:
    for name, ref in refs.items():
        if name.endswith(".weight") and len(ref.shape) == 2 and _NAME.fullmatch(name) is None:
            yield name.removesuffix(".weight").removesuffix(".base_layer")
