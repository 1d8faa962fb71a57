"""A draft, whatever it holds, changes the number of passes and nothing else."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr import speculate
from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.pass_costs import PassCost, Stakes
from qwen4b_asr.quantization import Quantization, Scheme, quantize_modules
from qwen4b_asr.sampling import Sampler, SamplingOptions, best_two
from qwen4b_asr.speculate import DraftedGeneration
from tests.helpers.doctored import Doctored
from tests.helpers.tiny import randomise, rows

VOCABULARY = 40
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


@lru_cache(maxsize=32)
def decoder(seed: int, kind: str) -> Qwen3:
    """Return a random decoder; shared, so do not change it."""
    if kind != "dense":
        config = dataclasses.replace(CONFIG, tie_word_embeddings=seed % 2 == 0)
        model = randomise(Qwen3(config), seed)
        quantize_modules(model, Quantization(Scheme(32, int(kind[1:]))))
        return model
    return randomise(Qwen3(CONFIG), seed, scale=(0.1, 0.3, 0.5)[seed % 3])


@st.composite
def edits(draw: st.DrawFn, tokens: list[int]) -> list[int]:
    """A draft made from the truth by leaving out, replacing and adding tokens."""
    anything = st.integers(0, VOCABULARY - 1)
    every = draw(st.sampled_from([1, 3, 8, 20, 1000]))
    drafted: list[int] = []
    for token in tokens:
        kind = draw(st.sampled_from(["other", "none", "more"])) if draw(st.integers(1, every)) == every else "same"
        drafted += {"same": [token], "other": [draw(anything)], "none": [], "more": [token, draw(anything)]}[kind]
    return drafted + draw(st.lists(anything, max_size=4))


@st.composite
def stakes(draw: st.DrawFn) -> Stakes | None:
    """Reckless ones, that draft whatever happens, and the careful ones of real use."""
    costs = draw(st.sampled_from([None, 0.0, 0.03, 0.3]))
    return None if costs is None else Stakes(PassCost(costs), draw(st.integers(1, 60)), draw(st.integers(1, 40)))


@st.composite
def options(draw: st.DrawFn) -> GenerationOptions:
    """All of greedy decoding's."""
    sampling = SamplingOptions(
        repetition_penalty=draw(st.sampled_from([1.0, 1.2, 3.0, 0.7])),
        no_repeat_ngram=draw(st.sampled_from([0, 1, 2, 4])),
    )
    stops = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))
    chunk = draw(st.sampled_from([1, 3, 512]))
    return GenerationOptions(draw(st.integers(1, 50)), tuple(stops), sampling, prefill_chunk=chunk)


@given(st.data(), st.integers(0, 11), st.sampled_from(["dense", "q8", "q4"]), options(), stakes())
def test_tokens_equal_those_of_plain_decoding(data: Any, seed: int, kind: str, chosen: Any, given_stakes: Any) -> None:
    model, prompt = decoder(seed, kind), rows(1 + seed, CONFIG.hidden_size, seed)
    plain = Generation(model, prompt, chosen)
    wanted = list(plain)
    draft = data.draw(edits(wanted))
    drafted = DraftedGeneration(model, prompt, chosen, draft, stakes=given_stakes)
    assert list(drafted) == drafted.tokens == wanted
    assert drafted.finish_reason == plain.finish_reason
    assert 0 <= drafted.accepted <= min(drafted.drafted, len(wanted))
    assert plain.decoder_passes == len(wanted)
    assert drafted.decoder_passes >= len(wanted) - drafted.accepted


@given(st.data(), st.integers(0, 11), st.sampled_from([0.05, 0.2, 0.5]), options(), stakes())
def test_what_rounding_may_change_is_decided_by_plain_decoding(
    data: Any, seed: int, step: float, chosen: Any, given_stakes: Any
) -> None:
    """Ties everywhere, errors just below those that the margin is meant for, and drafts that fell for them."""
    prompt = rows(1 + seed, CONFIG.hidden_size, seed)
    model: Any = Doctored(decoder(seed, "dense"), len(prompt), step=step, noise=1e-5)
    plain = Generation(model, prompt, chosen)
    wanted = list(plain)
    wrong: Any = Doctored(decoder(seed, "dense"), len(prompt), step=step, noise=1e-5, always=True)
    source = data.draw(st.sampled_from([wanted, list(Generation(wrong, prompt, chosen))]))
    drafted = DraftedGeneration(model, prompt, chosen, data.draw(edits(source)), stakes=given_stakes)
    assert list(drafted) == wanted
    assert drafted.finish_reason == plain.finish_reason
    assert model.most_held <= len(prompt) + chosen.max_tokens


