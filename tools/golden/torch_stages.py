# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""The original code as a worker of tools/bench_stages.py: one JSON request a line in, one JSON answer a line out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the libraries print must not look like an answer

import numpy as np  # noqa: E402
import reference as ref  # noqa: E402
import torch  # noqa: E402

torch.set_grad_enabled(False)


def clocks() -> list[float]:
    """Return wall and processor time in seconds."""
    return [time.perf_counter(), time.process_time()]


def build(setup: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return a function per stage for a model of the given sizes, filled with noise."""
    config = setup["config"]
    samples = np.random.default_rng(0).standard_normal(setup["samples"]).astype(np.float32) * 0.1
    sizes = config["frontend"]
    front = ref.frontend()
    front.n_mels, front.lfr_m, front.lfr_n = sizes["num_mel_bins"], sizes["lfr_m"], sizes["lfr_n"]
    features = ref.run_frontend(front, samples)
    encoder = ref.build_encoder(config["encoder"] | {"vocab_size": max(config["encoder"]["vocab_size"], 2)})
    states = ref.encode(encoder, features[None], [len(features)])
    adaptor = ref.Adaptor(**config["adaptor"])
    audio = adaptor(states)
    stages: dict[str, Callable[[], Any]] = {
        "features": lambda: ref.run_frontend(front, samples),
        # The module under the query frames, which are a lookup: `inference` would add its own CTC search.
        "encoder": lambda: encoder.encoder(padded.clone(), torch.tensor([padded.shape[1]])),
        "adaptor": lambda: adaptor(states),
    }
    padded = torch.cat([torch.zeros(1, 4, features.shape[1]), features[None]], dim=1)
    if config["encoder"]["vocab_size"]:
        stages["ctc head"] = lambda: encoder.ctc.ctc_lo(states)
    if setup["decoder"]:
        decoder = ref.build_decoder(config["decoder"])
        stages["prefill"] = lambda: decoder(inputs_embeds=audio, use_cache=True, logits_to_keep=1)

        def steps() -> Any:
            cache = decoder(inputs_embeds=audio, use_cache=True, logits_to_keep=1).past_key_values
            token = torch.tensor([[1]])
            start = clocks()
            for _ in range(setup["steps"]):
                logits = decoder(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
            return [(end - begin) / setup["steps"] for begin, end in zip(start, clocks(), strict=True)]

        stages["token"] = steps
    return stages


def main() -> None:
    """Answer requests until the input ends."""
    stages: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "config" in request:
            stages = build(request)
            answer: Any = {"stages": list(stages), "threads": torch.get_num_threads(), "versions": ref.versions()}
        else:
            start = clocks()
            result = stages[request["run"]]()
            spent = [end - begin for begin, end in zip(start, clocks(), strict=True)]
            answer = {"seconds": result if isinstance(result, list) else spent}  # a list: it timed itself
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
