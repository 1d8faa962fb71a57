#!/usr/bin/env python3
"""Time every stage, for the demo model and for the full-size encoder and adaptor, beside the original code.

    python tools/bench_stages.py                                             # this package alone
    python tools/bench_stages.py --against torch --reference-python REF/bin/python --output rows.jsonl

The two sides are processes that take turns, stage by stage, so a busy machine slows both alike:
trust the ratios more than the milliseconds, and on a very busy one the ratio of processor time.
Sizes are the true ones; weights are noise, which costs the same time. The full-size decoder is
left out (8 GB); full_size_parity.py times it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 16  # tokens per measurement of a decoding step


class Side:
    """A process that builds a model once and then times one stage at a time."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name = name
        settings = {"OPENBLAS_NUM_THREADS": str(threads), "REFERENCE_THREADS": str(threads), "MLX_ENABLE_TF32": "0"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            SystemExit: If the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Be this package's side: answer requests until the input ends."""
    from qwen4b_asr._blas import preload_openblas

    blas = preload_openblas()  # before MLX
    from importlib.metadata import version

    import mlx.core as mx

    stages: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "config" in request:
            stages = build(request)
            answer: dict[str, Any] = {
                "stages": list(stages),
                "versions": {"mlx": version("mlx")},
                "blas": Path(blas).name if blas else None,
                "device": str(mx.default_device()),
            }
        else:
            start = clocks()
            result = stages[request["run"]]()
            spent = [end - begin for begin, end in zip(start, clocks(), strict=True)]
            answer = {"seconds": result if isinstance(result, list) else spent}  # a list: it timed itself
        print(json.dumps(answer), flush=True)


def clocks() -> list[float]:
    """Return wall and processor time in seconds."""
    return [time.perf_counter(), time.process_time()]


def build(setup: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return a function per stage for a model of the given sizes, filled with noise."""
    import mlx.core as mx
    import numpy as np

    from qwen4b_asr.adaptor import Adaptor, AdaptorConfig
    from qwen4b_asr.cache import KVCache
    from qwen4b_asr.config import ModelConfig
    from qwen4b_asr.decoder import Qwen3
    from qwen4b_asr.encoder import EncoderConfig, SenseVoiceEncoder
    from qwen4b_asr.features import Frontend, FrontendConfig

    config = ModelConfig.from_dict(setup["config"])
    samples = mx.array(np.random.default_rng(0).standard_normal(setup["samples"]).astype(np.float32) * 0.1)
    assert isinstance(config.frontend, FrontendConfig)
    assert isinstance(config.encoder, EncoderConfig)
    assert isinstance(config.adaptor, AdaptorConfig)
    front, encoder, adaptor = Frontend(config.frontend), SenseVoiceEncoder(config.encoder), Adaptor(config.adaptor)
    for part in (front, encoder, adaptor):
        part.eval()
    features = front(samples)[None]
    states, _ = encoder(features)
    audio = adaptor(states)
    mx.eval(features, states, audio, front.parameters(), encoder.parameters(), adaptor.parameters())
    stages: dict[str, Callable[[], Any]] = {
        "features": lambda: mx.eval(front(samples)),
        "encoder": lambda: mx.eval(encoder(features)),
        "adaptor": lambda: mx.eval(adaptor(states)),
    }
    if config.encoder.vocab_size:
        stages["ctc head"] = lambda: mx.eval(encoder.ctc_logits(states))
    if setup["decoder"]:
        assert config.decoder is not None
        decoder = Qwen3(config.decoder)
        decoder.eval()
        mx.eval(decoder.parameters())

        def prefill(cache: list[KVCache]) -> mx.array:
            logits = decoder.logits(decoder.hidden(audio, cache)[:, -1:])
            mx.eval(logits, [layer.state for layer in cache])
            return logits

        def steps() -> list[float]:
            cache = [KVCache() for _ in decoder.model.layers]
            prefill(cache)
            token = mx.array([[1]])
            start = clocks()
            for _ in range(setup["steps"]):
                token = mx.argmax(decoder(decoder.embed(token), cache), axis=-1)
                mx.eval(token)
            return [(end - begin) / setup["steps"] for begin, end in zip(start, clocks(), strict=True)]

        stages["prefill"] = lambda: prefill([KVCache() for _ in decoder.model.layers])
        stages["token"] = steps
    return stages


def cases(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return what to build, by name; a demo model that is not there is left out and said so."""
    from qwen4b_asr.config import ModelConfig
    from qwen4b_asr.weights.paths import weights_data

    found: dict[str, dict[str, Any]] = {}
    if "demo" in names:
        directory = weights_data() / "demo"
        if (directory / "config.json").is_file():
            found["demo"] = {"config": ModelConfig.load(directory).to_dict(), "decoder": True}
        else:
            print(f"no demo model in {directory}: left out", file=sys.stderr)
    if "full" in names:
        found["full"] = {"config": ModelConfig().to_dict(), "decoder": False}
    return found


def measure(sides: list[Side], setup: dict[str, Any], repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time every stage on every side, in turns.

    Returns:
        A row per stage, and what the sides said about themselves.
    """
    facts = {side.name: side.ask(setup) for side in sides}
    rows = []
    for stage in facts[sides[0].name]["stages"]:
        wall: dict[str, list[float]] = {side.name: [] for side in sides}
        busy: dict[str, list[float]] = {side.name: [] for side in sides}
        for side in sides:
            side.ask({"run": stage})  # warm
        for turn in range(repeats):
            for side in sides if turn % 2 == 0 else sides[::-1]:
                seconds = side.ask({"run": stage})["seconds"]
                wall[side.name].append(seconds[0])
                busy[side.name].append(seconds[1])
        row: dict[str, Any] = {"stage": stage, "repeats": repeats}
        for name in wall:
            row[f"{name}_ms"] = 1e3 * statistics.median(wall[name])
            row[f"{name}_lowest_ms"] = 1e3 * min(wall[name])
            row[f"{name}_cpu_ms"] = 1e3 * statistics.median(busy[name])
        if len(sides) == 2:
            for key, values in (("ratio", wall), ("cpu_ratio", busy)):
                first, second = (values[side.name] for side in sides)
                # Of neighbours in time, so that a change of load between turns cancels.
                row[key] = statistics.median(b / a for a, b in zip(first, second, strict=True))
        rows.append(row)
    return rows, facts


def show(case: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Print a table of one case."""
    print(f"{case:<12}" + "".join(f"{name + ' ms':>12}{'lowest':>10}{'CPU ms':>10}" for name in names), end="")
    print("   original / this package: wall, CPU" if len(names) == 2 else "")
    for row in rows:
        keys = [f"{name}_{key}" for name in names for key in ("ms", "lowest_ms", "cpu_ms")]
        times = "".join(f"{row[key]:>{12 if i % 3 == 0 else 10}.2f}" for i, key in enumerate(keys))
        print(
            f"{row['stage']:<12}{times}" + (f"{row['ratio']:>12.2f}{row['cpu_ratio']:>8.2f}" if "ratio" in row else "")
        )
    print()


def main() -> None:
    """Parse the command line, run both sides, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=("demo", "full"), default=["demo", "full"])
    parser.add_argument("--seconds", type=float, default=6.0, help="length of the recording (noise)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of OpenBLAS and of torch (MLX itself uses one)")
    parser.add_argument("--against", choices=("torch",), help="also time the original code")
    parser.add_argument("--reference-python", help="interpreter of the reference environment (tests/golden/README.md)")
    parser.add_argument("--output", type=Path, help="append JSON rows to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    commands = {"mlx": [sys.executable, str(HERE / "bench_stages.py"), "--serve"]}
    if options.against:
        python = options.reference_python or sys.executable
        probe = subprocess.run([python, "-c", "import torch, funasr"], capture_output=True, check=False)
        if probe.returncode == 0:
            commands["torch"] = [python, str(HERE / "golden" / "torch_stages.py")]
        else:
            print(f"{python} cannot import torch and funasr: timing this package only", file=sys.stderr)
    chosen = cases(options.cases)
    for name, setup in chosen.items():
        load = os.getloadavg()[0]
        sides = [Side(side, command, options.threads) for side, command in commands.items()]
        setup |= {"samples": int(16000 * options.seconds), "steps": STEPS}
        rows, facts = measure(sides, setup, options.repeats)
        for side in sides:
            side.close()
        show(name, rows, list(commands))
        about = {
            "case": name,
            "weights": "noise of the true shapes",
            "audio_seconds": options.seconds,
            "threads": options.threads,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
            **{f"{side}_facts": {k: v for k, v in fact.items() if k != "stages"} for side, fact in facts.items()},
        }
        print(json.dumps({k: v for k, v in about.items() if k != "case"}), "\n")
        if options.output:
            with options.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
