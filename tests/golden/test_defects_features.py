"""Defects planted in the front end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr import features
from qwen4b_asr.kernels import lfr_cmvn

from . import checks
from .planting import Defects, Patch, override

DEFECTS = Defects()


@dataclass(frozen=True)
class FrameSteps:
    """The filter bank with its steps exchangeable, to plant defects that no setting of the real one can make."""

    remove_mean: bool = True
    emphasise_first: bool = True
    window: str = "hamming"
    magnitude: bool = False
    floor: float = 1.1920928955078125e-07

    def __call__(self, samples: mx.array, config: features.FrontendConfig) -> mx.array:
        count = features.frame_count(samples.size, config)
        starts = np.arange(count)[:, None] * config.frame_shift + np.arange(config.frame_length)
        x = np.asarray(samples, np.float64)[starts] * config.input_scale
        if self.remove_mean:
            x = x - x.mean(axis=1, keepdims=True)
        first = x[:, :1] if self.emphasise_first else np.zeros_like(x[:, :1])
        x = x - config.preemphasis * np.concatenate([first, x[:, :-1]], axis=1)
        angle = 2 * np.pi * np.arange(config.frame_length) / (config.frame_length - 1)
        hann = 0.5 - 0.5 * np.cos(angle)
        x = x * {"hamming": 0.54 - 0.46 * np.cos(angle), "hann": hann, "povey": hann**0.85}[self.window]
        power = np.abs(np.fft.rfft(x, 512, axis=1)) ** (1 if self.magnitude else 2)
        edges = 1127 * np.log1p(np.array([20.0, 8000.0]) / 700)
        centres = np.linspace(edges[0], edges[1], config.num_mel_bins + 2)[1:-1]
        step = (edges[1] - edges[0]) / (config.num_mel_bins + 1)
        mel = 1127 * np.log1p(np.arange(257) * 16000 / 512 / 700)
        filters = np.maximum(0, 1 - np.abs(mel[:, None] - centres[None]) / step)
        return mx.array(np.log(np.maximum(power @ filters, self.floor)).astype(np.float32))


def test_the_exchangeable_filter_bank_is_right_when_nothing_is_exchanged(monkeypatch: Patch) -> None:
    monkeypatch.setattr(features, "fbank", FrameSteps())
    for name in checks.WAVEFORMS:
        checks.check_fbank(name)


SPEECH = partial(checks.check_fbank, "speech")


@DEFECTS.noticed_by(SPEECH)
def no_pre_emphasis_of_the_first_sample(patch: Patch) -> None:
    patch.setattr(features, "fbank", FrameSteps(emphasise_first=False))


@DEFECTS.noticed_by(SPEECH)
def frame_mean_not_removed(patch: Patch) -> None:
    patch.setattr(features, "fbank", FrameSteps(remove_mean=False))


@DEFECTS.noticed_by(SPEECH)
def hann_window(patch: Patch) -> None:
    patch.setattr(features, "fbank", FrameSteps(window="hann"))


@DEFECTS.noticed_by(SPEECH)
def povey_window(patch: Patch) -> None:
    patch.setattr(features, "fbank", FrameSteps(window="povey"))


@DEFECTS.noticed_by(SPEECH)
def magnitude_spectrum(patch: Patch) -> None:
    patch.setattr(features, "fbank", FrameSteps(magnitude=True))


@DEFECTS.noticed_by(partial(checks.check_fbank, "silence"))
def floor_of_1e_10(patch: Patch) -> None:
    patch.setattr(features, "fbank", FrameSteps(floor=1e-10))


@DEFECTS.noticed_by(SPEECH)
def no_16_bit_scale(patch: Patch) -> None:
    override(patch, features.FrontendConfig, input_scale=1.0)


@DEFECTS.noticed_by(SPEECH)
def pre_emphasis_of_0_95(patch: Patch) -> None:
    override(patch, features.FrontendConfig, preemphasis=0.95)


@DEFECTS.noticed_by(SPEECH)
def filters_from_0_hertz(patch: Patch) -> None:
    override(patch, features.FrontendConfig, low_freq=0.0)


@DEFECTS.noticed_by(SPEECH)
def dither(patch: Patch) -> None:
    original = features.fbank

    def noisy(samples: mx.array, config: features.FrontendConfig) -> mx.array:
        return original(samples + mx.random.normal(samples.shape) / 32768, config)

    patch.setattr(features, "fbank", noisy)


@DEFECTS.noticed_by(partial(checks.check_features, "speech"))
def stacking_without_left_context(patch: Patch) -> None:
    original = lfr_cmvn.low_frame_rate
    patch.setattr(
        lfr_cmvn, "low_frame_rate", lambda x, m, n: original(mx.concatenate([x[3:], x[-1:], x[-1:], x[-1:]]), m, n)
    )


@DEFECTS.noticed_by(partial(checks.check_features, "speech"))
def last_row_cut_off(patch: Patch) -> None:
    original = lfr_cmvn.low_frame_rate
    patch.setattr(lfr_cmvn, "low_frame_rate", lambda x, m, n: original(x, m, n)[:-1])


@DEFECTS.noticed_by(partial(checks.check_features, "speech"))
def scaled_before_shifted(patch: Patch) -> None:
    original = features.Frontend.__call__

    def call(self: Any, samples: mx.array) -> mx.array:
        return original(self, samples) - self.cmvn_shift * self.cmvn_scale + self.cmvn_shift

    patch.setattr(features.Frontend, "__call__", call)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
