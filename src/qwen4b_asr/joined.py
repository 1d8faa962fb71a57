"""Projections that read the same rows, joined into one product: fewer launches for each token.

Queries, keys and values come from one matrix whose rows are theirs one after another, and so do the two halves of the
MLP. An output depends on its own row of weights alone, so joined products give what separate ones give. Joined is
what is in memory; files and the names of their parameters stay as they are.
Shapes: B batch, S positions, C columns, R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Name of a joined projection -> the layers that it takes the place of, in the order of its rows."""

_FORM = ("group_size", "bits", "mode")


class JoinedLinear(nn.Module):
    """Linear layers of one input as one layer.

    Args:
        parts: Layers that `can_join`. Nothing is computed here: they may be yet to be read.

    Raises:
        ValueError: If they cannot be joined.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not can_join(parts):
            raise ValueError(f"[JoinedLinear] parts must be linear layers of one form and type but got {list(parts)}")
        self.layer = _like(parts[0])
        for name in parts[0]:
            self.layer[name] = None if parts[0][name] is None else mx.concatenate([part[name] for part in parts])
        rows = [part.weight.shape[0] for part in parts]
        self._spans = tuple((sum(rows[:i]), sum(rows[: i + 1])) for i in range(len(rows)))

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Map (B, S, C) to the outputs (B, S, R) of the parts."""
        if depends_on_width(self.layer):
            return [part(x) for part in self.split()]
        y = self.layer(x)
        return [y[..., first:last] for first, last in self._spans]

    def split(self) -> list[nn.Module]:
        """Return the parts, bit for bit; their arrays are views."""
        parts = []
        for first, last in self._spans:
            part = _like(self.layer)
            for name, array in self.layer.items():
                part[name] = None if array is None else array[first:last]
            parts.append(part)
        return parts


def can_join(parts: Sequence[nn.Module]) -> bool:
    """Whether layers are plain linear ones, dense or quantised, of one input width, type and form.

    Layers with adapters beside them are not.
    """
    return len({_signature(part) for part in parts}) == 1 and _signature(parts[0]) is not None


def depends_on_width(layer: nn.Module) -> bool:
    """Whether the bits of an output depend on how many others the same product computes.

    They do where a BLAS multiplies: it cuts a matrix into tiles and chooses for each a routine by the tile's size, and
    the routines add in different orders. (OpenBLAS 0.3.21 on an AVX2 machine does so from four rows of x on, BLIS 0.9
    from one.) MLX's own CPU routines, for other types and for codes, go output by output.
    """
    return type(layer) is nn.Linear and layer.weight.dtype == mx.float32 and mx.default_device().type == mx.cpu


def join_projections(model: nn.Module) -> list[str]:
    """Join what can be joined: q, k and v; gate and up.

    Dense float32 layers on the CPU are left apart: a launch costs nothing there, see also `depends_on_width`; those
    that NumPy multiplies are joined by where they lie (`cpu.columns.lay_out_for_numpy`). Nothing is computed before the
    first use, when each joined array takes the place of its parts in memory.

    Args:
        model: Any module tree, filled. Layers with adapters, and layers quantised each in a form of its own, are left
            apart.

    Returns:
        Paths of the joined projections.
    """
    joined = []
    for path, module in list(model.named_modules()):
        for name, members in GROUPS.items():
            parts = [module[member] for member in members if member in module]
            if len(parts) < len(members) or not can_join(parts) or depends_on_width(parts[0]):
                continue
            module[name] = JoinedLinear(parts)
            for member in members:
                del module[member]
            joined.append(f"{path}.{name}" if path else name)
    return sorted(joined)


def split_projections(model: nn.Module, paths: Collection[str] | None = None) -> list[str]:
    """Put separate layers back, bit for bit.

    Args:
        model: Any module tree.
        paths: Paths of the joined projections; all of them without.

    Returns:
        Paths of those that were joined.
    """
    found = []
    for path, module in list(model.named_modules()):
        for name, members in GROUPS.items():
            own = f"{path}.{name}" if path else name
            if name in module and isinstance(module[name], JoinedLinear) and (paths is None or own in paths):
                for member, part in zip(members, module[name].split(), strict=True):
                    module[member] = part
                del module[name]
                found.append(own)
    return sorted(found)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Split what is joined for the length of a ``with`` block, for changes to single layers; then join what can be."""
    was_joined = split_projections(model)
    try:
        yield
    finally:
        if was_joined:
            join_projections(model)


def _signature(layer: nn.Module) -> tuple[Any, ...] | None:
    """Return what layers must have in common to be joined; None if a layer is of no such kind."""
    if type(layer) not in (nn.Linear, nn.QuantizedLinear):
        return None
    arrays = tuple((name, None if a is None else (a.shape[1:], a.dtype)) for name, a in sorted(layer.items()))
    return type(layer), arrays, tuple(getattr(layer, name, None) for name in _FORM)


def _like(layer: nn.Module) -> nn.Module:
    """Return a layer of the same kind and form, to be filled."""
    if isinstance(layer, nn.QuantizedLinear):
        form = {name: getattr(layer, name) for name in _FORM}
        return nn.QuantizedLinear(128, 1, bias=False, **form)
    return nn.Linear(1, 1, bias=False)
