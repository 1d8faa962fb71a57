"""The decoder and its cache: chunks equal one pass, trimmed caches forget, padding in front is invisible."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.cache import KVCache
from qwen4b_asr.decoder import DecoderConfig, Qwen3, padded_causal_mask
from tests.helpers.tiny import CONFIG, chunkings, max_abs, ragged_lengths, randomise, rows, tiny_model

WIDTH = CONFIG.decoder.hidden_size
LAYERS = CONFIG.decoder.num_hidden_layers


def caches(step: int = 4) -> list[KVCache]:
    return [KVCache(step) for _ in range(LAYERS)]


def run(chunks: list[mx.array], cache: list[KVCache]) -> mx.array:
    return mx.concatenate([tiny_model().decoder(chunk[None], cache)[0] for chunk in chunks])


def cut(x: mx.array, sizes: list[int]) -> list[mx.array]:
    ends = np.cumsum(sizes)
    return [x[int(end) - size : int(end)] for end, size in zip(ends, sizes, strict=True)]


@given(chunkings(), st.integers(1, 7), st.integers(0, 99))
def test_any_chunks_equal_one_pass(sizes, step, seed):
    x = rows(sum(sizes), WIDTH, seed)
    whole = tiny_model().decoder(x[None])[0]
    assert max_abs(run(cut(x, sizes), caches(step)) - whole) < 2e-4 * max(1.0, max_abs(whole))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_a_trimmed_cache_never_saw_the_rest(kept, forgotten, appended, seed):
    x, junk, y = rows(kept, WIDTH, seed), rows(forgotten, WIDTH, seed + 1), rows(appended, WIDTH, seed + 2)
    trimmed, clean = caches(), caches()
    run([x, junk], trimmed)
    for layer in trimmed:
        layer.trim(forgotten)
    run([x], clean)
    assert np.array_equal(np.array(run([y], trimmed)), np.array(run([y], clean)))


@given(st.integers(1, 12), st.integers(1, 8), st.floats(-100, 100), st.integers(0, 99))
def test_padding_in_front_is_invisible(length, padding, junk, seed):
    decoder = tiny_model().decoder
    x = rows(length, WIDTH, seed)[None]
    padded = mx.concatenate([mx.full((1, padding, WIDTH), junk), x], axis=1)
    mask = mx.arange(length + padding)[None] >= padding
    logits = decoder(padded, mask=mask)
    assert bool(mx.all(mx.isfinite(logits)))
    assert max_abs(logits[:, padding:] - decoder(x)) < 2e-4 * max(1.0, max_abs(decoder(x)))


@given(ragged_lengths(most=12), chunkings(most=24), st.integers(0, 3), st.floats(-100, 100), st.integers(0, 99))
def test_a_padded_batch_with_a_cache_equals_single_runs(lengths, sizes, steps, junk, seed):
    """Prompts of any lengths, padded in front, in any chunks, then steps in which the mask grows."""
    decoder = tiny_model().decoder
    longest = max(lengths)
    singles = [rows(length + steps, WIDTH, seed + i) for i, length in enumerate(lengths)]
    padded = mx.stack(
        [mx.concatenate([mx.full((longest - n, WIDTH), junk), x]) for n, x in zip(lengths, singles, strict=True)]
    )
    total = longest + steps
    mask = mx.arange(total)[None] >= longest - mx.array(lengths)[:, None]
    ends = [end for end in np.cumsum(sizes).tolist() if end < longest] + list(range(longest, total + 1))
    cache, found = caches(), []
    for first, last in zip([0, *ends], ends, strict=False):
        found.append(decoder(padded[:, first:last], cache, mask[:, :last]))
    logits = mx.concatenate(found, axis=1)
    assert bool(mx.all(mx.isfinite(logits)))
    for i, (length, x) in enumerate(zip(lengths, singles, strict=True)):
        alone = decoder(x[None])[0]
        assert max_abs(logits[i, longest - length :] - alone) < 2e-4 * max(1.0, max_abs(alone))


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_the_padded_mask_of_a_chunk_is_the_end_of_the_whole_one(real, count):
    mask = mx.array([real])
    whole = np.array(padded_causal_mask(mask))
    assert np.array_equal(np.array(padded_causal_mask(mask, min(count, len(real)))), whole[:, :, -count:])


@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_no_row_of_the_padded_mask_is_empty(real):
    (((*rows_of_mask,),),) = np.array(padded_causal_mask(mx.array([real])))
    for i, row in enumerate(rows_of_mask):
        assert row.tolist() == [(j <= i and real[j]) or i == j for j in range(len(real))]


@given(st.integers(2, 12), st.integers(0, 99))
def test_the_future_is_invisible(length, seed):
    decoder = tiny_model().decoder
    x = rows(length, WIDTH, seed)
    changed = mx.concatenate([x[:-1], x[-1:] + 1])
    assert max_abs(decoder(x[None])[:, :-1] - decoder(changed[None])[:, :-1]) < 1e-5


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    tied = tiny_model().decoder
    hidden = rows(3, WIDTH)[None]
    assert max_abs(tied.logits(hidden) - hidden @ tied.model.embed_tokens.weight.T) < 1e-5
    sizes = {**CONFIG.decoder.__dict__, "tie_word_embeddings": False}
    untied = randomise(Qwen3(DecoderConfig(**sizes)), 1)
    assert max_abs(untied.logits(hidden) - hidden @ untied.lm_head.weight.T) < 1e-5
    assert "lm_head" not in tied.parameters()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_the_cache_returns_all_it_was_given(sizes, step):
    cache = KVCache(step)
    keys = mx.random.normal((1, 2, sum(sizes), 4))
    end = 0
    for size in sizes:
        k, v = cache.update(keys[:, :, end : end + size], -keys[:, :, end : end + size])
        end += size
    assert np.array_equal(np.array(k), np.array(keys))
    assert np.array_equal(np.array(v), -np.array(keys))
    assert cache.offset == end


def test_misuse_is_refused():
    decoder = tiny_model().decoder
    x = rows(3, WIDTH)[None]
    with pytest.raises(ValueError, match=r"mask must be \(1, held \+ 3\) but got \(1, 2\)"):
        decoder(x, caches(), mx.ones((1, 2), dtype=mx.bool_))
    with pytest.raises(ValueError, match=r"mask must be \(1, held \+ 3\) but got \(2, 3\)"):
        decoder(x, caches(), mx.ones((2, 3), dtype=mx.bool_))
    with pytest.raises(ValueError, match="2 layer caches are needed but got 1"):
        decoder(x, caches()[:1])
    cache = KVCache()
    cache.update(mx.zeros((1, 2, 3, 4)), mx.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"keys must fit \(1, 2, 4\)"):
        cache.update(mx.zeros((2, 2, 3, 4)), mx.zeros((2, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"count must lie in 0\.\.3 but got 4"):
        cache.trim(4)
    with pytest.raises(ValueError, match="step must be at least 1"):
        KVCache(0)


HUGGING_FACE = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "architectures": ["Qwen3ForCausalLM"],
}


def test_a_hugging_face_config_is_read():
    config = DecoderConfig.from_huggingface(HUGGING_FACE)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (4096, 36, False)
    moved = {k: v for k, v in HUGGING_FACE.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}
    }
    assert DecoderConfig.from_huggingface(moved).rope_theta == 5e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type must be 'qwen3'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_huggingface({**HUGGING_FACE, **change})


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        DecoderConfig.from_huggingface({k: v for k, v in HUGGING_FACE.items() if k != "hidden_size"})
