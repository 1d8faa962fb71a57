"""Weights laid out by columns, where a CPU multiplies a single row by them faster so.

A BLAS without a routine of its own for one row copies the matrix into packed panels first. From rows of weights, as
checkpoints have them, it gathers; from columns it copies straight on. (OpenBLAS 0.3.21 on an AVX2 machine, from main
memory, one thread: 4.7 GB/s by rows, 8 GB/s by columns.) The panels are the same, so the results are, bit for bit.
Shapes: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from ..joined import GROUPS, can_join
from .products import joins_exactly

# Columns that are written side by side: enough for whole cache lines, few enough for the source's to stay in cache.
_BLOCK = 512


def lay_out_by_columns(model: nn.Module) -> list[str]:
    """Turn dense float32 matrices of linear layers and embeddings around in memory; shapes and values stay.

    Each becomes a view (R, C) of an array (C, R), so that the layers' own ``x @ weight.T`` finds rows of that. It is
    done at the first use, one matrix after another, and takes as long as some ten steps of decoding.

    Args:
        model: Any module tree, filled.

    Returns:
        Paths of the modules.
    """
    dense = _dense(model)
    for module in dense.values():
        module.weight = by_columns(module.weight)
    return sorted(dense)


def lay_out_for_numpy(model: nn.Module) -> list[str]:
    """Do so where it helps NumPy's OpenBLAS, which has a routine for one row, and put side by side what reads one row.

    It reads matrices with fewer rows than columns a third faster as checkpoints have them. Queries, keys and values
    become views of one array, and so do the two halves of the MLP: `products.Projection` multiplies a row by all of
    it at once, a fifth faster than by one after another.

    Args:
        model: Any module tree, filled. Matrices that would not give a row the same bits side by side stay apart.

    Returns:
        Paths of the modules.
    """
    dense = _dense(model)
    turned = []
    for path, _ in model.named_modules():
        for members in GROUPS.values():
            paths = [f"{path}.{member}" if path else member for member in members]
            parts = [dense[one] for one in paths if one in dense]
            if len(parts) < len(members) or not can_join(parts) or any("bias" in part for part in parts):
                continue
            if not joins_exactly(parts[0].weight.shape[1], tuple(part.weight.shape[0] for part in parts), rows=1):
                continue
            for part, weight in zip(parts, side_by_side([part.weight for part in parts]), strict=True):
                part.weight = weight
            turned += paths
    for path, module in dense.items():
        rows, columns = module.weight.shape
        if path not in turned and rows > columns:
            module.weight = by_columns(module.weight)
            turned.append(path)
    return sorted(turned)


def by_columns(weight: mx.array) -> mx.array:
    """Return a matrix (R, C) as a view of one whose rows are its columns."""
    return side_by_side([weight])[0]


def side_by_side(weights: Sequence[mx.array]) -> list[mx.array]:
    """Return matrices (R, C) of one width as views of one array (C, R of all), whose rows are their columns."""
    ends = list(accumulate(weight.shape[0] for weight in weights))
    turned = mx.zeros((weights[0].shape[1], ends[-1]), dtype=weights[0].dtype)
    for weight, end in zip(weights, ends, strict=True):
        rows = weight.shape[0]
        for first in range(0, rows, _BLOCK):
            block = weight[first : first + _BLOCK]
            start = end - rows + first
            turned[:, start : start + block.shape[0]] = block.T
    return [turned[:, end - weight.shape[0] : end].T for weight, end in zip(weights, ends, strict=True)]


def _dense(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and embeddings with float32 weights by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.dtype == mx.float32
    }
