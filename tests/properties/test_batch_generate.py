"""Many utterances at once: the very tokens of single runs, whatever shares the batch with them."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.batch_cache import BatchCache
from qwen4b_asr.batch_generate import BatchGeneration
from qwen4b_asr.batch_sampling import greedy_rows
from qwen4b_asr.cpu.choices import choose_rows
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.prefix import PrefixCache
from qwen4b_asr.sampling import NEAR, Sampler, SamplingOptions
from tests.helpers.tiny import CONFIG, rows, tiny_model

WIDTH = CONFIG.decoder.hidden_size
VOCABULARY = CONFIG.decoder.vocab_size
LAYERS = CONFIG.decoder.num_hidden_layers

# Tokens that a tiny model says often, so that stopping does happen.
stops = st.lists(st.integers(0, VOCABULARY - 1), max_size=80).map(tuple)
samplings = st.builds(
    SamplingOptions, repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]), no_repeat_ngram=st.sampled_from([0, 1, 2, 4])
)
generations = st.builds(GenerationOptions, st.integers(1, 14), stops, samplings, st.sampled_from([3, 16, 512]))


@st.composite
def prompts(draw: st.DrawFn, most: int = 9) -> list[tuple[mx.array, GenerationOptions]]:
    """Prompts of any lengths with options of their own."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=most))
    seed = draw(st.integers(0, 999))
    return [(rows(length, WIDTH, seed + i), draw(generations)) for i, length in enumerate(lengths)]


def alone(prompt: tuple[mx.array, GenerationOptions]) -> tuple[list[int], str | None]:
    generation = Generation(tiny_model().decoder, *prompt)
    return list(generation), generation.finish_reason


@given(prompts(), st.integers(1, 5))
def test_every_row_gets_the_tokens_of_its_single_run(asked, batch_size):
    batch = BatchGeneration(tiny_model().decoder, asked, batch_size)
    found = {row.number: (row.tokens, row.finish_reason) for row in batch}
    assert found == {i: alone(prompt) for i, prompt in enumerate(asked)}


@given(prompts(), st.integers(1, 5), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
def test_a_text_that_all_begin_with_is_computed_once(asked, batch_size, ids):
    decoder = tiny_model().decoder
    begun = decoder.embed(mx.array(ids))
    asked = [(mx.concatenate([begun, x]), options) for x, options in asked]
    prefixes = PrefixCache(decoder)
    batch = BatchGeneration(decoder, asked, batch_size, prefix=ids, prefixes=prefixes)
    assert {row.number: row.tokens for row in batch} == {i: alone(prompt)[0] for i, prompt in enumerate(asked)}
    assert prefixes.get(ids) is not None


def test_a_prompt_that_is_no_longer_than_its_beginning_is_computed_whole():
    decoder, ids = tiny_model().decoder, [5, 6, 7]
    asked = [(decoder.embed(mx.array([*ids, *more])), GenerationOptions(5, ())) for more in ([], [8], [9, 10])]
    batch = BatchGeneration(decoder, asked, 3, prefix=ids, prefixes=PrefixCache(decoder))
    assert {row.number: row.tokens for row in batch} == {i: alone(prompt)[0] for i, prompt in enumerate(asked)}


@given(prompts(most=6), st.integers(1, 4), st.integers(0, 99))
def test_seeded_draws_are_those_of_the_single_run(asked, batch_size, seed):
    drawn = [
        (x, GenerationOptions(6, o.stop_token_ids, SamplingOptions(temperature=0.8, top_k=9, top_p=0.9, seed=seed + i)))
        for i, (x, o) in enumerate(asked)
    ]
    batch = BatchGeneration(tiny_model().decoder, drawn, batch_size)
    assert {row.number: row.tokens for row in batch} == {i: alone(prompt)[0] for i, prompt in enumerate(drawn)}


def test_prompts_are_taken_only_as_slots_become_free():
    taken = []

    def asked():
        for i in range(7):
            taken.append(i)
            yield rows(5, WIDTH, i), GenerationOptions(3, ())

    batch = iter(BatchGeneration(tiny_model().decoder, asked(), 2))
    next(batch)
    assert taken == [0, 1]
    assert len(list(batch)) == 6


def test_steps_are_shared():
    asked = [(rows(6, WIDTH, i), GenerationOptions(10, ())) for i in range(8)]
    batch = BatchGeneration(tiny_model().decoder, asked, 4)
    done = list(batch)
    assert batch.redone == 0
    assert batch.decoder_passes == 20
    assert all(row.prefill_seconds > 0 and row.decode_seconds > 0 and not row.alone for row in done)


def test_a_choice_that_rounding_may_have_made_is_made_alone(monkeypatch):
    asked = [(rows(4 + i, WIDTH, i), GenerationOptions(6, ())) for i in range(3)]
    monkeypatch.setattr("qwen4b_asr.batch_sampling.NEAR", 1e9)
    batch = BatchGeneration(tiny_model().decoder, asked, 2)
    done = list(batch)
    assert batch.redone == 3
    assert all(row.alone for row in done)
    assert {row.number: row.tokens for row in done} == {i: alone(prompt)[0] for i, prompt in enumerate(asked)}


def test_misuse_is_refused():
    decoder = tiny_model().decoder
    with pytest.raises(ValueError, match="batch_size must be at least 1 but got 0"):
        BatchGeneration(decoder, [], 0)
    with pytest.raises(ValueError, match="inputs_embeds must have shape"):
        list(BatchGeneration(decoder, [(rows(3, WIDTH)[:0], GenerationOptions(2, ()))]))
    with pytest.raises(ValueError, match="must fit into 4096 positions"):
        list(BatchGeneration(decoder, [(rows(3, WIDTH), GenerationOptions(5000, ()))]))
    with pytest.raises(ValueError, match="kv_bits must be None but got 8"):
        list(BatchGeneration(decoder, [(rows(3, WIDTH), GenerationOptions(2, (), kv_bits=8))]))
    assert list(BatchGeneration(decoder, [])) == []


# --- choosing --------------------------------------------------------------------------------------------------------


@st.composite
def choices(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], list[SamplingOptions]]:
    """Logits of few kinds of tokens, histories that repeat, options of each row."""
    batch, size = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    logits = (rng.standard_normal((batch, size)) * 4).astype(np.float32)
    histories = [draw(st.lists(st.integers(0, size - 1), max_size=12)) for _ in range(batch)]
    return logits, histories, [draw(samplings) for _ in range(batch)]


