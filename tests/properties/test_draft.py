"""Where in a draft a text is, and how much of the draft is worth a try."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr import pass_costs
from qwen4b_asr.cpu.products import multiply_by_numpy
from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.draft import Drafter, Place
from qwen4b_asr.pass_costs import PassCost, Stakes, drafts_pay, pass_cost
from qwen4b_asr.pieces import PieceKind, PieceTable
from qwen4b_asr.quantization import Quantization, Scheme, unpack_for_many_rows
from qwen4b_asr.rich_decoding import RichDecoder

DRAFT = tuple(range(100, 140))


def after(text: list[int] | tuple[int, ...], draft: tuple[int, ...] = DRAFT) -> Place:
    """Return the place that a text has reached."""
    place = Place(draft)
    for token in text:
        place.push(token)
    return place


def test_a_place_follows_a_text_that_is_the_draft():
    for length in range(len(DRAFT) + 1):
        place = after(DRAFT[:length])
        assert place.position == length
        assert place.ahead(3) == DRAFT[length : length + 3]


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ((100, 101, 7), 3),  # one is another
        ((100, 101, 103), 4),  # one is left out
        ((100, 101, 104), 5),  # two are
        ((100, 101, 7, 102), 3),  # one is added
        ((100, 101, 7, 8, 102, 103), 4),  # two are
        ((7, 101), 2),
        ((101,), 2),
        ((7, 100), 1),
    ],
)
def test_a_place_survives_an_edit(text, position):
    assert after(text).position == position


def test_a_place_jumps_over_what_is_left_out_and_back():
    assert after([*DRAFT[:5], *DRAFT[34:38]]).position == 38
    assert after([*DRAFT[:5], *DRAFT[25:31]]).position == 31
    assert after([*DRAFT[:30], *DRAFT[3:12]]).position == 12


def test_a_place_in_a_repeated_phrase_is_the_one_that_follows():
    draft = (1, 2, 3, 4) * 6
    for length in range(1, len(draft) + 1):
        assert after(draft[:length], draft).position == length


def test_an_empty_draft_has_nothing_ahead():
    place = after([1, 2, 3], ())
    assert (place.position, place.ahead(5)) == (0, ())


@given(st.data())
def test_a_place_is_right_again_two_tokens_after_any_edit(data: Any) -> None:
    """Tokens that occur once; between edits, four that fit."""
    text: list[int] = []
    place, position, fits = Place(DRAFT), 0, 0
    while position < len(DRAFT):
        if fits >= 4 and data.draw(st.integers(0, 2)) == 0:
            kind = data.draw(st.sampled_from(["other", "more", "none", "two"]))
            text = [] if kind in ("none", "two") else [data.draw(st.integers(0, 50))]
            position += {"other": 1, "more": 0, "none": 1, "two": 2}[kind]
            fits = 0
        else:
            text, fits, position = [DRAFT[position]], fits + 1, position + 1
        for token in text:
            place.push(token)
        if fits >= 2:
            assert place.position == min(position, len(DRAFT))


# --- Stakes -------------------------------------------------------------------------------------------------------


@given(
    st.data(), st.sampled_from([0.01, 0.04, 0.2, 0.5, 0.95]), st.integers(1, 9), st.integers(0, 200), st.floats(0, 1)
)
def test_no_draft_wastes_more_than_its_stake(data: Any, cost: float, free: int, tokens: int, quality: float) -> None:
    dice = random.Random(data.draw(st.integers(0, 10_000)))
    stakes, done, spent = Stakes(PassCost(cost, free), tokens), 1, 0.0
    stakes.learn(dice.random() < quality)
    while done < 200:
        length = stakes.run_length(done, 40)
        assert 0 <= length <= stakes.longest
        right = 0
        while right < length and dice.random() < quality:
            right += 1
        for hit in [*[True] * right, length == right and dice.random() < quality]:
            stakes.learn(hit)
        stakes.pay(1 + length, right + 1)
        done, spent = done + right + 1, spent + stakes.cost.of(1 + length)
        assert spent <= (done - 1) + 0.015 * max(done, tokens) + (0.3 if quality else 0.0) + 1e-9
        assert stakes.debt == pytest.approx(spent - (done - 1))


def test_a_good_draft_is_taken_in_long_runs_and_a_bad_one_not_at_all():
    good, bad = Stakes(PassCost(0.03), 100), Stakes(PassCost(0.03), 100)
    for _ in range(40):
        good.learn(True)
        bad.learn(False)
    assert good.run_length(40, 1000) == good.longest
    assert good.run_length(40, 6) == 6
    assert bad.run_length(40, 1000) == 0


def test_nothing_is_staked_before_the_draft_was_right_once():
    stakes = Stakes(PassCost(0.0, run=0.0), 1000)
    stakes.learn(False)
    assert stakes.run_length(1, 100) == 0
    stakes.learn(True)
    assert stakes.run_length(2, 100) > 0


def test_rows_that_come_free_are_taken_and_those_that_do_not_are_paid():
    cost = PassCost(0.5, free=8, run=0.1)
    assert [cost.of(rows) for rows in (1, 2, 8, 9, 10)] == pytest.approx([1, 1.1, 1.1, 1.6, 2.1])
    stakes = Stakes(cost, 1000)
    stakes.learn(True)
    assert stakes.run_length(1, 100) == 7


def test_a_pair_is_staked_where_a_group_is_too_dear():
    cost = PassCost(0.1, free=8, run=1.4, group=8, pair=1.7)
    assert [cost.of(rows) for rows in (1, 2, 3, 8, 9)] == pytest.approx([1, 1.7, 2.4, 2.4, 3.2])
    stakes = Stakes(cost, 40)
    stakes.learn(True)
    for done, length in ((1, 1), (3, 1), (5, 7)):  # what pairs gain is staked on a group
        assert stakes.run_length(done, 100) == length
        stakes.pay(1 + length, 2)
        stakes.learn(True)
        stakes.learn(True)


def test_runs_are_shorter_where_rows_cost_more():
    lengths = []
    for cost in (0.01, 0.1, 0.3, 0.6):
        stakes = Stakes(PassCost(cost), 1000)
        stakes.learn(True)
        lengths.append(stakes.run_length(1, 1000))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 4 * lengths[-1]


def test_rows_cost_what_was_measured_for_the_kind_of_weights(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    dense = Qwen3(DecoderConfig(**sizes))
    assert pass_cost(dense).row < 0.1
    assert drafts_pay(dense)
    small = Qwen3(DecoderConfig(**sizes))
    small.set_dtype(mx.bfloat16)
    assert 0.1 < pass_cost(small).row < 0.5
    quantised = Qwen3(DecoderConfig(**sizes, quantization=Quantization(Scheme(32, 4))))
    assert pass_cost(quantised).row > 0.5
    half = Quantization(Scheme(32, 4), {"model.embed_tokens": None})
    assert (
        pass_cost(dense).row
        < pass_cost(Qwen3(DecoderConfig(**sizes, quantization=half))).row
        < pass_cost(quantised).row
    )
    assert not drafts_pay(quantised)
    quantised.eval()
    unpack_for_many_rows(quantised)
    multiply_by_numpy(quantised)
    assert 0.15 < pass_cost(quantised).row < 0.17  # its scales are float32
    assert drafts_pay(quantised)
    six = Qwen3(DecoderConfig(**sizes, quantization=Quantization(Scheme(32, 4), {"model.embed_tokens": Scheme(32, 6)})))
    unpack_for_many_rows(six)
    multiply_by_numpy(six)
    assert not drafts_pay(six)  # codes that lie across bytes are left to MLX
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert drafts_pay(quantised)
    assert {device for device, _ in pass_costs._COSTS} == {"cpu", "gpu", "numpy"}


# --- The CTC head's text ------------------------------------------------------------------------------------------


def logits_of(path: list[int], symbols: int) -> mx.array:
    """Scores whose best path is this one."""
    return mx.array([[5.0 if s == best else 0.0 for s in range(symbols)] for best in path])


def test_a_draft_is_the_text_without_its_tags():
    pieces = ("<blank>", "<|en|>", "\u2581hello", "\u2581world", "!")
    table = PieceTable(pieces, (PieceKind.CONTROL, *[PieceKind.NORMAL] * 4))
    asked: list[str] = []
    drafter = Drafter(RichDecoder(table, query_rows=1), lambda text: asked.append(text) or [7, 900, 8], vocabulary=900)
    assert drafter(logits_of([1, 2, 0, 3, 3, 4], 5)) == [7, 8]  # an id that the model does not know is left out
    assert asked == ["hello world!"]
    assert drafter(logits_of([1, 0, 0], 5)) == []
    assert asked == ["hello world!"]


def test_a_draft_spells_symbols_as_the_configuration_has_them():
    table = PieceTable(("", "\u2581one", "一"), (PieceKind.CONTROL, PieceKind.NORMAL, PieceKind.NORMAL))
    drafter = Drafter(RichDecoder(table, query_rows=0), lambda text: [len(text)], 100, ("", " one", "一"))
    assert drafter(logits_of([0, 1, 0, 1, 2], 3)) == [len(" one one一")]


# --- Asked for by a caller ----------------------------------------------------------------------------------------


def test_only_greedy_decoding_can_be_asked_for_a_draft():
    from qwen4b_asr.errors import PromptError
    from qwen4b_asr.transcript import TranscribeOptions

    with pytest.raises(PromptError, match="a draft is for greedy decoding"):
        TranscribeOptions(draft=True, temperature=0.5)
    with pytest.raises(PromptError, match="a draft needs keys and values as they are"):
        TranscribeOptions(draft=True, kv_bits=8)
    assert TranscribeOptions(temperature=0.5, kv_bits=8).draft == "auto"
    with pytest.raises(ValueError, match=r"draft must be True, False or 'auto' but got 'yes'"):
        TranscribeOptions(draft="yes")
