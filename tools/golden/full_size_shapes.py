# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""What both sides of the full-size comparison agree on: sizes, seed and the recording."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
SEED = 4
STOP = (151645, 151643)
ENCODER: dict[str, Any] = dict(
    input_size=560, output_size=512, attention_heads=4, linear_units=2048, num_blocks=50, tp_blocks=20, kernel_size=11,
    sanm_shift=0, vocab_size=25055,
)  # fmt: skip
QWEN3: dict[str, dict[str, Any]] = {
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}


def decoder_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Return the Qwen3 configuration in Hugging Face names."""
    shape = QWEN3[options.llm] | dict(
        vocab_size=151936, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=True, max_position_embeddings=40960,
    )  # fmt: skip
    if options.llm_layers:
        shape["num_hidden_layers"] = options.llm_layers
    return shape


def adaptor_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Return the adaptor's sizes; all but the last are those of the 4B system."""
    width = QWEN3[options.llm]["hidden_size"]
    return dict(input_size=512, hidden_size=2048, output_size=width, num_layers=4, num_heads=8, ffn_size=8192)


def recording(options: argparse.Namespace) -> np.ndarray:
    """Return the samples (N,) float32 in [-1, 1] at 16 kHz."""
    if options.speech:
        import soundfile

        samples, rate = soundfile.read(options.speech, dtype="float32")
        if rate != 16000 or samples.ndim != 1:
            raise SystemExit(f"{options.speech}: 16 kHz mono is needed")
        return samples
    stored = load_file(ROOT / "tests/golden/data/features.safetensors")["input/speech"]
    return stored.astype(np.float32) / 32768
