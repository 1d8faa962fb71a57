#!/usr/bin/env python3
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Compare this package with the original code on a Fun-ASR-Nano of full size, from one checkpoint to token ids.

    python tools/golden/full_size_nano.py --package-python .venv/bin/python --tokenizer Qwen3-0.6B/tokenizer.json

Run it in the reference environment (tests/golden/README.md); `--package-python` is an interpreter that has this
package. The weights are seeded noise in the published names, shapes and type (bfloat16), the CTC branch among them, so
no download is needed. One process writes model.pt and runs funasr on it, another reads the same file with this
package, each in float32; each needs about 8 GB of memory, and the file 2 GB of disk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
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
from full_size_shapes import ENCODER, QWEN3, ROOT, recording
from safetensors.numpy import load_file, save_file

SEED = 6
# Stage -> allowed relative L2 and largest difference; "whole" carries the differences of all stages before it.
TOLERANCES = {
    "features": (1e-4, 5e-3),
    "encoder": (1e-5, 1e-4),
    "adaptor": (2e-5, 1e-4),
    "ctc": (2e-5, 2e-4),
    "prompt, whole": (2e-5, 4e-4),
    "decoder": (2e-5, 4e-4),
    "decoder, whole": (2e-5, 4e-4),
}
# Hot words, a language and the switch of the text normalisation, so that every piece of the prompt is there.
ASKED: dict[str, Any] = dict(hotwords=["滨海新区", "开放时间"], language="中文", itn=False)
CTC_SYMBOLS = 60515


def tokenizer_file(options: argparse.Namespace) -> Path:
    """Return the tokenizer that both sides read."""
    return options.tokenizer or ROOT / "tests/golden/data/tokenizer.json"


def reference(options: argparse.Namespace) -> None:
    """Write the checkpoint and record what funasr makes of it."""
    import golden_nano as nano
    import reference as ref
    import torch
    from golden_stages import numpy
    from transformers import PreTrainedTokenizerFast

    nano.MEL_BINS = 80
    nano.ENCODER = {key: value for key, value in ENCODER.items() if key not in ("input_size", "vocab_size")}
    nano.ADAPTOR = dict(hidden_size=2048, output_size=1024, num_layers=2)
    nano.CTC, nano.CTC_SYMBOLS = dict(hidden_size=2048, output_size=512, num_layers=5), CTC_SYMBOLS
    nano.DECODER = QWEN3["0.6b"] | dict(
        vocab_size=151936, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=True, max_position_embeddings=40960,
    )  # fmt: skip
    model = nano.build(SEED, gain=0.9)  # seventy layers of more would blow up the rounding of the first
    with torch.no_grad():
        for parameter in model.parameters():  # not the buffers: the decoder's rotation is no weight
            parameter.copy_(parameter.bfloat16())
    folder = options.work / "Fun-ASR-Nano-noise"
    shutil.rmtree(folder, ignore_errors=True)
    llm = folder / "Qwen3-0.6B"
    llm.mkdir(parents=True)
    torch.save({"state_dict": {n: value.bfloat16() for n, value in model.state_dict().items()}}, folder / "model.pt")
    ref.decoder_config(nano.DECODER).save_pretrained(llm)
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    shutil.copyfile(tokenizer_file(options), llm / "tokenizer.json")
    samples = torch.from_numpy(recording(options))
    front = nano.frontend()
    features = ref.run_frontend(front, samples.numpy())
    case = dict(clip="", **ASKED)
    chat = nano.conversation(model, case, lambda _: samples)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file(options)))
    with torch.no_grad():
        embeds, _, _, _, heard = model.inference_prepare([chat], None, None, tokenizer, front, **nano.options(case))
        states, lengths = heard["encoder_out"], heard["encoder_out_lens"]
        ctc = model.ctc.ctc_lo(model.ctc_decoder(states, lengths)[0])
        logits = model.llm(inputs_embeds=embeds).logits
        ids, margin = ref.generate(model.llm, embeds, max_tokens=options.max_tokens)
    out = dict(
        features=features, states=states[0], audio=heard["audio_adaptor_out"][0], ctc=ctc[0], embeds=embeds[0],
        logits=logits[0],
    )  # fmt: skip
    save_file({key: numpy(value) for key, value in out.items()}, options.work / "reference.safetensors")
    facts = dict(ids=ids, margin=margin, versions=ref.versions(), threads=torch.get_num_threads())
    (options.work / "reference.json").write_text(json.dumps(facts, indent=1))


