"""Defects planted in the decoder, in generation and between the stages."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen4b_asr import cache, decoder, generate, prompt, sampling

from . import checks
from .planting import Defects, Patch, attend, rewrite, unmasked
from .support import golden

DEFECTS = Defects()

DECODER = partial(checks.check_decoder_ids, "generation")


def exchanged_rope(patch: Patch, **changes: Any) -> None:
    """Call MLX's rotation with other settings."""
    original = mx.fast.rope
    patch.setattr(mx.fast, "rope", lambda *args, **kwargs: original(*args, **{**kwargs, **changes}))


@DEFECTS.noticed_by(DECODER)
def interleaved_rope(patch: Patch) -> None:
    exchanged_rope(patch, traditional=True)


@DEFECTS.noticed_by(DECODER)
def rope_base_of_10000(patch: Patch) -> None:
    exchanged_rope(patch, base=1e4)


@DEFECTS.noticed_by(partial(checks.check_decoder_steps, "generation"))
def positions_start_again_at_each_step(patch: Patch) -> None:
    exchanged_rope(patch, offset=0)


@DEFECTS.noticed_by(DECODER)
def no_norm_of_the_keys(patch: Patch) -> None:
    original = decoder.qk_norm_rope

    def rotated(q: mx.array, k: mx.array, q_weight: mx.array, k_weight: mx.array, **kwargs: Any) -> Any:
        queries, keys = original(q, k, q_weight, mx.ones_like(k_weight), **kwargs)
        return queries, keys * mx.sqrt(mx.mean(k * k, axis=-1, keepdims=True)).swapaxes(1, 2)

    patch.setattr(decoder, "qk_norm_rope", rotated)