@given(choices())
def test_rows_choose_as_they_do_alone(drawn):
    logits, histories, options = drawn
    ids, near = greedy_rows(mx.array(logits), histories, options)
    for i, (history, option) in enumerate(zip(histories, options, strict=True)):
        scores = np.array(Sampler(option).process(mx.array(logits[i]), history))
        best, second = np.sort(scores)[::-1][:2]
        with np.errstate(invalid="ignore"):
            stretch = max(option.repetition_penalty, 1 / option.repetition_penalty)
            assert bool(near[i]) == (not best - second > NEAR * stretch * np.abs(logits[i]).max())
        assert int(ids[i]) == Sampler(option).choose(mx.array(logits[i]), history)
    assert choose_rows(mx.array(logits), histories, options) == (ids.tolist(), near.tolist())


@given(st.integers(0, 99), st.floats(-5e-6, 5e-6))
def test_equal_scores_are_near(seed, difference):
    logits = mx.random.normal((2, 9), key=mx.random.key(seed))
    top = mx.max(mx.abs(logits)) + 1
    logits[0, 3], logits[0, 7] = top, top * (1 + difference)
    logits[1, 3], logits[1, 7] = top, top * 1.01
    assert greedy_rows(logits, [[], []], [SamplingOptions()] * 2)[1].tolist() == [True, False]
    assert choose_rows(logits, [[], []], [SamplingOptions()] * 2)[1] == [True, False]


# --- the cache -------------------------------------------------------------------------------------------------------


