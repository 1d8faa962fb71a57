#!/usr/bin/env python3
"""Watch a model's memory over many utterances, and hold it against what `qwen4b-asr plan` says.

    python tools/soak.py                                              # the demo model, a thousand utterances
    python tools/soak.py --shape 0.6b --utterances 3 --max-tokens 8   # a full-size model of random weights
    python tools/soak.py --model DIR --seconds 30 --utterances 20

Each utterance is a stretch of another length, up to ``--seconds``, of the demo model's recording repeated: speech, and
shapes that change, as they do in use. The columns of the table: ``active``, arrays that are alive between utterances;
``kept``, freed buffers that MLX keeps; ``peak``, the most that arrays took since the row before; ``resident``, the
process. The exit status is 1 if active memory grows after the first tenth by more than a thousandth, resident memory by
more than a twentieth, or a peak exceeds the plan.

``--shape`` writes a model of random weights into a temporary directory, with SenseVoiceSmall's encoder, the 4B system's
adaptor and a Qwen3 in bfloat16, or in a recipe of ``qwen4b-asr convert --quantize``. 0.6b takes 3 GB of disk, which
quantising doubles, and 5 GB of memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen4b_asr.config import ModelConfig
    from qwen4b_asr.memory import Plan

ROWS = 20
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {},
}


def resident_bytes() -> int:
    """Return what the process takes of memory; where no file tells, the most that it ever took."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10
    return pages * resource.getpagesize()


def random_config(shape: str) -> ModelConfig:
    """Return the configuration of a model of random weights, whose prompt the demo's tokenizer can spell."""
    from qwen4b_asr.adaptor import AdaptorConfig
    from qwen4b_asr.config import ModelConfig
    from qwen4b_asr.decoder import DecoderConfig
    from qwen4b_asr.weights.paths import weights_data

    decoder = DecoderConfig(**SHAPES[shape])
    prompt = ModelConfig.load(weights_data() / "demo").prompt
    adaptor = AdaptorConfig(output_size=decoder.hidden_size)
    return ModelConfig(f"random-{shape}", adaptor=adaptor, decoder=decoder, prompt=prompt)


def write_random(config: ModelConfig, directory: Path, recipe: str | None) -> Path:
    """Write a model directory of random weights; returns where it is."""
    import mlx.core as mx

    from qwen4b_asr.model import SpeechModel
    from qwen4b_asr.weights.convert import convert_checkpoint
    from qwen4b_asr.weights.directory import save_model
    from qwen4b_asr.weights.paths import weights_data
    from qwen4b_asr.weights.recipes import read_recipe

    model = SpeechModel(config)
    model.decoder.set_dtype(mx.bfloat16)
    save_model(directory / "dense", model, config, weights_data() / "demo" / "tokenizer.json")
    if recipe is None:
        return directory / "dense"
    del model
    convert_checkpoint(directory / "dense", directory / recipe, recipe=read_recipe(recipe))
    return directory / recipe


def soak(model: str, options: argparse.Namespace) -> bool:
    """Transcribe, print the table; returns whether memory stayed where it should."""
    import mlx.core as mx
    import numpy as np

    import qwen4b_asr
    from qwen4b_asr.audio import SAMPLE_RATE, load_audio
    from qwen4b_asr.memory import size_text
    from qwen4b_asr.weights.paths import weights_data

    recording = load_audio(weights_data() / "demo" / "sample.wav")
    longest = int(options.seconds * SAMPLE_RATE)
    recording = np.tile(recording, -(-longest // recording.size))[:longest]
    mx.reset_peak_memory()  # writing a random model had its own
    transcriber = qwen4b_asr.load(model, dtype=options.dtype)
    plan = planned(transcriber, options)
    print(
        f"{plan.name}, decoder in {plan.dtype}: planned are {size_text(plan.weight_bytes)} of weights, a peak of "
        f"{size_text(plan.peak)}, {size_text(plan.total)} with the program"
    )
    print(f"{'utterances':>10}{'active':>12}{'kept':>10}{'peak':>12}{'resident':>12}{'seconds':>9}")
    chosen: dict[str, Any] = {"segment_seconds": max(options.seconds, 3.0)}
    if options.max_tokens:
        chosen["max_tokens"] = options.max_tokens
    rng, begun = np.random.default_rng(0), time.perf_counter()
    seen: list[tuple[int, int, int]] = []
    every = max(1, options.utterances // ROWS)
    for number in range(1, options.utterances + 1):
        # The first is the longest, so that no later one needs more.
        size = longest if number == 1 else int(rng.integers(SAMPLE_RATE // 2, longest + 1))
        transcriber.transcribe(recording[:size], **chosen)
        if number % every == 0 or number == 1:
            row = (mx.get_active_memory(), mx.get_peak_memory(), resident_bytes())
            seen.append(row)
            mx.reset_peak_memory()
            cells = (size_text(row[0]), size_text(mx.get_cache_memory()), size_text(row[1]), size_text(row[2]))
            print(
                f"{number:>10}{cells[0]:>12}{cells[1]:>10}{cells[2]:>12}{cells[3]:>12}"
                f"{time.perf_counter() - begun:>9.0f}",
                flush=True,
            )
    settled = seen[min(len(seen) - 1, max(1, len(seen) // 10))]
    peak, ratio = max(row[1] for row in seen), max(row[1] for row in seen) / plan.weight_bytes
    checks = {
        f"active memory grew by {seen[-1][0] - settled[0]:,} bytes": seen[-1][0] - settled[0] <= settled[0] / 1000,
        f"resident memory grew by {seen[-1][2] - settled[2]:,} bytes": seen[-1][2] - settled[2] <= settled[2] / 20,
        f"the peak of arrays was {size_text(peak)}, {ratio:.3f} times the weights": peak <= plan.peak,
        f"the process took {size_text(max(row[2] for row in seen))}": max(row[2] for row in seen) <= plan.total,
    }
    for words, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {words}")
    return all(checks.values())


def planned(transcriber: Any, options: argparse.Namespace) -> Plan:
    """Return the plan for the utterances that are to come."""
    import mlx.core as mx

    from qwen4b_asr.machine import kept_buffers
    from qwen4b_asr.memory import Work, plan_memory
    from qwen4b_asr.weights.load import resolve_dtype

    dtype = "bfloat16" if resolve_dtype(options.dtype) == mx.bfloat16 else "float32"
    work = Work(options.seconds, max_tokens=options.max_tokens)
    return plan_memory(transcriber.config, dtype, work, reserve=kept_buffers())


def main() -> None:
    """Parse, make the model if it must be, soak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="what `qwen4b-asr --model` takes (default: demo)")
    parser.add_argument("--shape", choices=SHAPES, help="a model of random weights instead, with this Qwen3")
    parser.add_argument("--quantize", metavar="RECIPE", help="of the random model's decoder, such as 8 or 4")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--utterances", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the longest utterance (default: 3)")
    parser.add_argument("--max-tokens", type=int, help="budget of each utterance (default: grows with its length)")
    options = parser.parse_args()
    from qwen4b_asr._blas import preload_openblas

    preload_openblas()  # before MLX
    with tempfile.TemporaryDirectory() as folder:
        model = (
            str(write_random(random_config(options.shape), Path(folder), options.quantize))
            if options.shape
            else options.model
        )
        good = soak(model, options)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
