"""Defects planted in Canary-Qwen's front end, encoder and projection."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen4b_asr import fastconformer, lora, mel, projection

from . import canary
from .planting import Defects, Patch, attend, override, rewrite, unmasked

DEFECTS = Defects()

SPEECH = partial(canary.check_mel, "speech")
NOISE = partial(canary.check_mel, "noise_1360")
PARTS = canary.check_encoder_parts
BATCH = canary.check_encoder_batch


# Front end


@DEFECTS.noticed_by(NOISE)
def one_frame_more(patch: Patch) -> None:
    patch.setattr(mel.MelConfig, "frames", lambda self, samples: 1 + samples // self.frame_shift)


@DEFECTS.noticed_by(SPEECH)
def normalised_over_one_frame_more(patch: Patch) -> None:
    original = mel.MelFrontend.__call__

    def call(self: Any, samples: mx.array) -> mx.array:
        padded = mx.pad(samples, (0, self.config.frame_shift))
        return original(self, padded)[: samples.size // self.config.frame_shift]

    patch.setattr(mel.MelFrontend, "__call__", call)


@DEFECTS.noticed_by(SPEECH)
def periodic_window(patch: Patch) -> None:
    original = mel.hann_window
    patch.setattr(mel, "hann_window", lambda length: original(length + 1)[:length])


@DEFECTS.noticed_by(SPEECH)
def window_from_the_frames_start(patch: Patch) -> None:
    original = mx.pad

    def late(x: mx.array, width: Any, *args: Any, **kwargs: Any) -> mx.array:
        return original(x, (0, 400) if width == (200, 200) else width, *args, **kwargs)

    patch.setattr(mx, "pad", late)


@DEFECTS.noticed_by(SPEECH)
def reflected_edges(patch: Patch) -> None:
    original = mx.pad

    def reflect(x: mx.array, width: Any, *args: Any, **kwargs: Any) -> mx.array:
        if width != (200, 200):
            return original(x, width, *args, **kwargs)
        return mx.concatenate([x[1:201][::-1], x, x[-201:-1][::-1]])

    patch.setattr(mx, "pad", reflect)


@DEFECTS.noticed_by(SPEECH)
def no_pre_emphasis(patch: Patch) -> None:
    override(patch, mel.MelConfig, preemphasis=0.0)


@DEFECTS.noticed_by(partial(canary.check_mel, "offset"))
def first_sample_pre_emphasised(patch: Patch) -> None:
    original = mx.concatenate

    def against_itself(arrays: list[mx.array], *args: Any, **kwargs: Any) -> mx.array:
        return original([0.03 * arrays[0], *arrays[1:]], *args, **kwargs)

    patch.setattr(mx, "concatenate", against_itself)


@DEFECTS.noticed_by(SPEECH)
def mel_scale_of_htk(patch: Patch) -> None:
    patch.setattr(mel, "hertz_to_mel", lambda hertz: 2595.0 * math.log10(1.0 + hertz / 700.0))
    patch.setattr(mel, "mel_to_hertz", lambda mels: 700.0 * (10.0 ** (mels / 2595.0) - 1.0))


@DEFECTS.noticed_by(canary.check_log_mel)
def triangles_of_equal_height(patch: Patch) -> None:
    original = mel.mel_filters
    patch.setattr(mel, "mel_filters", lambda config: original(config) * 40.0)


@DEFECTS.noticed_by(canary.check_log_mel)
def magnitude_instead_of_power(patch: Patch) -> None:
    patch.setattr(mx, "square", mx.abs)


@DEFECTS.noticed_by(canary.check_log_mel)
def guard_of_another_size(patch: Patch) -> None:
    override(patch, mel.MelConfig, log_guard=1e-10)


@DEFECTS.noticed_by(canary.check_log_mel)
def guard_as_a_floor(patch: Patch) -> None:
    original = mx.log
    patch.setattr(mx, "log", lambda x: original(mx.maximum(x - 2.0**-24, 2.0**-24)))


@DEFECTS.noticed_by(NOISE)
def deviation_of_the_population(patch: Patch) -> None:
    original = mx.sqrt
    patch.setattr(mx, "sqrt", lambda variance: original(variance * 7 / 8))


@DEFECTS.noticed_by(SPEECH)
def mean_and_deviation_of_all_bins_together(patch: Patch) -> None:
    original = mx.mean
    patch.setattr(mx, "mean", lambda x, axis: original(x))


# Encoder


@DEFECTS.noticed_by(PARTS)
def distances_the_other_way_round(patch: Patch) -> None:
    original = fastconformer.relative_positions
    patch.setattr(fastconformer, "relative_positions", lambda rows, depth: original(rows, depth)[::-1])


@DEFECTS.noticed_by(PARTS)
def sines_then_cosines(patch: Patch) -> None:
    original = fastconformer.relative_positions

    def apart(rows: int, depth: int) -> mx.array:
        both = original(rows, depth).reshape(-1, depth // 2, 2)
        return both.swapaxes(1, 2).reshape(-1, depth)

    patch.setattr(fastconformer, "relative_positions", apart)


@DEFECTS.noticed_by(PARTS)
def distances_not_aligned(patch: Patch) -> None:
    patch.setattr(fastconformer, "align_distances", lambda scores: scores[..., : scores.shape[2]])


@DEFECTS.noticed_by(PARTS)
def content_and_position_bias_exchanged(patch: Patch) -> None:
    original = fastconformer.RelativeAttention.__call__

    def call(self: Any, *args: Any) -> mx.array:
        self.pos_bias_u, self.pos_bias_v = self.pos_bias_v, self.pos_bias_u
        try:
            return original(self, *args)
        finally:
            self.pos_bias_u, self.pos_bias_v = self.pos_bias_v, self.pos_bias_u

    patch.setattr(fastconformer.RelativeAttention, "__call__", call)


@DEFECTS.noticed_by(PARTS)
def position_scores_not_scaled(patch: Patch) -> None:
    attend(patch, lambda original, q, k, v, scale, mask: original(q, k, v, scale=scale, mask=mask / scale))


@DEFECTS.noticed_by(PARTS)
def no_position_scores(patch: Patch) -> None:
    attend(patch, unmasked)


@DEFECTS.noticed_by(PARTS)
def whole_feed_forward_steps(patch: Patch) -> None:
    original = fastconformer.FeedForward.__call__
    patch.setattr(fastconformer.FeedForward, "__call__", lambda self, x: 2 * original(self, x))


@DEFECTS.noticed_by(PARTS)
def relu_instead_of_silu(patch: Patch) -> None:
    patch.setattr(nn, "silu", nn.relu)


@DEFECTS.noticed_by(PARTS)
def gate_and_value_exchanged(patch: Patch) -> None:
    original = mx.split
    patch.setattr(mx, "split", lambda *args, **kwargs: original(*args, **kwargs)[::-1])


@DEFECTS.noticed_by(PARTS)
def causal_convolution(patch: Patch) -> None:
    original = fastconformer.DepthwiseConv.__call__

    def call(self: Any, x: mx.array) -> mx.array:
        half = self.weight.shape[1] // 2
        return original(self, mx.pad(x, [(0, 0), (half, 0), (0, 0)]))[:, : x.shape[1]]

    patch.setattr(fastconformer.DepthwiseConv, "__call__", call)


@DEFECTS.noticed_by(PARTS)
def taps_reversed(patch: Patch) -> None:
    original = fastconformer.DepthwiseConv.__call__

    def call(self: Any, x: mx.array) -> mx.array:
        return original(self, x[:, ::-1])[:, ::-1]

    patch.setattr(fastconformer.DepthwiseConv, "__call__", call)


@DEFECTS.noticed_by(PARTS)
def batch_norm_left_out(patch: Patch) -> None:
    patch.setattr(fastconformer.BatchNorm, "__call__", lambda self, x: x)


@DEFECTS.noticed_by(PARTS)
def batch_norm_by_the_batch(patch: Patch) -> None:
    original = fastconformer.BatchNorm.__call__

    def call(self: Any, x: mx.array) -> mx.array:
        self.running_mean, self.running_var = mx.mean(x, axis=(0, 1)), mx.var(x, axis=(0, 1))
        return original(self, x)

    patch.setattr(fastconformer.BatchNorm, "__call__", call)


@DEFECTS.noticed_by(PARTS)
def folded_without_the_convolutions_bias(patch: Patch) -> None:
    original = fastconformer.ConvModule.fold_batch_norm

    def fold(self: Any) -> None:
        self.depthwise_conv.bias = mx.zeros_like(self.depthwise_conv.bias)
        original(self)

    patch.setattr(fastconformer.ConvModule, "fold_batch_norm", fold)
    call = fastconformer.FastConformerEncoder.__call__

    def folded(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.fold_batch_norms()
        return call(self, *args, **kwargs)

    patch.setattr(fastconformer.FastConformerEncoder, "__call__", folded)


@DEFECTS.noticed_by(PARTS)
def no_norm_after_a_layer(patch: Patch) -> None:
    rewrite(patch, fastconformer.FastConformerLayer, lambda self: setattr(self, "norm_out", Passing(self.norm_out)))


class Passing(nn.Module):
    """A norm that has its parameters and does nothing with them."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def __call__(self, x: mx.array) -> mx.array:
        return x


