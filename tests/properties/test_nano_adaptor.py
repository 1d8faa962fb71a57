"""Fun-ASR-Nano's adaptor and CTC branch: padding is invisible, a batch equals its items, the rule for the rows."""

from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.nano_adaptor import NanoAdaptor, NanoAdaptorConfig, NanoCtc, NanoCtcConfig, rows_kept
from tests.helpers.nano_files import ADAPTOR, CTC
from tests.helpers.tiny import max_abs, ragged_lengths, randomise, rows

WIDTH = ADAPTOR.input_size
MODEL = randomise(NanoAdaptor(ADAPTOR), 3)
WHOLE = NanoAdaptor(replace(ADAPTOR, low_frame_rate=False))
WHOLE.update(MODEL.parameters())
BRANCH = randomise(NanoCtc(CTC), 4)


def halved(rows: int) -> int:
    """FunASR's own lines: two convolutions of stride 2 that do not exist, and a third halving."""
    for _ in range(2):
        rows = 1 + (rows - 3 + 2 * 1) // 2
    return (rows - 1) // 2 + 1


@given(st.integers(0, 100_000))
def test_rows_kept_is_funasrs_number(count):
    assert rows_kept(count) == halved(count)
    assert NanoAdaptorConfig().rows_kept(count) == halved(count)
    assert NanoAdaptorConfig(low_frame_rate=False).rows_kept(count) == count


def test_rows_kept_of_known_lengths():
    assert [rows_kept(n) for n in (0, 1, 8, 9, 103, 504)] == [0, 1, 1, 2, 13, 63]
    with pytest.raises(ValueError, match=r"\[rows_kept\] rows must not be negative but got -1"):
        rows_kept(-1)


def batch(lengths, seed, filler):
    """Items, padded with `filler` to one array, and their mask."""
    items = [rows(n, WIDTH, seed + i) for i, n in enumerate(lengths)]
    longest = max(lengths)
    padded = mx.stack([mx.pad(x, ((0, longest - len(x)), (0, 0)), constant_values=filler) for x in items])
    return items, padded, mx.arange(longest)[None] < mx.array(lengths)[:, None]


@given(ragged_lengths(), st.integers(0, 99), st.floats(-1e3, 1e3))
def test_a_batch_equals_its_items_whatever_the_padding(lengths, seed, filler):
    items, padded, mask = batch(lengths, seed, filler)
    audio, scores = WHOLE(padded, mask), BRANCH.ctc_logits(padded, mask)
    for i, (item, n) in enumerate(zip(items, lengths, strict=True)):
        alone, own = WHOLE(item[None])[0], BRANCH.ctc_logits(item[None])[0]
        assert max_abs(audio[i, :n] - alone) < 3e-5 * max(1.0, max_abs(alone))
        assert max_abs(scores[i, :n] - own) < 3e-5 * max(1.0, max_abs(own))


@given(ragged_lengths(), st.integers(0, 99))
def test_the_rows_kept_are_the_first_of_all_rows(lengths, seed):
    _, padded, mask = batch(lengths, seed, 0.0)
    kept, whole = MODEL(padded, mask), WHOLE(padded, mask)
    assert kept.shape[1] == rows_kept(max(lengths))
    assert mx.array_equal(kept, whole[:, : kept.shape[1]])


def test_the_rule_can_be_overridden_in_a_call():
    x = rows(17, WIDTH)[None]
    assert mx.array_equal(MODEL(x, low_frame_rate=False), WHOLE(x))
    assert mx.array_equal(WHOLE(x, low_frame_rate=True), MODEL(x))


@given(st.permutations(list(range(9))), st.integers(0, 99))
def test_rows_have_no_positions(order, seed):
    x = rows(9, WIDTH, seed)
    moved = WHOLE(x[mx.array(order)][None])[0]
    still = WHOLE(x[None])[0]
    assert max_abs(moved - still[mx.array(order)]) < 3e-5 * max(1.0, max_abs(still))


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\[NanoAdaptor\] audio states must be 32 wide but got 31"):
        MODEL(mx.zeros((1, 4, 31)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "transformer"}, "kind must be 'nano'"),
        ({"num_heads": 3}, "num_heads must divide output_size 1024 but got 3"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_layers": -1}, "num_layers must not be negative"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_bad_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NanoAdaptorConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "x"}, "kind must be 'nano'"),
        ({"vocab_size": 1}, "vocab_size must be at least 2"),
        ({"blank_id": 60515}, "blank_id must lie below 60515 but got 60515"),
        ({"transformer": NanoAdaptorConfig()}, "low_frame_rate must be False"),
    ],
)
def test_bad_branches_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NanoCtcConfig(**values)


def test_a_branch_is_what_its_file_says():
    assert NanoCtcConfig(**asdict(CTC)) == CTC
    assert NanoCtcConfig().blank_id == 60514
