"""Mistakes in Fun-ASR-Nano's encoder, adaptor, CTC branch and prompt, each of which a golden check must notice."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen4b_asr import encoder, nano_adaptor, nano_prompt

from . import checks_nano as checks
from .planting import Defects, Patch, attend, override, unmasked

DEFECTS = Defects()
ENCODER = partial(checks.check_encoder, "short")
ADAPTOR = partial(checks.check_adaptor, "short")


@DEFECTS.noticed_by(ENCODER)
def query_frames_of_zeros_in_front(patch: Patch) -> None:
    original = encoder.SenseVoiceEncoder.__call__

    def call(self: Any, features: mx.array, *args: Any, **kwargs: Any) -> Any:
        padded = mx.concatenate([mx.zeros((1, 4, features.shape[2])), features], axis=1)
        states, mask = original(self, padded, *args, **kwargs)
        return states[:, 4:], mask[:, 4:]

    patch.setattr(encoder.SenseVoiceEncoder, "__call__", call)


@DEFECTS.noticed_by(partial(checks.check_features, "short"))
def frames_stacked_with_another_shift(patch: Patch) -> None:
    from qwen4b_asr import features

    override(patch, features.FrontendConfig, lfr_n=5)


def block(patch: Patch, call: Any) -> None:
    """Replace what a block of the adaptor computes."""
    patch.setattr(nano_adaptor.NanoBlock, "__call__", call)


@DEFECTS.noticed_by(ADAPTOR)
def post_norm_blocks(patch: Patch) -> None:
    def call(self: Any, x: mx.array, mask: mx.array) -> mx.array:
        x = self.norm1(x + self.self_attn(x, mask))
        return self.norm2(x + self.feed_forward(x))

    block(patch, call)


@DEFECTS.noticed_by(ADAPTOR)
def norms_exchanged(patch: Patch) -> None:
    def call(self: Any, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.self_attn(self.norm2(x), mask)
        return x + self.feed_forward(self.norm1(x))

    block(patch, call)


@DEFECTS.noticed_by(ADAPTOR)
def no_residual_around_the_feed_forward(patch: Patch) -> None:
    def call(self: Any, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.self_attn(self.norm1(x), mask)
        return self.feed_forward(self.norm2(x))

    block(patch, call)


@DEFECTS.noticed_by(ADAPTOR)
def gelu_for_relu(patch: Patch) -> None:
    patch.setattr(nn, "relu", nn.gelu)


@DEFECTS.noticed_by(ADAPTOR)
def four_heads_for_eight(patch: Patch) -> None:
    override(patch, nano_adaptor.NanoAdaptorConfig, num_heads=4)


@DEFECTS.noticed_by(ADAPTOR)
def blocks_in_reverse(patch: Patch) -> None:
    original = nano_adaptor.NanoAdaptor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        self.blocks.reverse()
        try:
            return original(self, *args, **kwargs)
        finally:
            self.blocks.reverse()

    patch.setattr(nano_adaptor.NanoAdaptor, "__call__", call)


@DEFECTS.noticed_by(ADAPTOR)
def keys_and_values_exchanged(patch: Patch) -> None:
    attend(patch, lambda original, q, k, v, **kwargs: original(q, v, k, **kwargs))


@DEFECTS.noticed_by(checks.check_adaptor_batch)
def padding_heard_by_the_adaptor(patch: Patch) -> None:
    attend(patch, unmasked)


@DEFECTS.noticed_by(checks.check_ctc_batch)
def padding_heard_by_the_ctc_branch(patch: Patch) -> None:
    attend(patch, unmasked)


@DEFECTS.noticed_by(partial(checks.check_epsilon, 1e-12))
def the_ports_epsilon_in_funasrs_adaptor(patch: Patch) -> None:
    override(patch, nano_adaptor.NanoAdaptorConfig, norm_eps=1e-5)


@DEFECTS.noticed_by(partial(checks.check_epsilon, 1e-5))
def funasrs_epsilon_in_the_port(patch: Patch) -> None:
    override(patch, nano_adaptor.NanoAdaptorConfig, norm_eps=1e-12)


@DEFECTS.noticed_by(partial(checks.check_ctc, "short"))
def ctc_head_without_its_transformer(patch: Patch) -> None:
    patch.setattr(nano_adaptor.NanoCtc, "ctc_logits", lambda self, states, mask=None: self.ctc.ctc_lo(states))


@DEFECTS.noticed_by(partial(checks.check_prompt_rows, "hotwords"))
def every_row_given_to_the_decoder(patch: Patch) -> None:
    patch.setattr(nano_adaptor, "rows_kept", lambda rows: rows)


@DEFECTS.noticed_by(partial(checks.check_prompt_rows, "hotwords"))
def a_quarter_of_the_rows(patch: Patch) -> None:
    patch.setattr(nano_adaptor, "rows_kept", lambda rows: -(-rows // 4))


@DEFECTS.noticed_by(partial(checks.check_prompt_rows, "hotwords"))
def every_eighth_row_for_the_first_eighth(patch: Patch) -> None:
    original = nano_adaptor.NanoAdaptor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        return original(self, *args, **{**kwargs, "low_frame_rate": False})[:, ::8]

    patch.setattr(nano_adaptor.NanoAdaptor, "__call__", call)


@DEFECTS.noticed_by(partial(checks.check_prompt_rows, "history"))
def the_turns_audio_exchanged(patch: Patch) -> None:
    original = checks.turns

    def exchanged(case: Any, audio: Any) -> Any:
        first, second = original(case, audio)
        return [
            nano_prompt.NanoTurn(first.answer, second.audio, first.instruction),
            nano_prompt.NanoTurn(second.answer, first.audio, second.instruction),
        ]

    patch.setattr(checks, "turns", exchanged)


def text(patch: Patch, old: str, new: str) -> None:
    """Replace a text in every piece of a prompt."""
    original = nano_prompt.nano_prompt

    def changed(*args: Any, **kwargs: Any) -> list[str | None]:
        return [piece if piece is None else piece.replace(old, new) for piece in original(*args, **kwargs)]

    patch.setattr(nano_prompt, "nano_prompt", changed)


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "plain"))
def no_system_turn(patch: Patch) -> None:
    text(patch, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "")


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "plain"))
def an_empty_thought_that_nobody_asked_for(patch: Patch) -> None:
    text(patch, "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n")


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "short"))
def an_ascii_colon(patch: Patch) -> None:
    text(patch, "：", ":")


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "hotwords"))
def hot_words_without_spaces(patch: Patch) -> None:
    text(patch, "间, Q", "间,Q")


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "history"))
def a_line_break_after_each_answer(patch: Patch) -> None:
    text(patch, "滨海新区<|im_end|>", "滨海新区<|im_end|>\n")


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "no_itn"))
def text_normalisation_the_other_way_round(patch: Patch) -> None:
    original = nano_prompt.instruction

    def turned(*args: Any, use_itn: bool = True, **kwargs: Any) -> str:
        return original(*args, use_itn=not use_itn, **kwargs)

    patch.setattr(nano_prompt, "instruction", turned)


@DEFECTS.noticed_by(partial(checks.check_prompt_ids, "prefix"))
def the_beginning_of_the_answer_dropped(patch: Patch) -> None:
    text(patch, "我想", "")


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
