"""Weights laid out by columns, where a CPU multiplies a single row by them faster so.

A BLAS without a routine of its own for one row copies the matrix into packed panels first. From rows of weights, as
checkpoints have them, it gathers; from columns it copies straight on. (OpenBLAS 0.3.21 on an AVX2 machine, from main
memory, one thread: 4.7 GB/s by rows, 8 GB/s by columns.) The panels are the same, so the results are, bit for bit.
Shapes: R rows, C columns.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

# Columns that are written side by side: enough for whole cache lines, few enough for the source's to stay in cache.
_BLOCK = 512


def lay_out_by_columns(model: nn.Module, *, widening: bool = False) -> list[str]:
    """Turn dense float32 matrices of linear layers and embeddings around in memory; shapes and values stay.

    Each becomes a view (R, C) of an array (C, R), so that the layers' own ``x @ weight.T`` finds rows of that. It is
    done at the first use, one matrix after another, and takes as long as some ten steps of decoding.

    Args:
        model: Any module tree, filled.
        widening: Only those with more rows than columns. NumPy's OpenBLAS has a routine for one row, which reads the
            others as checkpoints have them a third faster than by columns, and wide ones some per cent slower.

    Returns:
        Paths of the modules.
    """
    turned = []
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.dtype == mx.float32:
            rows, columns = module.weight.shape
            if rows > columns or not widening:
                module.weight = by_columns(module.weight)
                turned.append(path)
    return sorted(turned)


def by_columns(weight: mx.array) -> mx.array:
    """Return a matrix (R, C) as a view of one whose rows are its columns."""
    rows, columns = weight.shape
    turned = mx.zeros((columns, rows), dtype=weight.dtype)
    for first in range(0, rows, _BLOCK):
        turned[:, first : first + _BLOCK] = weight[first : first + _BLOCK].T
    return turned.T
