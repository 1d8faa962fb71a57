"""The decoding loop: the same tokens as one pass over everything, and an honest reason for the end."""

import mlx.core as mx
import pytest

from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.sampling import Sampler, SamplingOptions
from tests.helpers.tiny import CONFIG, rows, tiny_model

DECODER = tiny_model().decoder
PROMPT = rows(9, CONFIG.decoder.hidden_size, 11)
SAMPLING = SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=3)


def slow_greedy(steps: int) -> list[int]:
    """Run the whole sequence anew for every token, without a cache."""
    tokens: list[int] = []
    for _ in range(steps):
        x = PROMPT if not tokens else mx.concatenate([PROMPT, DECODER.embed(mx.array(tokens))])
        tokens.append(Sampler(SAMPLING).choose(DECODER(x[None])[0, -1], tokens))
    return tokens


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_tokens_equal_those_without_a_cache(chunk):
    generation = Generation(DECODER, PROMPT, GenerationOptions(12, (299,), SAMPLING, prefill_chunk=chunk))
    assert list(generation) == slow_greedy(12)
    assert generation.tokens == slow_greedy(12)
    assert generation.finish_reason == "length"


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    wanted = slow_greedy(6)
    stop = wanted[4]
    generation = Generation(DECODER, PROMPT, GenerationOptions(12, (stop,), SAMPLING))
    assert list(generation) == wanted[: wanted.index(stop)]
    assert generation.finish_reason == "stop"


def test_a_stop_right_after_the_budget_is_a_stop():
    wanted = slow_greedy(6)
    generation = Generation(DECODER, PROMPT, GenerationOptions(wanted.index(wanted[5]), (wanted[5],), SAMPLING))
    list(generation)
    assert generation.finish_reason == "stop"


def test_tokens_come_as_they_are_made():
    generation = Generation(DECODER, PROMPT, GenerationOptions(5, (299,), SAMPLING))
    stream = iter(generation)
    assert next(stream) == slow_greedy(1)[0]
    assert generation.finish_reason is None
    assert len(generation.tokens) == 1


@pytest.mark.parametrize(("stop", "passes"), [(None, 12), (4, 4)])
def test_passes_are_those_that_tokens_needed(stop, passes):
    wanted = slow_greedy(12)
    stops = (299,) if stop is None else (wanted[stop],)
    generation = Generation(DECODER, PROMPT, GenerationOptions(12, stops, SAMPLING))
    list(generation)
    assert generation.decoder_passes == (passes if stop is None else wanted.index(wanted[stop]))


def test_nothing_is_computed_behind_a_stop_token(monkeypatch):
    wanted = slow_greedy(5)
    assert wanted.index(wanted[4]) == 4
    evaluated = []
    original = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (evaluated.append(1), original(*arrays)))
    list(Generation(DECODER, PROMPT, GenerationOptions(12, (wanted[4],), SAMPLING)))
    assert len(evaluated) == 5


def test_a_generation_runs_once():
    generation = Generation(DECODER, PROMPT, GenerationOptions(2, (299,)))
    list(generation)
    with pytest.raises(RuntimeError, match="once"):
        list(generation)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="inputs_embeds must have shape"):
        Generation(DECODER, PROMPT[:0], GenerationOptions(2, (299,)))
    with pytest.raises(ValueError, match=r"must fit into 4096 positions but got 9 \+ 4090"):
        Generation(DECODER, PROMPT, GenerationOptions(4090, (299,)))
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        GenerationOptions(0, (1,))
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1"):
        GenerationOptions(1, (1,), prefill_chunk=0)
