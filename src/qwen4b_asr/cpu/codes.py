"""A few rows times a quantised matrix: codes become numbers a block at a time, and are forgotten again.

An output is ``scale * (codes . x) + bias * sum(x)``, added up over groups: scales meet one number of each group only.
MLX's product of codes on a CPU goes code by code. On an AVX2 machine it takes 1.1 ns for each at 4 bits and 1.3 to 1.5
at 8, and as long again for every further row of x; this takes 0.6 and 0.35, and 2.3 times that for eight rows.
Shapes: N rows of x, C columns, R rows of the matrix, G groups of a row, K codes of a byte.
"""

from __future__ import annotations

import numpy as np

_Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_Words = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]

# Numbers of a block, few enough to stay in the cache; rows of x from which it pays to unpack the matrix.
_BLOCK, _FEW = 1 << 19, 32


def can_multiply_codes(bits: int, rows: int) -> bool:
    """Whether `multiply_codes` can take codes, whole ones in every byte, and pays for so many rows of x."""
    return 8 % bits == 0 and 0 < rows <= _FEW


def multiply_codes(x: _Numbers, weight: _Words, scales: _Numbers, biases: _Numbers, bits: int) -> _Numbers:
    """Return x times the transposed matrix that affine codes stand for, as ``mlx.core.quantized_matmul`` does.

    Args:
        x: (N, C).
        weight: Codes (R, C * bits / 32).
        scales: (R, G).
        biases: (R, G).
        bits: Of a code; `can_multiply_codes`.

    Returns:
        (N, R).
    """
    rows, groups = scales.shape
    count, columns = x.shape
    per_byte = 8 // bits
    codes = weight.view(np.uint8)
    # The numbers that meet the codes in each place of the bytes: K times (G, C / G / K, N).
    places = np.moveaxis(x.T.reshape(groups, -1, per_byte, count), 2, 0).copy()
    y: _Numbers = biases @ x.reshape(count, groups, -1).sum(axis=-1).T
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        block = codes[first : first + step]
        sums = np.zeros((groups, len(block), count), np.float32)
        for place, numbers in enumerate(places):
            own = block if per_byte == 1 else (block >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1)
            dense = own.astype(np.float32).reshape(len(block), groups, -1)
            sums += np.matmul(dense.transpose(1, 0, 2), numbers)
        y[first : first + step] += np.vecdot(sums.transpose(1, 2, 0), scales[first : first + step, None])
    return y.T
