# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""The full-size comparison's own side: `convert`, then every stage on the reference's input and on its own."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from full_size_shapes import recording
from safetensors.numpy import load_file, save_file


def convert(options: argparse.Namespace) -> None:
    """Run `qwen4b-asr convert`."""
    work = options.work
    arguments = ["--encoder", work / "encoder", "--adaptor", work / "adaptor.pt", "--llm", work / "llm"]
    arguments += ["--output", work / "model", "--force"]
    subprocess.run([sys.executable, "-m", "qwen4b_asr", "convert", *map(str, arguments)], check=True)


def package(options: argparse.Namespace) -> None:
    """Run this package on the converted directory, stage by stage and whole."""
    from qwen4b_asr._blas import preload_openblas

    blas = preload_openblas()  # before MLX is imported
    import mlx.core as mx

    import qwen4b_asr
    from qwen4b_asr.prompt import PromptConfig, prompt_pieces, splice
    from qwen4b_asr.version import __version__

    mx.set_default_device(mx.cpu)
    stored = {key: mx.array(value) for key, value in load_file(options.work / "reference.safetensors").items()}
    transcriber = qwen4b_asr.load(options.work / "model", dtype="float32")
    assert isinstance(transcriber, qwen4b_asr.Transcriber)
    prompts = transcriber.config.prompt
    assert isinstance(prompts, PromptConfig)
    model, encode = transcriber.model, transcriber.tokenizer.encode
    out: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = work(*args)
        mx.eval(result)
        seconds[name] = time.perf_counter() - start
        return result

    samples = recording(options)
    # Weights are read when first used: not inside a stage's time.
    mx.eval([part.parameters() for part in (model.frontend, model.audio_encoder, model.adaptor)])
    features = timed("features", model.frontend, mx.array(samples))
    states, _ = timed("encoder", model.audio_encoder, stored["features"][None])
    ctc = timed("ctc", model.audio_encoder.ctc_logits, stored["states"][None])
    audio = timed("adaptor", model.adaptor, stored["states"][None])
    own_states, _ = model.audio_encoder(features[None])
    own_audio = model.adaptor(own_states)
    for name, value in {
        "features": features, "encoder": states[0], "ctc": ctc[0], "adaptor": audio[0],
        "encoder, whole": own_states[0], "ctc, whole": model.audio_encoder.ctc_logits(own_states)[0],
        "adaptor, whole": own_audio[0],
    }.items():  # fmt: skip
        out[name] = np.asarray(value)
    mx.eval(model.decoder.parameters())
    runs = {}
    for form in options.forms:
        profile, task = form.split("/")
        out[f"decoder {form}"] = np.asarray(timed(f"decoder {form}", model.decoder, stored[f"prompt/{form}"][None])[0])
        before, after = (encode(text) for text in prompt_pieces(prompts, profile, task))
        rows = splice(before, own_audio[0], after, model.decoder.embed)
        out[f"decoder, whole {form}"] = np.asarray(model.decoder(rows[None])[0])
        result = transcriber.transcribe(
            samples, 16000, prompt_profile=profile, task=task, max_tokens=options.max_tokens
        )
        runs[form] = dict(ids=list(result.tokens), timings=result.timings)
    facts = dict(
        runs=runs,
        seconds=seconds,
        versions={name: importlib.metadata.version(name) for name in ("mlx", "numpy")} | {"qwen4b-asr": __version__},
        blas=Path(blas).name if blas else None,
        peak_gb=mx.get_peak_memory() / 1e9,
    )
    save_file({k: np.ascontiguousarray(v) for k, v in out.items()}, options.work / "package.safetensors")
    (options.work / "package.json").write_text(json.dumps(facts, indent=1))
