"""The side of this project in `tools/bench_transcribe.py`; see `bench.worker` for the requests."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bench.mlx_peer import about, evaluated, peak, to_numpy
from bench.model_files import (
    PROMPT_TOKENS,
    export_decoder,
    export_listen,
    matrix_bytes,
    prompt_length,
    shape_config,
    write_random,
)
from bench.worker import Stage, Timed, Worker, stamped
from qwen4b_asr.config import ModelConfig
from qwen4b_asr.cpu.products import multiply, numpy_multiplies, view
from qwen4b_asr.encoder import SenseVoiceEncoder
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.prepare import prepare
from qwen4b_asr.weights.load import load_model
from qwen4b_asr.weights.obtain import obtain_model

CEILING_BYTES = 256 * 2**20


def build(setup: dict[str, Any]) -> Worker:
    """Write the files of the bench, or load what they hold.

    Args:
        setup: ``write``: shape or model, dtype, bits, layers, seed, and whether peers need files; else ``directory``,
            ``tokens`` to write in ``generate`` and ``whole_tokens`` in ``whole``.
    """
    gc.collect()
    mx.clear_cache()
    if "write" in setup:
        return _Written(setup).worker()
    return _Loaded(Path(setup["directory"]), setup).worker()


class _Written:
    def __init__(self, setup: dict[str, Any]) -> None:
        wanted, home = setup["write"], Path(setup["directory"])
        if wanted["model"] is None:
            directory = home / "model"
            config = shape_config(
                wanted["shape"], bits=wanted["bits"], layers=wanted["layers"], listens=wanted["listens"]
            )
            write_random(config, directory, dtype=wanted["dtype"])
        else:
            directory = obtain_model(wanted["model"])
        model, config = load_model(directory, dtype=wanted["dtype"])
        listens = isinstance(model.audio_encoder, SenseVoiceEncoder)
        if "listen" in wanted["peers"] and listens:
            export_listen(model, home / "listen.safetensors")
        writes = config.decoder is not None and config.decoder.lora is None
        if "write" in wanted["peers"] and writes:
            export_decoder(model.decoder, home / "decoder")
        self.facts = {
            "directory": str(directory),
            "config": config.to_dict(),
            "exported": [part for part, there in (("listen", listens), ("write", writes)) if there],
            "decoder_bytes": matrix_bytes(model.decoder) if config.decoder is not None else 0,
            "prompt_rows": {str(s): prompt_length(config, s) for s in setup["seconds"]},
            "device": str(mx.default_device()),
        }

    def worker(self) -> Worker:
        return Worker(self.facts, lambda inputs: {}, np.asarray)


@dataclass
class _Loaded:
    directory: Path
    setup: dict[str, Any]

    def __post_init__(self) -> None:
        self.model: SpeechModel
        self.config: ModelConfig
        self.model, self.config = load_model(self.directory, dtype=self.setup["dtype"])
        prepare(self.model)

    def worker(self) -> Worker:
        verbs = {"make_inputs": self.make_inputs, "draft": self.draft, "batch": self.batch}
        facts = about()
        if numpy_multiplies():
            facts["blas"] = "NumPy's OpenBLAS"
            facts["versions"]["numpy"] = np.__version__
        return Worker(facts, self.stages, to_numpy, peak, verbs)

    def make_inputs(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write what every side gets: samples, features, audio states and prompt ids, as far as there are parts."""
        rng = np.random.default_rng(0)
        seconds = request["seconds"]
        arrays: dict[str, Any] = {"samples": rng.standard_normal(round(16000 * seconds)).astype(np.float32) * 0.1}
        if "listen" in request["parts"]:
            features = self.model.frontend(mx.array(arrays["samples"]))[None]
            states, _ = self.model.audio_encoder(features)
            arrays |= {"features": to_numpy(features), "states": to_numpy(states)}
        if self.config.decoder is not None:
            ids = rng.integers(0, self.config.decoder.vocab_size, prompt_length(self.config, seconds))
            arrays["ids"] = ids.astype(np.int32)
        np.savez(request["path"], **arrays)
        return {"rows": {name: list(array.shape) for name, array in arrays.items()}}

    def stages(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        model, config = self.model, self.config
        samples = mx.array(inputs["samples"])
        stages: dict[str, Stage] = {"ceiling": ceiling}
        parts = self.setup["parts"]
        if "listen" in parts:
            features, states = mx.array(inputs["features"]), mx.array(inputs["states"])
            stages["features"] = lambda: evaluated(model.frontend(samples))
            stages["encoder"] = lambda: evaluated(model.audio_encoder(features)[0])
            if config.ctc_size:
                stages["ctc head"] = lambda: evaluated(model.ctc_logits(states))
            if config.adaptor is not None:
                heard = states[:, config.dropped_rows :]
                stages["adaptor"] = lambda: evaluated(model.adaptor(heard))
        if "write" in parts:
            ids = mx.array(inputs["ids"])
            stages["generate"] = lambda: self.generate(model.decoder.embed(ids), self.setup["tokens"])
            if "listen" in parts:
                stages["whole"] = lambda: self.whole(samples, ids)
        return stages

    def generate(self, rows: mx.array, tokens: int) -> Timed:
        """Write so many tokens greedily; nothing stops it."""
        generation = Generation(self.model.decoder, rows, GenerationOptions(tokens, stop_token_ids=()))
        start = time.perf_counter()
        return stamped(iter(generation), start)

    def draft(self, request: dict[str, Any]) -> dict[str, Any]:
        """Decode with drafts of several error rates, and without."""
        from bench.drafts import savings

        found = savings(self.model.decoder, request["tokens"], request["errors"], request["rounds"])
        return {"savings": [asdict(saving) for saving in found]}

    def batch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Decode utterances side by side, and alone."""
        from bench.batches import Gain, make_prompts, one_round

        gains = [Gain(size) for size in request["sizes"]]
        for turn in range(request["rounds"]):
            for gain in gains:
                prompts = make_prompts(self.model.decoder, gain.size, request["rows"], request["tokens"])
                try:
                    one_round(self.model.decoder, prompts, [turn % gain.size], gain)
                except SystemExit as error:  # it is a program of its own as well
                    raise RuntimeError(str(error)) from error
        return {"gains": [asdict(gain) for gain in gains]}

    def whole(self, samples: mx.array, ids: mx.array) -> Timed:
        """Go from samples to tokens; the first token's time holds all that comes before it."""
        start = time.perf_counter()
        states, _ = self.model.audio_encoder(self.model.frontend(samples)[None])
        audio = self.model.adaptor(states[:, self.config.dropped_rows :])[0]
        text = self.model.decoder.embed(ids[:PROMPT_TOKENS])
        rows = evaluated(mx.concatenate([text, audio.astype(text.dtype)]))
        heard = time.perf_counter() - start
        timed = self.generate(rows, self.setup["whole_tokens"])
        first = heard + timed.seconds["prefill"]
        return Timed({"first token": first, "whole": first + timed.seconds["decode"]}, timed.tokens)


_BIG: list[mx.array] = []


def ceiling() -> Timed:
    """Read a large array by the ways that a matrix times a vector may go; the bytes per second of each."""
    if not _BIG:
        columns = 4096
        _BIG.append(mx.full((CEILING_BYTES // 4 // columns, columns), 1.0))
        _BIG.append(mx.full((columns, 1), 1.0))
        mx.eval(_BIG)
    big, vector = _BIG
    seconds = {}
    for name, call in (
        ("matvec", lambda: big @ vector),
        ("vecmat", lambda: vector.T @ big[: vector.shape[0]]),
        ("sum", lambda: big.sum()),
        ("sgemv", lambda: mx.array(multiply(view(vector.T), big))),  # NumPy's; on a GPU's arrays it is slow, not wrong
    ):
        start = time.perf_counter()
        mx.eval(call())
        seconds[name] = time.perf_counter() - start
    seconds["vecmat"] *= big.shape[0] / min(big.shape[0], vector.shape[0])
    return Timed(seconds, more={"bytes_per_second": CEILING_BYTES / min(seconds.values())})