@DEFECTS.noticed_by(PARTS)
def frequencies_before_channels(patch: Patch) -> None:
    def call(self: Any, features: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array | None]:
        x = features[..., None]
        for layer in self.conv:
            x = layer(x)
        return self.out(x.reshape(*x.shape[:2], -1)), None

    patch.setattr(fastconformer.ConvSubsampling, "__call__", call)


@DEFECTS.noticed_by(PARTS)
def input_scaled(patch: Patch) -> None:
    override(patch, fastconformer.FastConformerConfig, scale_input=True)


@DEFECTS.noticed_by(canary.check_odd_encoder)
def input_not_scaled(patch: Patch) -> None:
    override(patch, fastconformer.FastConformerConfig, scale_input=False)


@DEFECTS.noticed_by(PARTS)
def norms_with_another_epsilon(patch: Patch) -> None:
    override(patch, fastconformer.FastConformerConfig, norm_eps=1e-3)


@DEFECTS.noticed_by(BATCH)
def padding_heard_by_the_attention(patch: Patch) -> None:
    original = mx.where
    # The mask of the attention is the one with four axes over numbers.
    patch.setattr(mx, "where", lambda c, a, b: a if isinstance(b, float) and c.ndim == 4 else original(c, a, b))


@DEFECTS.noticed_by(BATCH)
def padding_heard_by_the_convolution(patch: Patch) -> None:
    original = fastconformer.ConvModule.__call__
    patch.setattr(fastconformer.ConvModule, "__call__", lambda self, x, mask: original(self, x, None))


