"""The greedy choice on the device against the choice that sampling makes on the host."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.kernels import _loader, use
from qwen4b_asr.kernels.logits_argmax import CASES, logits_argmax, logits_argmax_kernel, logits_argmax_reference
from qwen4b_asr.sampling import GreedyChain, Sampler, SamplingOptions
from tests.helpers.tiny import CONFIG, rows, tiny_model

from .support import exact, on_the_host, random, seeds, verified

BLOCK = 2048  # ids of a threadgroup
vocabularies = st.sampled_from([1, 8, 31, 33, 257, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
penalties = st.sampled_from([1.0, 1.2, 0.5, 3.0])
# Element type and n-gram: each pair is another text to compile.
forms = st.sampled_from([*((mx.float32, n) for n in (0, 1, 2, 4)), (mx.float16, 2), (mx.bfloat16, 4)])
NAN, INFINITY = float("nan"), float("inf")


def definition(logits: mx.array, history: list[int], penalty: float, ngram: int) -> int:
    """The greedy choice of the host's sampler for logits (V,)."""
    return Sampler(SamplingOptions(repetition_penalty=penalty, no_repeat_ngram=ngram)).choose(logits, history)


def draw(rng: np.random.Generator, vocabulary: int, held: int, room: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Logits (1, V) with ties, and a history (1, room) of few kinds of tokens: the best, the ends, any."""
    logits = random(rng, (1, vocabulary), dtype, rng.choice([0.1, 1.0, 30.0]))
    if rng.random() < 0.5:
        logits = mx.round(logits)  # many ties, both zeros among them
    best = np.argsort(-exact(logits)[0], kind="stable")[:3]
    kinds = np.unique([*best, 0, vocabulary - 1, rng.integers(0, vocabulary)])
    history = rng.choice(kinds, (1, room))
    history[:, held:] = rng.integers(-9, vocabulary + 9, (1, room - held))
    return logits, mx.array(history).astype(mx.int32)


def lengths(*held: int) -> mx.array:
    """Lengths of histories, as the operation takes them."""
    return mx.array(held, dtype=mx.int32)


@given(seeds, forms, vocabularies, st.integers(0, 40), st.integers(0, 9), penalties)
def test_the_token_is_that_of_the_host(seed, form, vocabulary, held, spare, penalty):
    dtype, ngram = form
    room = max(8, held + spare)
    logits, history = draw(np.random.default_rng(seed), vocabulary, held, room, dtype)
    wanted = definition(logits[0], history[0, :held].tolist(), penalty, ngram)
    options = {"penalty": penalty, "ngram": ngram}
    assert logits_argmax_reference(logits, history, lengths(held), **options).tolist() == [wanted]
    with on_the_host():
        found = logits_argmax_kernel(logits, history, lengths(held), **options)
        assert found.dtype == mx.int32
        assert found.tolist() == [wanted]


@given(seeds, forms, vocabularies, st.lists(st.integers(0, 20), min_size=2, max_size=4), penalties)
def test_a_batch_equals_its_items(seed, form, vocabulary, held, penalty):
    dtype, ngram = form
    rng = np.random.default_rng(seed)
    logits, history = (
        mx.concatenate(x) for x in zip(*(draw(rng, vocabulary, n, 20, dtype) for n in held), strict=True)
    )
    wanted = [definition(logits[i], history[i, :n].tolist(), penalty, ngram) for i, n in enumerate(held)]
    options = {"penalty": penalty, "ngram": ngram}
    assert logits_argmax_reference(logits, history, lengths(*held), **options).tolist() == wanted
    with on_the_host():
        assert logits_argmax_kernel(logits, history, lengths(*held), **options).tolist() == wanted


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if "test" in case.roles], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_token(case, dtype):
    arguments = case.arguments(dtype)
    found = verified(lambda: logits_argmax_kernel(**arguments)).tolist()
    assert found == logits_argmax_reference(**arguments).tolist()
    length = arguments["length"].tolist()
    for i, held in enumerate(length):
        history = arguments["history"][i, :held].tolist()
        assert found[i] == definition(arguments["logits"][i], history, arguments["penalty"], arguments["ngram"])


@pytest.mark.parametrize("operation", [logits_argmax_kernel, logits_argmax_reference])
@pytest.mark.parametrize(
    ("logits", "history", "penalty", "ngram", "token"),
    [
        ([0.0, -0.0, 0.0], [], 1.0, 0, 0),
        ([-0.0, 0.0, -1.0], [], 1.0, 0, 0),
        ([-1.0, -0.0, 0.0], [1], 1.2, 0, 1),
        ([-INFINITY] * 3, [], 1.0, 0, 0),
        ([5.0, 5.0, 4.0], [0, 1, 2], 1.0, 1, 0),  # everything is banned
        ([-INFINITY, -3e38, -INFINITY], [1], 1.0, 0, 1),
        ([-INFINITY, -3e38, -INFINITY], [1], 2.0, 0, 0),  # overflows into a tie
        ([INFINITY, 3e38, INFINITY], [0], 2.0, 0, 0),
        ([1.0, NAN, 3.0], [], 1.0, 0, 1),
        ([1.0, NAN, INFINITY, -NAN], [1, 3], 1.2, 0, 1),
        ([1.0, -NAN, INFINITY], [], 1.0, 0, 1),
        ([1.0, NAN, 0.5], [1], 1.0, 1, 0),  # a ban is stronger than NaN
        ([2.0, 2.2, 0.0], [1, 1, 1], 1.2, 0, 0),  # punished once, not thrice: 1.83
        ([0.5, 0.45, 0.0], [0], 1.2, 0, 1),
        ([-1.0, -1.1, -9.0], [0], 1.2, 0, 1),
        ([9.0, 8.0, 7.0], [0, 1, 2, 0, 1], 1.0, 3, 0),
        ([9.0, 8.0, 9.5], [0, 1, 2, 0, 1], 1.0, 3, 0),  # 0 1 2 may not come again
        ([9.0, 8.0, 9.5], [0, 1, 2, 0, 1], 1.0, 4, 2),
        ([9.0, 8.0, 7.0], [2, 0, 0], 1.0, 2, 1),  # the last two tokens are an n-gram of the past, too
        ([9.0, 8.0, 9.5], [0, 1], 1.0, 3, 2),  # shorter than an n-gram
    ],
)
def test_edges(operation, logits, history, penalty, ngram, token):
    values = mx.array([logits])
    padded = mx.array([[*history, *[2] * (9 - len(history))]], dtype=mx.int32)
    assert definition(values[0], history, penalty, ngram) == token
    with on_the_host():
        assert operation(values, padded, lengths(len(history)), penalty=penalty, ngram=ngram).tolist() == [token]


@pytest.mark.parametrize("operation", [logits_argmax_kernel, logits_argmax_reference])
def test_ids_outside_the_vocabulary_and_behind_the_length_mean_nothing(operation):
    logits = mx.array([[5.0, 4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.9]])
    history = mx.array([[-1, 8, 2**30, -(2**30), 0, 7]], dtype=mx.int32)
    with on_the_host():
        assert operation(logits, history, lengths(4), penalty=9.0, ngram=1).tolist() == [0]
        assert operation(logits, history, lengths(5), penalty=9.0, ngram=1).tolist() == [7]


def test_a_whole_vocabulary():
    """Qwen3's 151,936 symbols, the best of them in the last block and on its very end."""
    rng = np.random.default_rng(1)
    logits = random(rng, (1, 151936), mx.bfloat16)
    logits[0, 151935] = 40.0
    logits[0, 70000] = 39.0
    with on_the_host():
        assert logits_argmax_kernel(logits, mx.zeros((1, 8), dtype=mx.int32), lengths(0)).tolist() == [151935]
        history = mx.array([[151935]], dtype=mx.int32)
        assert logits_argmax_kernel(logits, history, lengths(1), penalty=1.2).tolist() == [70000]


def follow(options: SamplingOptions, seed: int) -> None:
    """Let chain and sampler choose from the same logits, few kinds so that there is much to ban."""
    rng = np.random.default_rng(seed)
    chain, sampler, tokens = GreedyChain(options), Sampler(options), []
    for _ in range(12):
        logits = random(rng, (5,), mx.float32)
        tokens.append(sampler.choose(logits, tokens))
        assert chain.choose(logits).tolist() == tokens[-1:]


@given(seeds, penalties, st.sampled_from([0, 1, 2, 3]))
def test_a_chain_chooses_what_the_sampler_chooses(seed, penalty, ngram):
    follow(SamplingOptions(repetition_penalty=penalty, no_repeat_ngram=ngram), seed)


@settings(max_examples=5)
@given(seeds, penalties, st.sampled_from([0, 2, 3]))
def test_a_chain_by_the_kernel_chooses_the_same(seed, penalty, ngram):
    with on_the_host():
        follow(SamplingOptions(repetition_penalty=penalty, no_repeat_ngram=ngram), seed)


def test_a_chain_grows():
    options = SamplingOptions(repetition_penalty=1.5)
    with on_the_host():  # what it begins with is decided at the start; plain operations can read it too
        chain = GreedyChain(options)
    sampler, tokens = Sampler(options), []
    logits = 1 + mx.arange(300) / 3000  # punished, each one makes way for the next
    for _ in range(260):
        tokens.append(sampler.choose(logits, tokens))
        assert chain.choose(logits).tolist() == tokens[-1:]
    assert len(set(tokens)) == 260


def test_a_chain_is_for_greedy_decoding():
    with pytest.raises(ValueError, match=r"temperature must be 0 but got 0\.5"):
        GreedyChain(SamplingOptions(temperature=0.5))
    assert GreedyChain.pays(SamplingOptions())
    assert not GreedyChain.pays(SamplingOptions(temperature=0.5))


@pytest.mark.parametrize(("stop", "reason"), [(None, "length"), (5, "stop"), (8, "stop")])
def test_queued_steps_generate_what_single_steps_do(stop, reason):
    decoder, prompt = tiny_model().decoder, rows(9, CONFIG.decoder.hidden_size, 11)
    sampling = SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=3)
    wanted = list(Generation(decoder, prompt, GenerationOptions(9, (299,), sampling)))
    assert len(wanted) == 9
    stops = (299,) if stop is None else (wanted[stop],)
    end = 9 if stop is None else wanted.index(wanted[stop])
    with on_the_host(), use("logits_argmax"):
        generation = Generation(decoder, prompt, GenerationOptions(9, stops, sampling))
        assert list(generation) == wanted[:end]
    assert generation.finish_reason == reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logits": mx.zeros(4)}, r"\(B, V\)"),
        ({"logits": mx.zeros((1, 0))}, "not empty"),
        ({"history": mx.zeros((2, 3), dtype=mx.int32)}, r"history must be \(1, N\)"),
        ({"history": mx.zeros((1, 3))}, "int32"),
        ({"length": mx.array(1, dtype=mx.int32)}, r"length must be \(1,\)"),
        ({"length": mx.array([1.0])}, "int32"),
        ({"penalty": 0.0}, "penalty must be positive"),
        ({"penalty": NAN}, "penalty must be positive"),
        ({"ngram": -1}, "ngram not negative"),
    ],
)
def test_misuse_is_refused(changes, said):
    right = {"logits": mx.zeros((1, 4)), "history": mx.zeros((1, 3), dtype=mx.int32), "length": lengths(1)}
    assert logits_argmax(**right).tolist() == [0]
    with pytest.raises(ValueError, match=said):
        logits_argmax(**{**right, **changes})


def test_an_empty_history_is_no_input_for_a_kernel():
    def refuse(**_):
        raise AssertionError("a kernel was built")

    with _loader.override("metal", refuse):
        found = logits_argmax(
            mx.array([[1.0, 2.0]]), mx.zeros((1, 0), dtype=mx.int32), lengths(0), penalty=1.2, ngram=2
        )
    assert found.tolist() == [1]
