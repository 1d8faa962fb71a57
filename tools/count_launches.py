#!/usr/bin/env python3
"""Count the launches that a GPU makes for one decoding step, for this package and for mlx-lm.

    python tools/count_launches.py                              # this package, Qwen3-0.6B's sizes
    python tools/count_launches.py --model 4b --mlx-lm mlx-lm-environment/bin/python --names

No GPU is needed: the graph of a step is built as it would be on one and walked (``bench/launches.py`` says what is a
launch). The step is one token of one text, greedy, with the penalty and the ban that transcribing has. mlx-lm's is what
its generate_step computes for one token without processors, which leaves it the smaller task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
FORMS: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "8 bits": {"group_size": 64, "bits": 8},
    "4 bits": {"group_size": 64, "bits": 4},
}
WIDTH = 64
"""Launches do not depend on widths: counting takes heads and layers of the model and leaves out its weights."""


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="0.6b", help="whose layers and heads")
    parser.add_argument("--mlx-lm", metavar="PYTHON", help="an interpreter that has mlx-lm: count its step too")
    parser.add_argument("--names", action="store_true", help="say which operations they are")
    return parser


def small(model: str) -> dict[str, Any]:
    """Return a model's sizes with widths that cost nothing."""
    sizes = MODELS[model]
    return {
        "num_hidden_layers": sizes["num_hidden_layers"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "vocab_size": 4 * WIDTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def own_step(sizes: dict[str, Any], form: dict[str, Any] | None, *, kernels: bool, join: bool) -> Counter[str]:
    """Count the launches of one step of `Generation`.

    Args:
        sizes: Of the decoder.
        form: How it is quantised, if it is.
        kernels: Whether kernels take the place of plain operations.
        join: Whether projections are joined.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from bench.launches import as_on_a_gpu, count, kernel_factory
    from qwen4b_asr.decoder import DecoderConfig, Qwen3
    from qwen4b_asr.generate import Generation, GenerationOptions
    from qwen4b_asr.joined import join_projections
    from qwen4b_asr.kernels._loader import override
    from qwen4b_asr.kernels._switch import use
    from qwen4b_asr.sampling import GreedyChain, SamplingOptions

    sampling = SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=4)
    with (
        as_on_a_gpu(),
        override("metal", kernel_factory),
        use("add_rms_norm", "logits_argmax", "qk_norm_rope") if kernels else use("off"),
    ):
        decoder = Qwen3(DecoderConfig(**sizes))
        decoder.set_dtype(mx.bfloat16)
        if form:
            nn.quantize(decoder, **form)
        if join:
            join_projections(decoder)
        run = Generation(
            decoder, mx.zeros((9, sizes["hidden_size"]), dtype=mx.bfloat16), GenerationOptions(9, (), sampling)
        )
        cache, chain = run._empty_cache(), GreedyChain(sampling)
        token = chain.choose(run._prefill(cache))
        mx.eval(decoder.parameters(), token, chain._history, [layer.state for layer in cache])
        following = chain.choose(run._step(token, cache))
        return count(following, chain._history)


def mlx_lm_step(python: str, sizes: dict[str, Any], form: dict[str, Any] | None) -> Counter[str]:
    """Count the launches of one step of mlx-lm, in its own environment.

    Raises:
        SystemExit: If it cannot.
    """
    request = json.dumps({"sizes": sizes, "form": form, "dtype": "bfloat16"})
    command = [python, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; "
               "runpy.run_module('bench.peer_worker_launches', run_name='__main__')", str(HERE)]  # fmt: skip
    ran = subprocess.run(command, input=request, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{python} cannot count mlx-lm's launches:\n{ran.stderr}")
    return Counter(json.loads(ran.stdout))


def main() -> None:
    """Print a line for each form of the weights and each way to run them."""
    options = arguments().parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
    sizes = small(options.model)
    print(f"launches of one step, Qwen3-{options.model} ({sizes['num_hidden_layers']} layers)")
    for name, form in FORMS.items():
        rows = {
            "kernels on": own_step(sizes, form, kernels=True, join=True),
            "kernels off": own_step(sizes, form, kernels=False, join=True),
            "nothing joined, kernels off": own_step(sizes, form, kernels=False, join=False),
        }
        if options.mlx_lm:
            rows["mlx-lm"] = mlx_lm_step(options.mlx_lm, sizes, form)
        whole = rows["mlx-lm"].total() if "mlx-lm" in rows else 0
        for way, launches in rows.items():
            part = f"  {launches.total() / whole:.0%} of mlx-lm's" if whole else ""
            print(f"{name:9}  {way:28}{launches.total():5}{part}")
            if options.names:
                print("".join(f"{'':11}{number:5}  {what}\n" for what, number in launches.most_common()), end="")


if __name__ == "__main__":
    main()