@given(st.data())
def test_slots_hold_what_was_placed_into_them_whatever_is_done_to_the_others(data):
    """Place, step, release, keep, trim at random; a slot's row must always be its own keys in order."""
    step = data.draw(st.integers(1, 5))
    slots = data.draw(st.integers(1, 4))
    cache = BatchCache(LAYERS, [0] * slots, step)
    wanted: list[list[float] | None] = [None] * slots
    fresh = iter(range(1, 10_000))

    def keys_of(values: list[list[float]]) -> mx.array:
        return mx.array(values)[:, None, :, None] * mx.ones((1, 2, 1, 3))

    for _ in range(data.draw(st.integers(1, 20))):
        action = data.draw(st.sampled_from(["place", "place", "step", "step", "step", "release", "keep"]))
        free = [i for i, row in enumerate(wanted) if row is None]
        if action == "place" and free:
            slot, count, padding = free[0], data.draw(st.integers(1, 8)), data.draw(st.integers(0, 3))
            other = BatchCache(LAYERS, [0, padding], step)
            row = [float(next(fresh)) for _ in range(count)]
            for n, layer in enumerate(other.layers):
                layer.update(keys_of([[0.0] * (count + padding), [0.0] * padding + row]) + n, keys_of([[0.0]] * 2))
            other.advance(count + padding)
            cache.place(slot, other, 1)
            wanted[slot] = row
        elif action == "step" and cache.length:
            cache.trim()
            new = [[float(next(fresh))] for _ in wanted]
            offset = cache.layers[0].offset
            held = [len(row) if row is not None else None for row in wanted]
            places = [offset] * len(wanted) if isinstance(offset, int) else offset.tolist()
            assert all(n is None or n == place for n, place in zip(held, places, strict=True))
            mask = cache.mask(1)
            seen = [layer.update(keys_of(new) + n, keys_of(new)) for n, layer in enumerate(cache.layers)]
            cache.advance(1)
            for i, row in enumerate(wanted):
                if row is None:
                    continue
                row += new[i]
                real = np.ones(cache.length, bool) if mask is None else np.array(mask[i])
                for n, (keys, _) in enumerate(seen):
                    assert np.array(keys)[i, 0, real, 0].tolist() == [x + n for x in row]
        elif action == "release":
            slot = data.draw(st.integers(0, len(wanted) - 1))
            cache.release(slot)
            wanted[slot] = None
        elif action == "keep":
            kept = [i for i, row in enumerate(wanted) if row is not None]
            if kept:
                cache.keep(kept)
                wanted = [wanted[i] for i in kept]


@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 4))
def test_rows_behind_a_common_beginning_are_placed_whole(shared, padding, count):
    beginning = mx.arange(1.0, shared + 1)[None, None, :, None] * mx.ones((1, 2, 1, 3))
    source = BatchCache(LAYERS, padding, prefix=[(beginning, -beginning)] * LAYERS)
    columns = max(padding) + count
    index = mx.arange(columns) - mx.array(padding)[:, None]
    keys = mx.where(index < 0, -99.0, 100.0 + index)[:, None, :, None] * mx.ones((1, 2, 1, 3))
    mask = source.mask(columns)
    for layer in source.layers:
        places = layer.offset
        layer.update(keys, -keys)
    source.advance(columns)
    wanted = [[*range(1, shared + 1), *range(100, 100 + columns - n)] for n in padding]
    cache = BatchCache(LAYERS, [0] * len(padding))
    for row, n in enumerate(padding):
        # The first real row behind the padding is at the position behind the beginning.
        assert (places if isinstance(places, int) else int(places[row])) + n == shared
        real = np.ones(shared + columns, bool) if mask is None else np.array(mask[row])
        assert np.array(source.layers[0].keys)[row, 0, : shared + columns, 0][real].tolist() == wanted[row]
        cache.place(row, source, row)
    for row, values in enumerate(wanted):
        for layer in cache.layers:
            held = np.array(layer.keys)[row, 0, cache.starts[row] : cache.length, 0].tolist()
            assert held == values
            assert np.array(layer.values)[row, 0, cache.length - 1, 0] == -values[-1]


def test_columns_that_no_one_needs_are_dropped():
    """Slots are taken over again and again; the buffers must not grow with all that ever was."""
    asked = [(rows(4, WIDTH, i), GenerationOptions(5 + i % 3, ())) for i in range(60)]
    batch = BatchGeneration(tiny_model().decoder, asked, 3)
    most, found = 0, {}
    for row in batch:
        found[row.number] = row.tokens
        batch._cache._columns.step = 8
        most = max(most, batch._cache.length)
    assert batch.decoder_passes > 100
    assert most < 40
    assert found == {i: alone(prompt)[0] for i, prompt in enumerate(asked)}


def test_misuse_of_the_cache_is_refused():
    with pytest.raises(ValueError, match="starts must be columns"):
        BatchCache(1, [])
    with pytest.raises(ValueError, match="step must be at least 1"):
        BatchCache(1, [0], 0)
    with pytest.raises(ValueError, match="keys must be of 2 slots but got 1"):
        BatchCache(1, [0, 0]).layers[0].update(mx.zeros((1, 2, 1, 4)), mx.zeros((1, 2, 1, 4)))
