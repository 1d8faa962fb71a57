# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""mlx-lm's side of `tools/bench_transcribe.py`: its Qwen3 and its own generation loop, on the same weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.utils import load_model

from bench.mlx_peer import about, peak, to_numpy
from bench.worker import Stage, Timed, Worker, stamped


def build(setup: dict[str, Any]) -> Worker:
    """Load the decoder's Hugging Face directory."""
    model, _ = load_model(Path(setup["home"]) / "decoder")
    model.eval()

    def generate(ids: mx.array) -> Timed:
        start = time.perf_counter()
        timed = stamped((int(token) for token, _ in generate_step(ids, model, max_tokens=setup["tokens"])), start)
        mx.synchronize(generation_stream)  # it has queued one step more, which must not run in another side's turn
        return timed

    def stages(inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        ids = mx.array(inputs["ids"])
        return {"generate": lambda: generate(ids)}

    return Worker(about("mlx-lm"), stages, to_numpy, peak)