@pytest.mark.parametrize("seed", range(4))
def test_a_perfect_draft_saves_nearly_all_passes(seed: int) -> None:
    model, prompt = decoder(seed, "dense"), rows(5, CONFIG.hidden_size, seed)
    chosen = GenerationOptions(48, (), SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=4))
    wanted = list(Generation(model, prompt, chosen))
    drafted = DraftedGeneration(model, prompt, chosen, wanted, stakes=Stakes(PassCost(0.03), 48, longest=31))
    assert list(drafted) == wanted
    assert drafted.decoder_passes <= 4
    assert drafted.accepted == drafted.drafted >= 44


@pytest.mark.parametrize(
    ("prompt_rows", "drafted", "budget", "steps"),
    [(20, 10, 40, 13), (20, 30, 2, 4), (40, 2, 24, 4), (1, 10, 48, 11)],  # the prompt costs as 1 + 20 / 10 steps
)
def test_the_prompt_counts_for_the_stake_as_far_as_the_steps_do(
    monkeypatch: pytest.MonkeyPatch, prompt_rows: int, drafted: int, budget: int, steps: int
) -> None:
    monkeypatch.setattr(speculate, "pass_cost", lambda decoder: PassCost(0.1, free=0, run=0.0))
    prompt = rows(prompt_rows, CONFIG.hidden_size, 0)
    generation = DraftedGeneration(decoder(0, "dense"), prompt, GenerationOptions(budget, ()), [5] * drafted)
    assert generation._stakes.tokens == steps


def test_a_draft_may_end_in_stop_tokens_or_hold_them() -> None:
    model, prompt = decoder(1, "dense"), rows(5, CONFIG.hidden_size, 1)
    truth = list(Generation(model, prompt, GenerationOptions(20, (), SamplingOptions(no_repeat_ngram=1))))
    chosen = GenerationOptions(30, (truth[12], 3), SamplingOptions(no_repeat_ngram=1))
    stop = next(i for i, token in enumerate(truth) if token in (truth[12], 3))
    for draft in (truth, [*truth[:stop], 3, 3], [3, *truth]):
        drafted = DraftedGeneration(model, prompt, chosen, draft, stakes=Stakes(PassCost(0.0), 30))
        assert list(drafted) == truth[:stop]
        assert drafted.finish_reason == "stop"
        assert drafted.decoder_passes < stop
        assert drafted.accepted < stop  # the first token was no pass's, and the stop is no part of the text


def test_misuse_is_refused() -> None:
    model, prompt = decoder(0, "dense"), rows(5, CONFIG.hidden_size, 0)
    with pytest.raises(ValueError, match=r"temperature must be 0 with a draft but got 0\.5"):
        DraftedGeneration(model, prompt, GenerationOptions(4, (1,), SamplingOptions(temperature=0.5)), [1])
    with pytest.raises(ValueError, match="kv_bits must be None with a draft but got 8"):
        DraftedGeneration(model, prompt, GenerationOptions(4, (1,), kv_bits=8), [1])
    for wrong in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=r"draft ids must lie in 0\.\.39"):
            DraftedGeneration(model, prompt, GenerationOptions(4, (1,)), [1, wrong])
    with pytest.raises(ValueError, match="must fit into 64 positions"):
        DraftedGeneration(model, prompt, GenerationOptions(60, (1,)), [1])


@given(st.data(), st.sampled_from([1.0, 1.3, 0.6]), st.integers(0, 4), st.integers(0, 100))
def test_a_run_is_processed_as_if_its_tokens_had_come_one_by_one(
    data: Any, penalty: float, ngram: int, seed: int
) -> None:
    few = st.integers(0, 3)
    generated = data.draw(st.lists(few, max_size=12))
    run = data.draw(st.lists(few, max_size=8))
    logits = rows(len(run) + 1, 6, seed)
    kept = mx.array(logits)
    sampler = Sampler(SamplingOptions(repetition_penalty=penalty, no_repeat_ngram=ngram))
    one_by_one = mx.stack([sampler.process(row, generated + run[:i]) for i, row in enumerate(logits)])
    assert mx.array_equal(sampler.process_run(logits, generated, run), one_by_one)
    assert mx.array_equal(logits, kept)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_lead_is_over_the_second_best(table: list[list[int]]) -> None:
    ids, leads = best_two(mx.array(table, dtype=mx.float32))
    for row, token, lead in zip(table, ids.tolist(), leads.tolist(), strict=True):
        best, second = sorted(row, reverse=True)[:2]
        assert token == row.index(best)
        assert lead == best - second


def test_no_lead_is_certain_where_nothing_is_left() -> None:
    scores = mx.array([[-mx.inf, -mx.inf], [1.0, -mx.inf], [mx.nan, 1.0]])
    assert (best_two(scores)[1] > 0).tolist() == [False, True, False]
