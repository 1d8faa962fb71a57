"""Defects planted in the encoder and the adaptor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen4b_asr import adaptor, encoder

from . import checks
from .planting import Defects, Patch, attend, override, rewrite, unmasked

DEFECTS = Defects()

ENCODER = partial(checks.check_encoder_layers, 0)


@DEFECTS.noticed_by(ENCODER)
def positions_from_0(patch: Patch) -> None:
    original = encoder.sinusoidal_positions

    def from_zero(length: int, depth: int) -> mx.array:
        zero = mx.concatenate([mx.zeros((1, depth // 2)), mx.ones((1, depth // 2))], axis=1)
        return mx.concatenate([zero, original(length - 1, depth)]) if length > 1 else zero

    patch.setattr(encoder, "sinusoidal_positions", from_zero)


@DEFECTS.noticed_by(ENCODER)
def sines_and_cosines_interleaved(patch: Patch) -> None:
    original = encoder.sinusoidal_positions

    def interleaved(length: int, depth: int) -> mx.array:
        both = original(length, depth).reshape(length, 2, depth // 2)
        return both.swapaxes(1, 2).reshape(length, depth)

    patch.setattr(encoder, "sinusoidal_positions", interleaved)


@DEFECTS.noticed_by(ENCODER)
def time_scales_over_half_the_depth(patch: Patch) -> None:
    def positions(length: int, depth: int) -> mx.array:
        half = depth // 2
        scales = mx.exp(mx.arange(half) * (-math.log(10000.0) / half))
        angles = mx.arange(1, length + 1)[:, None] * scales[None]
        return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)

    patch.setattr(encoder, "sinusoidal_positions", positions)


@DEFECTS.noticed_by(ENCODER)
def query_frames_dropped(patch: Patch) -> None:
    original = encoder.SenseVoiceEncoder.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        states, mask = original(self, *args, **kwargs)
        return states[:, 4:], mask[:, 4:]

    patch.setattr(encoder.SenseVoiceEncoder, "__call__", call)


@DEFECTS.noticed_by(ENCODER)
def query_frames_in_another_order(patch: Patch) -> None:
    original = encoder.SenseVoiceEncoder._queries
    patch.setattr(
        encoder.SenseVoiceEncoder,
        "_queries",
        lambda self, *args: original(self, *args)[:, mx.array([0, 3, 1, 2])],
    )


@DEFECTS.noticed_by(partial(checks.check_encoder_query, "yue", False))
def language_query_off_by_one(patch: Patch) -> None:
    patch.setitem(encoder.LANGUAGE_QUERIES, "yue", 8)


@DEFECTS.noticed_by(partial(checks.check_encoder_query, "auto", True))
def text_normalisation_the_other_way_round(patch: Patch) -> None:
    patch.setattr(encoder, "WITH_ITN_QUERY", 15)


@DEFECTS.noticed_by(ENCODER)
def scaled_by_the_input_size(patch: Patch) -> None:
    rewrite(patch, encoder.SanmEncoder, lambda self: setattr(self, "scale", 560**0.5))


@DEFECTS.noticed_by(ENCODER)
def not_scaled(patch: Patch) -> None:
    rewrite(patch, encoder.SanmEncoder, lambda self: setattr(self, "scale", 1.0))


@DEFECTS.noticed_by(ENCODER)
def residual_around_the_first_attention(patch: Patch) -> None:
    original = encoder.SanmLayer.__call__

    def call(self: Any, x: mx.array, mask: mx.array) -> mx.array:
        if self.residual:
            return original(self, x, mask)
        x = x[..., : self.norm2.weight.size] + self.self_attn(self.norm1(x), mask)
        return x + self.feed_forward(self.norm2(x))

    patch.setattr(encoder.SanmLayer, "__call__", call)


@DEFECTS.noticed_by(partial(checks.check_encoder_variant, "square"))
def no_residual_in_a_square_first_layer(patch: Patch) -> None:
    original = encoder.SanmEncoder.__init__

    def build(self: Any, config: encoder.EncoderConfig) -> None:
        original(self, config)
        self.encoders0[0].residual = False

    patch.setattr(encoder.SanmEncoder, "__init__", build)


Memory = Callable[[mx.array, mx.array, mx.array, int], mx.array]


def exchanged_memory(patch: Patch, change: Callable[..., mx.array]) -> None:
    """Replace the memory block by ``change(original, qkv, weight, mask, left)``."""
    original = encoder.fsmn

    def memory(qkv: mx.array, weight: mx.array, mask: mx.array, *, left: int, **rest: Any) -> mx.array:
        def call(qkv: mx.array, weight: mx.array, mask: mx.array, left: int) -> mx.array:
            return original(qkv, weight, mask, left=left, **rest)

        return change(call, qkv, weight, mask, left)

    patch.setattr(encoder, "fsmn", memory)


@DEFECTS.noticed_by(partial(checks.check_encoder_variant, "shifted"))
def filter_not_shifted(patch: Patch) -> None:
    exchanged_memory(patch, lambda call, qkv, w, mask, left: call(qkv, w, mask, (w.shape[1] - 1) // 2))


@DEFECTS.noticed_by(ENCODER)
def memory_without_its_residual(patch: Patch) -> None:
    def plain(call: Memory, qkv: mx.array, w: mx.array, mask: mx.array, left: int) -> mx.array:
        return call(qkv, w, mask, left) - qkv[..., -w.shape[0] :] * mask[..., None]

    exchanged_memory(patch, plain)


@DEFECTS.noticed_by(ENCODER)
def memory_filter_reversed(patch: Patch) -> None:
    exchanged_memory(patch, lambda call, qkv, w, mask, left: call(qkv, w[:, ::-1], mask, left))


@DEFECTS.noticed_by(checks.check_encoder_batch)
def padding_heard_by_the_memory(patch: Patch) -> None:
    exchanged_memory(patch, lambda call, qkv, w, mask, left: call(qkv, w, mx.ones_like(mask), left))


@DEFECTS.noticed_by(checks.check_encoder_batch)
def padding_heard_by_the_attention(patch: Patch) -> None:
    attend(patch, unmasked)


@DEFECTS.noticed_by(ENCODER)
def norms_with_another_epsilon(patch: Patch) -> None:
    override(patch, encoder.EncoderConfig, norm_eps=1e-3)


@DEFECTS.noticed_by(ENCODER)
def half_precision_encoder(patch: Patch) -> None:
    original = encoder.SenseVoiceEncoder.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.set_dtype(mx.float16)
        return original(self, *args, **kwargs)

    patch.setattr(encoder.SenseVoiceEncoder, "__call__", call)


# Adaptor


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def tanh_gelu(patch: Patch) -> None:
    patch.setattr(nn, "gelu", nn.gelu_approx)


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def sigmoid_gelu(patch: Patch) -> None:
    patch.setattr(nn, "gelu", nn.gelu_fast_approx)


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def relu_adaptor(patch: Patch) -> None:
    patch.setattr(nn, "gelu", nn.relu)


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def pre_norm_adaptor(patch: Patch) -> None:
    def call(self: Any, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.self_attn(self.norm1(x), mask)
        return x + self.linear2(nn.gelu(self.linear1(self.norm2(x))))

    patch.setattr(adaptor.AdaptorLayer, "__call__", call)


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def adaptor_layers_in_reverse(patch: Patch) -> None:
    original = adaptor.Adaptor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        layers = self.transformer.layers
        self.transformer.layers = layers[::-1]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.transformer.layers = layers

    patch.setattr(adaptor.Adaptor, "__call__", call)


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def queries_and_keys_exchanged(patch: Patch) -> None:
    attend(patch, lambda original, q, k, v, **kwargs: original(k, q, v, **kwargs))


@DEFECTS.noticed_by(checks.check_adaptor_layers)
def one_head_instead_of_four(patch: Patch) -> None:
    rewrite(patch, adaptor.AdaptorAttention, lambda self: setattr(self, "heads", 1))


@DEFECTS.noticed_by(checks.check_adaptor_zeros)
def no_norm_at_the_end(patch: Patch) -> None:
    original = adaptor.Adaptor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        norm, self.norm = self.norm, nn.Identity()
        try:
            return original(self, *args, **kwargs)
        finally:
            self.norm = norm

    patch.setattr(adaptor.Adaptor, "__call__", call)


@DEFECTS.noticed_by(checks.check_adaptor_batch)
def padding_heard_by_the_adaptor(patch: Patch) -> None:
    attend(patch, unmasked)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