def package(options: argparse.Namespace) -> None:
    """Read the same checkpoint and run every stage on the reference's input, and all of them on their own."""
    from qwen4b_asr._blas import preload_openblas

    blas = preload_openblas()  # before MLX is imported
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from qwen4b_asr.decoder import Qwen3
    from qwen4b_asr.encoder import SenseVoiceEncoder
    from qwen4b_asr.features import Frontend
    from qwen4b_asr.generate import Generation, GenerationOptions
    from qwen4b_asr.nano_adaptor import NanoAdaptor, NanoCtc
    from qwen4b_asr.nano_prompt import instruction, nano_rows
    from qwen4b_asr.sampling import SamplingOptions
    from qwen4b_asr.tokenizer import Tokenizer
    from qwen4b_asr.version import __version__
    from qwen4b_asr.weights.nano import read_nano

    mx.set_default_device(mx.cpu)
    found = read_nano(options.work / "Fun-ASR-Nano-noise")
    assert found.ctc is not None
    modules: dict[str, Any] = {
        "audio_encoder": SenseVoiceEncoder(found.encoder),
        "adaptor": NanoAdaptor(found.adaptor),
        "ctc": NanoCtc(found.ctc),
        "decoder": Qwen3(found.decoder),
    }
    flat: dict[str, Any] = {part: tree_flatten(module.parameters()) for part, module in modules.items()}
    shapes = {f"{part}.{n}": tuple(a.shape) for part, pairs in flat.items() for n, a in pairs}
    plan = found.keymap.plan({n: ref.shape for n, ref in found.tensors.items()}, shapes, file=str(found.file))
    filled: dict[str, list[tuple[str, mx.array]]] = {part: [] for part in modules}
    for a in plan.assignments:
        part, _, name = a.target.partition(".")
        value = mx.concatenate([found.tensors[source].read().reshape(-1) for source in a.sources])
        filled[part].append((name, value.reshape(shapes[a.target]).astype(mx.float32)))
        mx.eval(filled[part][-1][1])
    for part, pairs in filled.items():
        modules[part].load_weights(pairs, strict=True)
        modules[part].eval()
    encoder, adaptor, branch, decoder = modules.values()
    stored = {key: mx.array(value) for key, value in load_file(options.work / "reference.safetensors").items()}
    features = Frontend(found.frontend)(mx.array(recording(options)))
    states, _ = encoder(stored["features"][None])
    own, _ = encoder(features[None])
    request = instruction(
        found.prompt, hotwords=ASKED["hotwords"], language=ASKED["language"], use_itn=bool(ASKED["itn"])
    )
    spell = Tokenizer(found.llm / "tokenizer.json").encode
    rows = nano_rows(found.prompt, request, adaptor(own)[0], spell=spell, embed=decoder.embed)
    out = {
        "features": features,
        "encoder": states[0],
        "adaptor": adaptor(stored["states"][None], low_frame_rate=False)[0],
        "ctc": branch.ctc_logits(stored["states"][None])[0],
        "prompt, whole": rows,
        "decoder": decoder(stored["embeds"][None])[0],
        "decoder, whole": decoder(rows[None])[0],
    }
    ids = list(Generation(decoder, rows, GenerationOptions(options.max_tokens, (), SamplingOptions())))
    save_file(
        {key: np.ascontiguousarray(np.array(value)) for key, value in out.items()}, options.work / "ours.safetensors"
    )
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "numpy")} | {"qwen4b-asr": __version__}
    facts = dict(
        ids=ids, versions=versions, blas=Path(blas).name if blas else None, peak_gb=mx.get_peak_memory() / 1e9,
        dropped=dict(plan.dropped), tensors=len(found.tensors), low_frame_rate=found.adaptor.low_frame_rate,
    )  # fmt: skip
    (options.work / "ours.json").write_text(json.dumps(facts, indent=1))


def compare(options: argparse.Namespace) -> bool:
    """Print the table; returns whether everything is within tolerance."""
    theirs, ours = (json.loads((options.work / f"{name}.json").read_text()) for name in ("reference", "ours"))
    wanted, found = (load_file(options.work / f"{name}.safetensors") for name in ("reference", "ours"))
    keys = {"encoder": "states", "adaptor": "audio", "prompt": "embeds", "decoder": "logits"}
    good = True
    print(f"\n{'stage':<20}{'shape':>16}{'relative L2':>14}{'largest':>12}{'allowed':>20}")
    for stage, limits in TOLERANCES.items():
        part = stage.partition(",")[0]
        a, b = found[stage].astype(np.float64), wanted[keys.get(part, part)].astype(np.float64)
        if a.shape != b.shape:
            raise SystemExit(f"{stage}: shape {a.shape} instead of {b.shape}")
        difference = np.abs(a - b)
        relative, largest = float(np.linalg.norm(difference) / np.linalg.norm(b)), float(difference.max())
        within = relative <= limits[0] and largest <= limits[1]
        good &= within
        allowed = f"{limits[0]:.0e} / {limits[1]:.0e}"
        line = f"{stage:<20}{a.shape!s:>16}{relative:>14.2e}{largest:>12.2e}{allowed:>20}"
        print(f"{line}{'' if within else '  OUT OF TOLERANCE'}")
    same = theirs["ids"] == ours["ids"]
    good &= same
    print(
        f"{len(ours['ids'])} ids {'equal' if same else 'DIFFER'}, smallest margin {theirs['margin']:.3f}: "
        f"{ours['ids'][:12]}{'' if same else ' instead of ' + str(theirs['ids'][:12])}"
    )
    print(f"{ours['tensors']} tensors, dropped: {ours['dropped']}, low frame rate: {ours['low_frame_rate']}")
    print(f"reference: {theirs['versions']}, {theirs['threads']} threads")
    print(f"package: {ours['versions']}, BLAS {ours['blas']}, peak {ours['peak_gb']:.1f} GB (MLX)")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {time.strftime('%Y-%m-%d')}")
    print("PASS" if good else "FAIL")
    return good


def main() -> None:
    """Run both sides, each in a process of its own, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("full-size-nano"), help="directory for weights and results")
    parser.add_argument("--package-python", help="interpreter that has this package (default: this one)")
    parser.add_argument("--speech", type=Path, help="16 kHz mono recording (default: the goldens' 3 s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the goldens' small one)")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--keep", action="store_true", help="keep the weights afterwards (2 GB)")
    parser.add_argument("--inside", choices=("reference", "package"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.inside:
        (reference if options.inside == "reference" else package)(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    for step in ("reference", "package"):
        python = (options.package_python or sys.executable) if step == "package" else sys.executable
        start = time.perf_counter()
        subprocess.run([python, __file__, *sys.argv[1:], "--inside", step], check=True)
        print(f"{step}: {time.perf_counter() - start:.0f} s", flush=True)
    good = compare(options)
    if not options.keep:
        shutil.rmtree(options.work / "Fun-ASR-Nano-noise")
        for name in ("reference.safetensors", "ours.safetensors"):
            (options.work / name).unlink()
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