@DEFECTS.noticed_by(BATCH)
def padding_heard_by_the_subsampling(patch: Patch) -> None:
    original = fastconformer.ConvSubsampling.__call__

    def call(self: Any, features: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        return original(self, features, None)[0], mask[:, :: 2 ** sum(isinstance(m, nn.Conv2d) for m in self.conv)]

    patch.setattr(fastconformer.ConvSubsampling, "__call__", call)


@DEFECTS.noticed_by(BATCH)
def padding_cleared_once_only(patch: Patch) -> None:
    original = fastconformer.ConvSubsampling.__call__
    clear = fastconformer.keep_rows

    def call(self: Any, features: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        rows, _ = original(self, clear(features, mask), None)
        return rows, mask[:, :: 2 ** sum(isinstance(m, nn.Conv2d) for m in self.conv)]

    patch.setattr(fastconformer.ConvSubsampling, "__call__", call)


@DEFECTS.noticed_by(BATCH)
def rows_rounded_down(patch: Patch) -> None:
    original = fastconformer.FastConformerEncoder.__call__

    def call(self: Any, features: mx.array, mask: mx.array) -> Any:
        states, _ = original(self, features, mask)
        rows = mx.sum(mask, axis=1) // self.config.subsampling_factor
        return states, mx.arange(states.shape[1])[None] < rows[:, None]

    patch.setattr(fastconformer.FastConformerEncoder, "__call__", call)


# Projection


@DEFECTS.noticed_by(canary.check_speech)
def projection_without_its_bias(patch: Patch) -> None:
    patch.setattr(projection.Projection, "__call__", lambda self, states, mask=None: states @ self.proj.weight.T)


# Adapters


@DEFECTS.noticed_by(partial(canary.check_ids, "keep"))
def adapters_left_out(patch: Patch) -> None:
    patch.setattr(lora.LoraConfig, "scale_of", lambda self, path: 0.0)


@DEFECTS.noticed_by(partial(canary.check_ids, "merge"))
def adapters_not_scaled(patch: Patch) -> None:
    patch.setattr(lora.LoraConfig, "scale_of", lambda self, path: 1.0)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