@DEFECTS.noticed_by(DECODER)
def heads_share_keys_in_another_order(patch: Patch) -> None:
    def tiled(original: Any, q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        times = q.shape[1] // k.shape[1]
        return original(q, mx.concatenate([k] * times, 1), mx.concatenate([v] * times, 1), **kwargs)

    attend(patch, tiled)


@DEFECTS.noticed_by(DECODER)
def attention_looks_ahead(patch: Patch) -> None:
    attend(patch, unmasked)


@DEFECTS.noticed_by(DECODER)
def gelu_gate(patch: Patch) -> None:
    patch.setattr(nn, "silu", nn.gelu)


@DEFECTS.noticed_by(DECODER)
def gate_and_up_exchanged(patch: Patch) -> None:
    patch.setattr(decoder.MLP, "__call__", lambda self, x: self.down_proj(self.gate_proj(x) * nn.silu(self.up_proj(x))))


@DEFECTS.noticed_by(DECODER)
def no_final_norm(patch: Patch) -> None:
    original = decoder.Qwen3.logits
    patch.setattr(decoder.Qwen3, "logits", lambda self, hidden: original(self, hidden / self.model.norm.weight))


@DEFECTS.noticed_by(partial(checks.check_decoder_padded, "generation"))
def padding_read_by_later_rows(patch: Patch) -> None:
    patch.setattr(decoder, "padded_causal_mask", lambda mask, rows: mx.ones((1, 1, rows, mask.shape[1]), mx.bool_))


@DEFECTS.noticed_by(partial(checks.check_decoder_steps, "generation"))
def cache_forgets_its_oldest_position(patch: Patch) -> None:
    original = cache.KVCache.update

    def update(self: Any, keys: mx.array, values: mx.array) -> Any:
        old = self.offset
        keys, values = original(self, keys, values)
        return (keys[:, :, 1:], values[:, :, 1:]) if old else (keys, values)

    patch.setattr(cache.KVCache, "update", update)


# Generation and the whole path

BOTH = partial(checks.check_generation, "both")
WHOLE = partial(checks.check_pipeline, "plain/transcribe/long")


def by_sampler(patch: Patch, name: str, function: Any) -> None:
    """Exchange a step of the sampler, and have it choose the tokens, which a chain on the device does otherwise."""
    patch.setattr(sampling, name, function)
    patch.setattr(generate.GreedyChain, "pays", staticmethod(lambda options: False))


def by_chain(patch: Patch, history: Any, **changed: Any) -> None:
    """Have the chain choose from another history, under other options."""
    original = sampling.GreedyChain._choose_plainly

    def choose(self: Any, scores: mx.array) -> mx.array:
        kept = self._history, self.options
        self._history, self.options = history(self._history), replace(self.options, **changed)
        token = original(self, scores)
        self._history, self.options = kept
        return token

    patch.setattr(sampling.GreedyChain, "_choose_plainly", choose)


@DEFECTS.noticed_by(BOTH)
def chain_without_penalty(patch: Patch) -> None:
    by_chain(patch, lambda history: history, repetition_penalty=1.0)


@DEFECTS.noticed_by(BOTH)
def chain_bans_ngrams_of_three(patch: Patch) -> None:
    by_chain(patch, lambda history: history, no_repeat_ngram=3)


@DEFECTS.noticed_by(BOTH)
def chain_a_token_behind(patch: Patch) -> None:
    by_chain(patch, lambda history: history[:, :-1])


@DEFECTS.noticed_by(BOTH)
def penalty_counts_the_prompt(patch: Patch) -> None:
    prompt_ids = golden("generation").fact("cases")["both"]["prompt"]
    original = sampling.penalise_repetition
    by_sampler(patch, "penalise_repetition", lambda s, ids, p: original(s, [*prompt_ids, *ids], p))


@DEFECTS.noticed_by(BOTH)
def penalty_left_out(patch: Patch) -> None:
    by_sampler(patch, "penalise_repetition", lambda logits, generated, penalty: logits)


@DEFECTS.noticed_by(BOTH)
def penalty_once_per_occurrence(patch: Patch) -> None:
    def penalise(logits: mx.array, generated: Any, penalty: float) -> mx.array:
        for token in generated:
            logits[token] = mx.where(logits[token] < 0, logits[token] * penalty, logits[token] / penalty)
        return logits

    by_sampler(patch, "penalise_repetition", penalise)


@DEFECTS.noticed_by(partial(checks.check_processor, "penalty_1.2"))
def negative_scores_divided(patch: Patch) -> None:
    def penalise(logits: mx.array, generated: Any, penalty: float) -> mx.array:
        ids = mx.array(sorted(set(generated)))
        logits = mx.array(logits)
        logits[ids] = logits[ids] / penalty
        return logits

    patch.setattr(sampling, "penalise_repetition", penalise)


@DEFECTS.noticed_by(BOTH)
def ngrams_of_three(patch: Patch) -> None:
    original = sampling.ban_repeated_ngrams
    by_sampler(patch, "ban_repeated_ngrams", lambda logits, ids, size: original(logits, ids, size - 1))


@DEFECTS.noticed_by(BOTH)
def ngrams_of_five(patch: Patch) -> None:
    original = sampling.ban_repeated_ngrams
    by_sampler(patch, "ban_repeated_ngrams", lambda logits, ids, size: original(logits, ids, size + 1))


@DEFECTS.noticed_by(partial(checks.check_generation, "stop"))
def stop_token_ignored(patch: Patch) -> None:
    rewrite(patch, generate.GenerationOptions, lambda self: object.__setattr__(self, "stop_token_ids", ()))


@DEFECTS.noticed_by(WHOLE)
def audio_after_the_text(patch: Patch) -> None:
    original = prompt.splice
    patch.setattr(prompt, "splice", lambda before, audio, after, embed: original([], audio, [*before, *after], embed))


@DEFECTS.noticed_by(WHOLE)
def last_audio_row_lost(patch: Patch) -> None:
    original = prompt.splice
    patch.setattr(prompt, "splice", lambda before, audio, after, embed: original(before, audio[:-1], after, embed))


@DEFECTS.noticed_by(WHOLE)
def decoder_does_not_see_the_query_frames(patch: Patch) -> None:
    original = prompt.splice
    patch.setattr(prompt, "splice", lambda before, audio, after, embed: original(before, audio[4:], after, embed))


@DEFECTS.noticed_by(WHOLE)
def deaf(patch: Patch) -> None:
    original = prompt.splice
    patch.setattr(
        prompt, "splice", lambda before, audio, after, embed: original(before, mx.zeros_like(audio), after, embed)
    )


@DEFECTS.noticed_by(WHOLE)
def prompt_text_changed(patch: Patch) -> None:
    patch.setitem(prompt.PROFILES["plain"].forms, "transcribe", ("这是一段中文语音,请转录:", ""))


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
