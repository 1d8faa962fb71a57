"""Caches: room that is enough from the start, codes that stay close to the numbers, and beginnings used again."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.cache import KVCache, QuantizedKVCache
from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.lora import LoraConfig, add_lora, set_lora_strength
from qwen4b_asr.prefix import PrefixCache
from qwen4b_asr.sampling import SamplingOptions
from tests.helpers.tiny import CONFIG, max_abs, randomise, rows, tiny_model

WIDTH = CONFIG.decoder.hidden_size
SAMPLING = SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=3)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def fill(cache: KVCache, keys: mx.array, chunks: list[int]) -> tuple[mx.array, mx.array]:
    end = 0
    for size in chunks:
        k, v = cache.update(keys[:, :, end : end + size], -keys[:, :, end : end + size])
        end += size
    return k, v


def own_decoder(seed: int = 0) -> Qwen3:
    """A decoder that a test may change."""
    return randomise(Qwen3(CONFIG.decoder), seed)


@given(sizes, st.integers(1, 5), st.integers(0, 9))
def test_what_fits_into_the_capacity_is_never_moved(chunks, step, spare):
    keys = mx.random.normal((1, 2, sum(chunks), 4), key=mx.random.key(1))
    cache = KVCache(step, capacity=sum(chunks) + spare)
    end, rooms = 0, set()
    for size in chunks:
        cache.update(keys[:, :, end : end + size], keys[:, :, end : end + size])
        rooms.add(cache.state[0].shape[2])
        end += size
    assert len(rooms) == 1
    (room,) = rooms
    assert sum(chunks) + spare <= room < sum(chunks) + spare + step


@given(sizes, st.integers(1, 5), st.integers(0, 20))
def test_more_than_the_capacity_is_held_as_well(chunks, step, capacity):
    keys = mx.random.normal((1, 2, sum(chunks), 4), key=mx.random.key(1))
    k, v = fill(KVCache(step, capacity), keys, chunks)
    assert np.array_equal(np.array(k), np.array(keys))
    assert np.array_equal(np.array(v), -np.array(keys))


@given(sizes, st.integers(1, 5), st.sampled_from([32, 64, 128]), st.sampled_from([4, 8]), st.floats(0.01, 100))
def test_codes_are_within_half_a_step_and_the_same_for_any_chunks(chunks, step, width, bits, scale):
    keys = scale * mx.random.normal((1, 2, sum(chunks), width), key=mx.random.key(2))
    k, v = fill(QuantizedKVCache(bits, step), keys, chunks)
    whole, _ = fill(QuantizedKVCache(bits), keys, [sum(chunks)])
    assert np.array_equal(np.array(k), np.array(whole))
    assert np.array_equal(np.array(v), -np.array(k)) or max_abs(v + keys) <= max_abs(keys) / 2 ** (bits - 2)
    group = 64 if width % 64 == 0 else 32
    groups = np.array(keys).reshape(-1, group)
    # MLX puts zero and the larger end on codes, so that the other end may be cut by a step.
    allowed = 1.5 * (groups.max(1) - groups.min(1)) / (2**bits - 1) + 1e-6 * scale
    assert (np.abs(np.array(k).reshape(-1, group) - groups).max(1) <= allowed).all()


def test_quantised_and_trimmed_is_as_never_seen():
    keys = mx.random.normal((1, 2, 9, 64), key=mx.random.key(3))
    trimmed, clean = QuantizedKVCache(8, 4), QuantizedKVCache(8, 4)
    fill(trimmed, keys, [5, 3])
    trimmed.trim(3)
    fill(clean, keys, [5])
    last = keys[:, :, 8:]
    for mine, theirs in zip(trimmed.update(last, last), clean.update(last, last), strict=True):
        assert mine.shape == (1, 2, 6, 64)
        assert np.array_equal(np.array(mine), np.array(theirs))


def test_codes_take_little_memory():
    keys = mx.random.normal((1, 2, 256, 128))
    plain, quantised = KVCache(), QuantizedKVCache()
    fill(plain, keys, [256])
    fill(quantised, keys, [256])
    held = [sum(array.nbytes for array in cache.state) for cache in (plain, quantised)]
    assert held[1] < 0.32 * held[0]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="capacity must not be negative but got -1"):
        KVCache(capacity=-1)
    with pytest.raises(ValueError, match="bits must be 4 or 8 but got 3"):
        QuantizedKVCache(3)
    with pytest.raises(ValueError, match="head width must be a multiple of 32 but got 8"):
        QuantizedKVCache().update(mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)))
    with pytest.raises(ValueError, match="kv_bits must be 4, 8 or None but got 5"):
        GenerationOptions(1, (), kv_bits=5)
    with pytest.raises(ValueError, match="most must be at least 1 but got 0"):
        PrefixCache(own_decoder(), 0)


def test_a_generation_from_codes_writes_what_the_numbers_say():
    config = DecoderConfig(**CONFIG.decoder.__dict__ | {"head_dim": 32})
    decoder = randomise(Qwen3(config), 4)
    prompt = rows(9, WIDTH, 11)
    plain = Generation(decoder, prompt, GenerationOptions(1, ()))
    coded = Generation(decoder, prompt, GenerationOptions(1, (), kv_bits=8))
    numbers, codes = plain._empty_cache(), coded._empty_cache()
    wanted, found = plain._prefill(numbers), coded._prefill(codes)
    assert all(isinstance(layer, QuantizedKVCache) for layer in codes)
    assert max_abs(wanted - found) < 0.05 * max_abs(wanted)
    assert max_abs(wanted - found) > 0
    assert len(list(Generation(decoder, prompt, GenerationOptions(12, (), SAMPLING, kv_bits=8)))) == 12


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 9))
def test_a_known_beginning_changes_nothing(before, behind, chunk, seed):
    decoder = tiny_model().decoder
    ids = list(range(seed, seed + before))
    prefixes = PrefixCache(decoder)
    for number in range(3):
        prompt = mx.concatenate([decoder.embed(mx.array(ids)), rows(behind, WIDTH, seed + number)])
        options = GenerationOptions(8, (299,), SAMPLING, prefill_chunk=chunk)
        plain = Generation(decoder, prompt, options)
        helped = Generation(decoder, prompt, options, prefix=ids, prefixes=prefixes)
        wanted = plain._prefill(plain._empty_cache())
        assert max_abs(helped._prefill(helped._empty_cache()) - wanted) < 2e-4 * max(1.0, max_abs(wanted))
        assert list(helped) == list(plain)
    assert len(prefixes) == 1


def test_rows_of_a_known_beginning_are_not_computed_again(monkeypatch):
    decoder = own_decoder()
    seen = []
    original = Qwen3.hidden
    monkeypatch.setattr(Qwen3, "hidden", lambda self, x, *rest: (seen.append(x.shape[1]), original(self, x, *rest))[1])
    prefixes, ids = PrefixCache(decoder), [5, 6, 7]
    for _ in range(2):
        run = Generation(decoder, rows(9, WIDTH), GenerationOptions(1, ()), prefix=ids, prefixes=prefixes)
        run._prefill(run._empty_cache())
    assert seen == [3, 6, 6]


def test_codes_are_always_computed_from_the_whole_prompt():
    decoder = randomise(Qwen3(DecoderConfig(**CONFIG.decoder.__dict__ | {"head_dim": 32})), 4)
    prefixes, options = PrefixCache(decoder), GenerationOptions(6, (), SAMPLING, kv_bits=8)
    helped = Generation(decoder, rows(9, WIDTH), options, prefix=[5, 6, 7], prefixes=prefixes)
    assert list(helped) == list(Generation(decoder, rows(9, WIDTH), options))
    assert len(prefixes) == 0


def test_a_prompt_that_is_all_beginning_is_computed():
    decoder = own_decoder()
    prompt, options = decoder.embed(mx.array([5, 6, 7])), GenerationOptions(4, ())
    helped = Generation(decoder, prompt, options, prefix=[5, 6, 7], prefixes=PrefixCache(decoder))
    assert list(helped) == list(Generation(decoder, prompt, options))


def change_a_weight(decoder: Qwen3) -> None:
    decoder.model.layers[0].self_attn.k_proj.weight = decoder.model.layers[0].self_attn.k_proj.weight * 2


def change_a_strength(decoder: Qwen3) -> None:
    set_lora_strength(decoder, 0.5)


@pytest.mark.parametrize("change", [change_a_weight, change_a_strength])
def test_other_weights_forget_all(change):
    decoder = own_decoder()
    path = "model.layers.0.self_attn.v_proj"
    rank = LoraConfig(rank=2, alpha=4)
    add_lora(decoder, {path: (rows(2, WIDTH, 5), rows(16, 2, 6))}, rank)
    prompt, options = rows(9, WIDTH, 3), GenerationOptions(6, ())
    prefixes = PrefixCache(decoder)

    def helped() -> list[int]:
        return list(Generation(decoder, prompt, options, prefix=[5, 6, 7], prefixes=prefixes))

    helped()
    assert prefixes.get([5, 6, 7]) is not None
    change(decoder)
    assert prefixes.get([5, 6, 7]) is None
    assert helped() == list(Generation(decoder, prompt, options))


def test_the_text_used_longest_ago_goes_first():
    prefixes = PrefixCache(own_decoder(), most=2)
    for ids in ([1], [2]):
        prefixes.put(ids, [])
    assert prefixes.get([1]) == []
    prefixes.put([3], [])
    assert prefixes.get([2]) is None
    assert prefixes.get([1]) == prefixes.get([3]) == []
    assert len(prefixes) == 2
