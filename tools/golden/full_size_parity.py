#!/usr/bin/env python3
"""Compare this package with the original code at full size, from files on disk to token ids.

    python tools/golden/full_size_parity.py --package-python .venv/bin/python --llm 0.6b
    python tools/golden/full_size_parity.py --package-python .venv/bin/python --llm 4b --tokenizer Qwen3/tokenizer.json

Run it in the reference environment (tests/golden/README.md); `--package-python` is an interpreter
that has this package. The weights are seeded noise in the true shapes, so no download is needed:
what is shown is that the same files give the same numbers. Steps, each a process of its own so
that only one model is in memory at a time:

1. make       write model.pt, am.mvn and config.yaml, adaptor.pt, and a sharded bfloat16 Qwen3
2. reference  the original code on those files, float32, every stage recorded
3. convert    `qwen4b-asr convert`
4. package    this package on the converted directory, each stage on the reference's input and on its own
5. compare    a table; the exit status is 1 if a stage is out of tolerance or an id differs

A 4B decoder in float32 needs 16 GB of memory; `--llm-layers` takes fewer layers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from full_size_shapes import QWEN3

STEPS = ("make", "reference", "convert", "package", "compare")
# Stage → allowed relative L2 and largest difference; "whole" carries the differences of all stages before it.
TOLERANCES = {
    "features": (1e-4, 5e-3),
    "encoder": (1e-5, 1e-4),
    "ctc": (1e-5, 2e-4),
    "adaptor": (2e-5, 1e-4),
    "decoder": (2e-5, 2e-4),
    "encoder, whole": (2e-5, 2e-4),
    "ctc, whole": (2e-5, 4e-4),
    "adaptor, whole": (2e-5, 2e-4),
    "decoder, whole": (2e-5, 4e-4),
}


def compare(options: argparse.Namespace) -> bool:
    """Print the table; returns whether everything is within tolerance."""
    from safetensors import safe_open

    theirs, ours = (json.loads((options.work / f"{name}.json").read_text()) for name in ("reference", "package"))
    good = True
    print(f"\n{'stage':<36}{'shape':>16}{'relative L2':>14}{'largest':>12}{'allowed':>20}")
    with (
        safe_open(options.work / "reference.safetensors", "numpy") as wanted,
        safe_open(options.work / "package.safetensors", "numpy") as found,
    ):
        order = list(TOLERANCES)
        for name in sorted(
            found.keys(), key=lambda name: order.index(name.rpartition(" ")[0] if "/" in name else name)
        ):
            stage, form = name, ""
            if name.startswith("decoder"):
                stage, _, form = name.rpartition(" ")
            part = stage.partition(",")[0]
            key = {"features": "features", "encoder": "states", "ctc": "ctc", "adaptor": "audio"}.get(part)
            key = key or f"logits/{form}"
            a, b = found.get_tensor(name).astype(np.float64), wanted.get_tensor(key).astype(np.float64)
            if a.shape != b.shape:
                raise SystemExit(f"{name}: shape {a.shape} instead of {b.shape}")
            difference = np.abs(a - b)
            relative, largest = float(np.linalg.norm(difference) / np.linalg.norm(b)), float(difference.max())
            limits = TOLERANCES[stage]
            within = relative <= limits[0] and largest <= limits[1]
            good &= within
            allowed = f"{limits[0]:.0e} / {limits[1]:.0e}"
            print(
                f"{name:<36}{a.shape!s:>16}{relative:>14.2e}{largest:>12.2e}{allowed:>20}"
                f"{'' if within else '  OUT OF TOLERANCE'}"
            )
        # The weights are noise, so the symbols mean nothing; their number and order are what a recogniser would write.
        texts = [_spelled(file.get_tensor(name)) for file, name in ((wanted, "ctc"), (found, "ctc, whole"))]
    good &= texts[0] == texts[1]
    print(
        f"SenseVoiceSmall alone: {len(texts[1])} symbols by the best path "
        f"{'equal' if texts[0] == texts[1] else 'DIFFER'}: {texts[1][:12]}"
    )
    for form in options.forms:
        wanted_ids, found_ids = theirs["runs"][form]["ids"], ours["runs"][form]["ids"]
        same = wanted_ids == found_ids
        good &= same
        print(
            f"{form}: {len(found_ids)} ids {'equal' if same else 'DIFFER'}, smallest margin "
            f"{theirs['runs'][form]['margin']:.3f}: {found_ids[:12]}{'' if same else f' instead of {wanted_ids[:12]}'}"
        )
    print(f"reference: {theirs['versions']}, {theirs['threads']} threads")
    print(f"package: {ours['versions']}, BLAS {ours['blas']}, peak {ours['peak_gb']:.1f} GB (MLX)")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {time.strftime('%Y-%m-%d')}")
    print("PASS" if good else "FAIL")
    return good


def _spelled(logits: np.ndarray[Any, Any]) -> list[int]:
    """Take the best symbol of every row (R, V), merge repeats and drop the blank, as funasr's ``inference`` does."""
    best = [int(symbol) for symbol in logits.argmax(axis=-1)]
    return [symbol for i, symbol in enumerate(best) if symbol and (i == 0 or symbol != best[i - 1])]


def inside(options: argparse.Namespace) -> bool | None:
    """Run one step in this process, importing what that step needs and no more."""
    if options.inside == "compare":
        return compare(options)
    side = importlib.import_module(
        "full_size_torch" if options.inside in ("make", "reference") else "full_size_package"
    )
    getattr(side, options.inside)(options)
    return None


def main() -> None:
    """Run all steps, or one of them inside its own process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("full-size"), help="directory for weights and results")
    parser.add_argument("--package-python", help="interpreter that has this package (default: this one)")
    parser.add_argument("--llm", choices=QWEN3, default="4b", help="shape of the decoder (default: 4b)")
    parser.add_argument("--llm-layers", type=int, help="fewer decoder layers than the model has")
    parser.add_argument("--mvn", type=Path, help="am.mvn (default: SenseVoiceSmall's, from the goldens)")
    parser.add_argument("--speech", type=Path, help="16 kHz mono recording (default: the goldens' 3 s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the goldens' small one)")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--forms", nargs="+", default=["plain/transcribe"], help="prompt profile/task")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these steps, in order")
    parser.add_argument("--inside", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help="keep the weights afterwards (about 10 GB for 4b)")
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.inside:
        if inside(options) is False:
            raise SystemExit(1)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    for step in options.steps:
        python = (options.package_python or sys.executable) if step in ("convert", "package") else sys.executable
        print(f"== {step}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([python, __file__, *sys.argv[1:], "--inside", step], check=False)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            raise SystemExit(done.returncode)
    if not options.keep:
        for name in ("encoder", "llm", "model"):
            shutil.rmtree(options.work / name, ignore_errors=True)
        for name in ("adaptor.pt", "reference.safetensors", "package.safetensors"):
            (options.work / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
