"""Low-rank adapters on linear layers: kept apart, merged, and unmerged to the exact weights of before.

An adapter adds ``scale * B(A(x))`` to a layer's output, with A (r, C) and B (R, r) for a weight (R, C); merged, the
weight is ``W + scale * B @ A``. The scale is alpha / r, or alpha / sqrt(r) where it is rank-stabilised.
Source of the maths: Hu et al., "LoRA" (arXiv 2106.09685), section 4; Kalajdzievski (arXiv 2312.03732) for the other
scale; the meaning of the settings: PEFT's ``tuners/lora``. Module attributes carry PEFT's names.
Shapes: B batch, S positions, C columns, R rows, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .joined import apart

DEFAULT_NAME = "default"
_SEARCH = r"(?:.*\.)?(?:{})"

Factors = Mapping[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class LoraConfig:
    """Sizes and scales of one adapter.

    Args:
        rank: Rank r of the layers that `rank_pattern` does not match.
        alpha: Numerator of the scale of the layers that `alpha_pattern` does not match.
        target_modules: Ends of the paths of the layers that have the adapter, cut at a dot: ``q_proj`` or
            ``layers.3.self_attn.q_proj``.
        rank_pattern: Regular expression of the end of a path -> rank; the first that matches counts.
        alpha_pattern: The same for alpha.
        rank_stabilised: Whether the scale is alpha / sqrt(r).
        name: The adapter's name.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    rank_stabilised: bool = False
    name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for what, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"[LoraConfig] the rank of {what!r} must be an integer of at least 1 but got {rank!r}")
        for what, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise ValueError(f"[LoraConfig] the alpha of {what!r} must be a finite number but got {alpha!r}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(_SEARCH.format(pattern))
            except re.error as error:
                raise ValueError(f"[LoraConfig] patterns must be regular expressions but got {pattern!r}") from error
        if not self.name or "." in self.name:
            raise ValueError(f"[LoraConfig] name must be text without a dot but got {self.name!r}")

    def targets(self, path: str) -> bool:
        """Return whether the layer at a path has the adapter."""
        return any(path == target or path.endswith(f".{target}") for target in self.target_modules)

    def rank_of(self, path: str) -> int:
        """Return the rank at a path."""
        return _first_match(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """Return the factor of ``B @ A`` at a path."""
        rank, alpha = self.rank_of(path), _first_match(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _first_match(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    # PEFT joins the pattern to a free beginning, so that "q_proj" means every layer of that name.
    return next((v for pattern, v in patterns.items() if re.fullmatch(_SEARCH.format(pattern), path)), otherwise)


class LoraLinear(nn.Module):
    """A linear layer, quantised or not, with low-rank adapters beside it.

    Args:
        base_layer: The layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A: dict[str, nn.Linear] = {}
        self.lora_B: dict[str, nn.Linear] = {}
        self._scales: dict[str, float] = {}
        self._strengths: dict[str, float] = {}
        # The layer of before a merge. In a tuple, since MLX looks for parameters in modules, dicts and lists.
        self._unmerged: tuple[nn.Module, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the adapters are part of the base layer's weight."""
        return bool(self._unmerged)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self.lora_A)

    def add(self, name: str, a: mx.array, b: mx.array, scale: float) -> None:
        """Put an adapter beside the layer, in place of another of that name.

        Args:
            name: Its name.
            a: Down projection (r, C), floating point.
            b: Up projection (R, r), floating point.
            scale: Factor of the product.

        Raises:
            ValueError: If shapes do not fit.
        """
        rows, columns = layer_shape(self.base_layer)
        if a.ndim != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
            raise ValueError(
                f"[LoraLinear] lora_A must be (r, {columns}) and lora_B ({rows}, r) but got {a.shape} and {b.shape}"
            )
        merged = self.unmerge()
        for factors, weight in ((self.lora_A, a), (self.lora_B, b)):
            factors[name] = nn.Linear(1, 1, bias=False)
            factors[name].weight = weight
        self._scales[name], self._strengths[name] = scale, 1.0
        if merged:
            self.merge()

    def remove(self, name: str) -> None:
        """Take an adapter away; what is merged stays merged with the others."""
        merged = self.unmerge()
        for held in (self.lora_A, self.lora_B, self._scales, self._strengths):
            held.pop(name)
        if merged and self.names:
            self.merge()

    def set_strength(self, name: str, strength: float) -> None:
        """Multiply an adapter's scale: 1 is as trained, 0 is without it."""
        merged = self.unmerge()
        self._strengths[name] = strength
        if merged:
            self.merge()

    def scale(self, name: str) -> float:
        """Return the factor of an adapter's product, its strength included."""
        return self._scales[name] * self._strengths[name]

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, S, C) to (B, S, R)."""
        y = self.base_layer(x)
        if self.merged:
            return y
        dtype = y.dtype
        for name, down in self.lora_A.items():
            if scale := self.scale(name):
                y = y + scale * self.lora_B[name](down(x.astype(down.weight.dtype)))
        return y.astype(dtype)

    def merged_weight(self) -> mx.array:
        """Return the weight (R, C) with the adapters in it, summed in float32 and rounded once."""
        layer = self._unmerged[0] if self._unmerged else self.base_layer
        weight, dtype = dense_weight(layer)
        for name, down in self.lora_A.items():
            weight = weight + self.scale(name) * _product(self.lora_B[name].weight, down.weight)
        return weight.astype(dtype)

    def merge(self) -> None:
        """Make the adapters part of the weight; a quantised layer becomes a dense one.

        The layer of before is kept, so this costs the memory of a second weight.
        """
        if self.merged:
            return
        weight, layer = self.merged_weight(), self.base_layer
        self._unmerged = (layer,)
        self.base_layer = nn.Linear(1, 1, bias="bias" in layer)
        self.base_layer.weight = weight
        if "bias" in layer:
            self.base_layer.bias = layer.bias

    def unmerge(self) -> bool:
        """Put back the layer of before the merge, bit for bit; return whether it was merged."""
        if not self._unmerged:
            return False
        (self.base_layer,) = self._unmerged
        self._unmerged = ()
        return True


def _product(b: mx.array, a: mx.array) -> mx.array:
    return b.astype(mx.float32) @ a.astype(mx.float32)


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return rows and columns of a linear layer's matrix, quantised or not."""
    rows, columns = layer.weight.shape
    return (rows, columns * 32 // layer.bits) if isinstance(layer, nn.QuantizedLinear) else (rows, columns)


def dense_weight(layer: nn.Module) -> tuple[mx.array, mx.Dtype]:
    """Return a linear layer's weight (R, C) in float32, and the type that a dense copy of it should have."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight.astype(mx.float32), layer.weight.dtype
    biases, dtype = layer.get("biases"), layer.scales.dtype
    if biases is None:  # scales of one byte say nothing about the model's type
        dtype = mx.bfloat16
    else:
        biases = biases.astype(mx.float32)
    scales = layer.scales if biases is None else layer.scales.astype(mx.float32)
    sizes = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, scales, biases, **sizes).astype(mx.float32), dtype


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers that have adapters, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def add_lora(model: nn.Module, factors: Factors, config: LoraConfig) -> None:
    """Put an adapter beside the layers of a model; all of it or, on an error, nothing.

    Projections that were joined are split, and those without an adapter joined again.

    Args:
        model: Any module tree with linear layers.
        factors: Path of a layer -> A (r, C) and B (R, r), in the types to compute in.
        config: Ranks, scales and the adapter's name.

    Raises:
        ValueError: Naming the layers that do not exist, are not linear, or have other sizes than the factors.
    """
    with apart(model):
        _add_lora(model, factors, config)


def _add_lora(model: nn.Module, factors: Factors, config: LoraConfig) -> None:
    problems = []
    wrapped: dict[str, LoraLinear] = {}
    modules = dict(model.named_modules())
    for path, (a, b) in factors.items():
        layer = modules.get(path)
        if not isinstance(layer, (nn.Linear, nn.QuantizedLinear, LoraLinear)):
            problems.append(f"{path} is {'no layer' if layer is None else type(layer).__name__} of this model")
            continue
        shape = layer_shape(layer.base_layer if isinstance(layer, LoraLinear) else layer)
        rank = config.rank_of(path)
        if (a.shape, b.shape) != ((rank, shape[1]), (shape[0], rank)):
            problems.append(f"{path} {list(shape)} at rank {rank} has A {list(a.shape)} and B {list(b.shape)}")
        wrapped[path] = layer if isinstance(layer, LoraLinear) else LoraLinear(layer)
    if not factors:
        problems.append("there are no factors")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"[add_lora] factors must fit the model's linear layers but got {'; '.join(problems[:6])}{more}"
        )
    for path, (a, b) in factors.items():
        wrapped[path].add(config.name, a, b, config.scale_of(path))
        _replace(model, path, wrapped[path])


def build_lora(model: nn.Module, config: LoraConfig) -> None:
    """Give a model that is yet to be filled the parameters of an adapter: zeros, so that it changes nothing.

    Raises:
        ValueError: If a target is not the end of any linear layer's path.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.QuantizedLinear))}
    factors = {}
    for path in filter(config.targets, layers):
        (rows, columns), rank = layer_shape(layers[path]), config.rank_of(path)
        factors[path] = mx.zeros((rank, columns)), mx.zeros((rows, rank))
    for target in config.target_modules:
        if not any(path == target or path.endswith(f".{target}") for path in layers):
            raise ValueError(f"[build_lora] target_modules must name linear layers but got {target!r}")
    add_lora(model, factors, config)


def merge_lora(model: nn.Module) -> None:
    """Make every adapter part of its layer's weight; see `LoraLinear.merge`."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Put back every layer of before the merge, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def fuse_lora(model: nn.Module) -> None:
    """Merge every adapter for good: plain linear layers remain, and nothing of before is kept."""
    for path, layer in lora_layers(model).items():
        layer.merge()
        _replace(model, path, layer.base_layer)


def remove_lora(model: nn.Module, name: str = DEFAULT_NAME) -> None:
    """Take an adapter away; layers that have no other become what they were.

    Raises:
        ValueError: If no layer has an adapter of that name.
    """
    for path, layer in _layers_with(model, name).items():
        layer.remove(name)
        if not layer.names:
            layer.unmerge()
            _replace(model, path, layer.base_layer)


def set_lora_strength(model: nn.Module, strength: float, name: str = DEFAULT_NAME) -> None:
    """Multiply an adapter's scale everywhere: 1 is as trained, 0 is without it.

    Raises:
        ValueError: If no layer has an adapter of that name.
    """
    for layer in _layers_with(model, name).values():
        layer.set_strength(name, strength)


def _layers_with(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    layers = lora_layers(model)
    found = {path: layer for path, layer in layers.items() if name in layer.names}
    if not found:
        known: Iterable[str] = sorted({n for layer in layers.values() for n in layer.names})
        raise ValueError(f"[lora] adapter must be one of {list(known)} but got {name!r}")
    return found


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer into a module tree; lists are indexed by the numbers in a path."""
    parent: Any = model
    *steps, last = path.split(".")
    for step in steps:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    parent[int(last) if isinstance(parent, list) else last] = layer
