"""Quantising rows: MLX's own numbers, the same whatever the blocks, and never worse for scales of two bytes."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.quantization import Scheme
from qwen4b_asr.weights import quantize
from qwen4b_asr.weights.quantize import quantize_rows, quantized_tensors, whole_rows
from tests.helpers.tiny import rows

affine = st.builds(Scheme, st.sampled_from([32, 64, 128]), st.sampled_from([2, 3, 4, 5, 6, 8]))
schemes = affine | st.sampled_from([Scheme(32, 4, "mxfp4"), Scheme(32, 8, "mxfp8"), Scheme(16, 4, "nvfp4")])


def sizes(scheme):
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}


def values(count, columns, seed, offset=0.0):
    """Rows of unequal spread, some of them constant, which has no range."""
    matrix = rows(count, columns, seed) * mx.array(np.geomspace(1e-3, 10, count)[:, None].astype(np.float32)) + offset
    return mx.concatenate([matrix[:-1], mx.full((1, columns), 0.25)]) if count > 2 else matrix


def dense(parts, scheme):
    biases = parts["biases"].astype(mx.float32) if "biases" in parts else None
    scales = parts["scales"] if biases is None else parts["scales"].astype(mx.float32)
    return np.array(mx.dequantize(parts["weight"], scales, biases, **sizes(scheme)).astype(mx.float32))


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]) for n in a)


@given(schemes, st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_in_float32_every_number_is_mlxs(scheme, count, groups, seed):
    matrix = values(count, groups * max(32, scheme.group_size), seed)
    parts = quantize_rows(matrix, scheme)
    names = ("weight", "scales", "biases")
    wanted = dict(zip(names, mx.quantize(matrix, **sizes(scheme), stream=mx.cpu), strict=False))
    assert same(parts, wanted)


@given(affine, st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 3.0]), st.integers(0, 99))
def test_scales_of_two_bytes_are_mlxs_and_the_codes_the_nearest(scheme, count, groups, offset, seed):
    matrix = values(count, groups * scheme.group_size, seed, offset)
    parts = quantize_rows(matrix, scheme, mx.bfloat16)
    weight, scales, biases = mx.quantize(matrix, **sizes(scheme), stream=mx.cpu)
    rounded = {"weight": weight, "scales": scales.astype(mx.bfloat16), "biases": biases.astype(mx.bfloat16)}
    assert {n: (a.dtype, a.shape) for n, a in parts.items()} == {n: (a.dtype, a.shape) for n, a in rounded.items()}
    assert all(mx.array_equal(parts[name], rounded[name]) for name in ("scales", "biases"))
    # Of all that the scales can say, the nearest: element by element no code is nearer, MLX's least of all.
    wanted = np.array(matrix)
    error, before = (np.abs(dense(p, scheme).astype(np.float64) - wanted) for p in (parts, rounded))
    slack = 1e-6 * (1 + np.abs(wanted))
    assert np.all(error <= before + slack)
    step, start = (
        np.repeat(np.array(parts[name].astype(mx.float32)), scheme.group_size, axis=1) for name in ("scales", "biases")
    )
    codes = np.round((dense(parts, scheme) - start) / step)
    inside = (codes > 0) & (codes < 2**scheme.bits - 1)
    assert np.all(error[inside] <= (np.abs(step) / 2 + slack)[inside])


@given(st.data(), schemes, st.integers(1, 7), st.integers(1, 2), st.integers(0, 99))
def test_blocks_of_any_sizes_give_the_same_tensors_each_row_read_once(data, scheme, count, groups, seed):
    columns = groups * max(32, scheme.group_size)
    matrix = values(count, columns, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, matrix.size), max_size=5)))
    dtype = data.draw(st.sampled_from(["F32", "BF16"])) if scheme.mode == "affine" else "U8"
    reads = []

    def blocks():
        reads.append(1)
        return [matrix.reshape(-1)[a:b] for a, b in pairwise([0, *cuts, matrix.size])]

    whole = quantize_rows(matrix, scheme, {"F32": mx.float32, "BF16": mx.bfloat16, "U8": mx.uint8}[dtype])
    tensors = quantized_tensors("m", (count, columns), scheme, blocks, dtype, file="f")
    assert [t.name for t in tensors] == [f"m.{name}" for name in whole]
    order = data.draw(st.permutations(tensors)) if data.draw(st.booleans()) else tensors
    found = {t.name.removeprefix("m."): mx.concatenate(list(t.blocks())).reshape(t.shape) for t in order}
    assert same({name: found[name] for name in whole}, whole)
    if order == tensors:
        assert len(reads) == 1
    again = mx.concatenate(list(tensors[0].blocks())).reshape(tensors[0].shape)
    assert mx.array_equal(again, whole["weight"])


@given(st.integers(1, 6), st.integers(0, 12), st.lists(st.integers(0, 72), max_size=6))
def test_rows_are_made_whole(columns, count, cuts):
    flat = mx.arange(columns * count)
    edges = [0, *sorted(min(cut, flat.size) for cut in cuts), flat.size]
    blocks = [flat[a:b] for a, b in pairwise(edges)]
    made = list(whole_rows(blocks, columns))
    assert all(block.ndim == 2 and block.shape[1] == columns and block.size for block in made)
    assert [x for block in made for x in block.reshape(-1).tolist()] == list(range(flat.size))


def test_elements_that_fill_no_row_are_an_error():
    with pytest.raises(ValueError, match="must fill rows of 32 but got 8 left over"):
        list(whole_rows([mx.zeros(40)], 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", [Scheme(32, 4), Scheme(32, 8, "mxfp8")])
def test_what_is_not_finite_is_named(bad, scheme):
    matrix = mx.ones((3, 32))
    matrix[1, 7] = bad
    tensors = quantized_tensors("a.b", (3, 32), scheme, lambda: [matrix], "F32", file="the/file")
    with pytest.raises(CheckpointError, match=r"the/file: a\.b\.weight has values that are not finite"):
        list(tensors[0].blocks())


def test_no_more_rows_are_held_than_a_block_has(monkeypatch):
    taken = []
    original = quantize.quantize_rows
    monkeypatch.setattr(quantize, "quantize_rows", lambda m, *a: taken.append(m.shape[0]) or original(m, *a))
    blocks = [mx.ones(40 * 64) for _ in range(25)]
    (weight, *_) = quantized_tensors("m", (1000, 64), Scheme(64, 4), lambda: blocks, "BF16", file="f")
    for block in weight.blocks():
        assert block.size == 40 * 8
    assert taken == [40] * 25
