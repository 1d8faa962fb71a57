# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""The original code's side of `tools/bench_transcribe.py`: funasr's encoder, torch's layers, transformers' Qwen3."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))

import reference as ref
import torch
from safetensors.torch import load_file

from bench.worker import Stage, Timed, Worker

torch.set_grad_enabled(False)


def build(setup: dict[str, Any]) -> Worker:
    """Fill the encoder and the adaptor, or the decoder, from the files of the bench."""
    config, home = setup["config"], Path(setup["home"])
    facts = {"versions": ref.versions(), "threads": torch.get_num_threads(), "blas": None, "device": "cpu"}
    if "listen" in setup["parts"]:
        stages = _listen(config, load_file(home / "listen.safetensors"))
    else:
        stages = _write(config, load_file(home / "decoder" / "model.safetensors"), setup["tokens"])
    return Worker(facts, stages, lambda tensor: tensor.to(torch.float32).numpy())


def _listen(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    encoder, adaptor = config["encoder"], config["adaptor"]
    model = ref.build_encoder(encoder | {"vocab_size": max(encoder["vocab_size"], 2)})
    own = {name: value for name, value in weights.items() if not name.startswith("adaptor.")}
    found = model.load_state_dict(own, strict=False)
    absent = [name for name in found.missing_keys if encoder["num_queries"] or name.startswith("encoder.")]
    if absent or found.unexpected_keys:
        raise ValueError(f"the weights do not fit: {absent[:3]} missing, {found.unexpected_keys[:3]} unknown")
    stack = None
    if adaptor is not None and adaptor.get("kind") is None:
        stack = ref.Adaptor(**adaptor)
        stack.load_state_dict({n.removeprefix("adaptor."): v for n, v in weights.items() if n.startswith("adaptor.")})
    front = ref.frontend()
    front.n_mels, front.lfr_m, front.lfr_n = (config["frontend"][k] for k in ("num_mel_bins", "lfr_m", "lfr_n"))

    def encode(features: torch.Tensor) -> torch.Tensor:
        if encoder["num_queries"]:  # as `SenseVoiceSmall.inference` puts them, which would add its own CTC search
            features = torch.cat([model.embed(torch.tensor([[0, 1, 2, 15]])), features], dim=1)
        # A copy: funasr scales what it is given in place.
        return model.encoder(features.clone(), torch.tensor([features.shape[1]]))[0]

    def stages(inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        features, states = torch.from_numpy(inputs["features"]), torch.from_numpy(inputs["states"])
        found: dict[str, Stage] = {"encoder": lambda: encode(features)}
        if not config["frontend"]["cmvn"]:  # the statistics do not travel
            found["features"] = lambda: ref.run_frontend(front, inputs["samples"])
        if encoder["vocab_size"]:
            found["ctc head"] = lambda: model.ctc.ctc_lo(states)
        if stack is not None:
            drop = 4 if config["prompt"].get("query_frames") == "drop" else 0
            found["adaptor"] = lambda: stack(states[:, drop:])
        return found

    return stages


def _write(config: dict[str, Any], weights: dict[str, torch.Tensor], tokens: int) -> Any:
    sizes = {name: value for name, value in config["decoder"].items() if name not in ("quantization", "lora")}
    decoder = ref.build_decoder(sizes)
    found = decoder.load_state_dict(weights, strict=False)
    absent = [name for name in found.missing_keys if name != "lm_head.weight" or not sizes["tie_word_embeddings"]]
    if absent or found.unexpected_keys:
        raise ValueError(f"the weights do not fit: {absent[:3]} missing, {found.unexpected_keys[:3]} unknown")
    decoder.tie_weights()

    def generate(ids: torch.Tensor) -> Timed:
        start = time.perf_counter()
        out = decoder(input_ids=ids, use_cache=True, logits_to_keep=1)
        written = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter()
        while len(written) < tokens:
            step = torch.tensor([[written[-1]]])
            out = decoder(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            written.append(int(out.logits[0, -1].argmax()))
        return Timed({"prefill": first - start, "decode": time.perf_counter() - first}, written)

    def stages(inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        ids = torch.from_numpy(inputs["ids"]).long()[None]
        return {"generate": lambda: generate(ids)}

    return stages
