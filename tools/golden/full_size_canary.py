#!/usr/bin/env python3
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,untyped-decorator"
"""Compare this package with the original code on a Canary-Qwen of full size, from one checkpoint to token ids.

    python tools/golden/full_size_canary.py --package-python .venv/bin/python

Run it in the reference environment (tests/golden/README.md); `--package-python` is an interpreter that has this
package. The weights are seeded noise in the published names, shapes and type, so no download is needed. One process
writes the checkpoint and runs transformers on it, another runs this package on the same file, each in float32; the
first needs 12 GB of memory and 6 GB of disk. `--layers` and `--llm-layers` take fewer.
"""

from __future__ import annotations

import argparse
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
from full_size_shapes import QWEN3, STOP, recording
from safetensors.numpy import load_file, save_file

SEED = 5
# Stage -> allowed relative L2 and largest difference; "whole" carries the differences of all stages before it.
TOLERANCES = {
    "features": (1e-4, 5e-3),
    "encoder": (1e-5, 1e-4),
    "encoder, folded": (1e-5, 1e-4),
    "projection": (2e-5, 1e-4),
    "projection, whole": (2e-5, 2e-4),
    "decoder, LoRA apart": (2e-5, 2e-4),
    "decoder, LoRA merged": (2e-5, 2e-4),
}
# The model itself is asked without them; but noise, left alone, says one token for ever.
PROCESSORS: dict[str, Any] = dict(repetition_penalty=1.2, no_repeat_ngram=4)
LORA: dict[str, Any] = dict(r=128, lora_alpha=256, target_modules=["q_proj", "v_proj"])


def reference(options: argparse.Namespace) -> None:
    """Write the checkpoint, part by part, and record what transformers makes of it."""
    import golden_canary as canary
    import golden_text
    import reference as ref
    import torch
    from golden_stages import DATA
    from safetensors.torch import save_file as save_shard
    from transformers import ParakeetFeatureExtractor

    torch.set_grad_enabled(False)
    seconds: dict[str, float] = {}
    folder = options.work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, Any]) -> None:
        save_shard(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    def rounded(tensors: Any) -> None:
        for value in tensors:
            if value.is_floating_point():
                value.copy_(value.bfloat16())

    config = dict(
        input_size=128, output_size=1024, attention_heads=8, linear_units=4096, num_blocks=options.layers,
        kernel_size=9, subsampling_factor=8, subsampling_channels=256, scale_input=False,
    )  # fmt: skip
    encoder = canary.build_encoder(config, SEED)
    rounded(encoder.state_dict().values())
    shape = QWEN3["1.7b"] | dict(
        vocab_size=151936, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=True, max_position_embeddings=40960, num_hidden_layers=options.llm_layers,
    )  # fmt: skip
    projection = torch.nn.Linear(1024, shape["hidden_size"])
    ref.randomise(projection, SEED + 1)
    rounded(projection.parameters())
    extractor = ParakeetFeatureExtractor(feature_size=128)
    with canary.published_rounding(extractor):
        perception = {
            "perception.preprocessor.featurizer.fb": extractor.mel_filters[None].bfloat16(),
            "perception.preprocessor.featurizer.window": torch.hann_window(400, periodic=False).bfloat16(),
        }
        features = canary.mel(extractor, recording(options))
    for key, value in canary.nemo_state(encoder, "perception.encoder.").items():
        perception[key] = torch.from_numpy(value).bfloat16()
    for layer in range(options.layers):
        name = f"perception.encoder.layers.{layer}.conv.batch_norm.num_batches_tracked"
        perception[name] = torch.tensor(1000)
    perception |= {f"perception.proj.{key}": value.bfloat16() for key, value in projection.named_parameters()}
    write("model-00001-of-00002.safetensors", perception)
    start = time.perf_counter()
    states = canary.encode(encoder, features[None], [len(features)])
    seconds["encoder"] = time.perf_counter() - start
    audio = projection(states)
    del encoder, perception

    decoder = ref.build_decoder(shape)
    stream = torch.Generator().manual_seed(SEED + 2)
    llm: dict[str, torch.Tensor] = {}
    # As in full_size_torch: what writes to the residual stream is scaled down, or depth swamps the prompt.
    residual = (2 * options.llm_layers) ** -0.5
    for key, parameter in decoder.model.named_parameters():
        value = torch.randn(parameter.shape, generator=stream)
        if key == "embed_tokens.weight":
            value *= 0.1
        elif parameter.ndim == 2:
            value *= parameter.shape[1] ** -0.5 * (residual if "o_proj" in key or "down_proj" in key else 1.0)
        else:
            value = 1.0 + 0.2 * value
        base = value.bfloat16()
        stem = f"llm.base_model.model.model.{key.removesuffix('.weight')}"
        parameter.copy_(base)
        if key == "embed_tokens.weight":
            llm[key] = base
        elif key.removesuffix(".weight").rpartition(".")[2] in LORA["target_modules"]:
            down = (
                torch.randn(LORA["r"], parameter.shape[1], generator=stream) * parameter.shape[1] ** -0.5
            ).bfloat16()
            up = (0.03 * torch.randn(parameter.shape[0], LORA["r"], generator=stream)).bfloat16()
            llm[f"{stem}.base_layer.weight"] = base
            llm[f"{stem}.lora_A.default.weight"], llm[f"{stem}.lora_B.default.weight"] = down, up
            parameter += LORA["lora_alpha"] / LORA["r"] * up.float() @ down.float()
        else:
            llm[f"{stem}.weight"] = base
    write("model-00002-of-00002.safetensors", llm)
    del llm
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}, indent=1))
    (folder / "config.json").write_text(json.dumps({"lora": LORA}))
    decoder.eval()
    encode, _ = golden_text.load_tokenizer(options.tokenizer or DATA / "tokenizer.json")
    embeds = golden_text.splice(decoder, canary.PROMPT, encode, audio)
    out = {"features": features, "encoder": states[0], "projection": audio[0], "prompt": embeds[0]}
    out["decoder"] = decoder(inputs_embeds=embeds).logits[0]
    start = time.perf_counter()
    ids, margin = ref.generate(decoder, embeds, max_tokens=options.max_tokens, stop=STOP, **PROCESSORS)
    seconds["generate"] = time.perf_counter() - start
    pieces = [None if piece == golden_text.AUDIO else encode(piece) for piece in canary.PROMPT]
    facts = dict(ids=ids, margin=margin, pieces=pieces, seconds=seconds, versions=ref.versions())
    save_file({k: np.ascontiguousarray(v.numpy()) for k, v in out.items()}, options.work / "reference.safetensors")
    (options.work / "reference.json").write_text(json.dumps(facts))


def package(options: argparse.Namespace) -> None:
    """Run this package on the checkpoint, each stage on the reference's input and on its own, and print the table."""
    from qwen4b_asr._blas import preload_openblas

    blas = preload_openblas()  # before MLX is imported
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten

    from qwen4b_asr.decoder import Qwen3
    from qwen4b_asr.fastconformer import FastConformerEncoder
    from qwen4b_asr.generate import Generation, GenerationOptions
    from qwen4b_asr.lora import LoraConfig, build_lora, fuse_lora
    from qwen4b_asr.mel import MelFrontend
    from qwen4b_asr.projection import Projection
    from qwen4b_asr.sampling import SamplingOptions
    from qwen4b_asr.weights.canary import canary_configs
    from qwen4b_asr.weights.keymap import load_keymap

    mx.set_default_device(mx.cpu)
    stored = load_file(options.work / "reference.safetensors")
    facts = json.loads((options.work / "reference.json").read_text())
    folder = options.work / "checkpoint"
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        tensors |= loaded
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    configs = canary_configs(shapes, json.loads((folder / "config.json").read_text()), file=str(folder))
    model: Any = nn.Module()
    model.frontend, model.adaptor = MelFrontend(configs.frontend), Projection(configs.adaptor)
    model.audio_encoder, model.decoder = FastConformerEncoder(configs.encoder), Qwen3(configs.decoder)
    build_lora(model.decoder, LoraConfig(LORA["r"], LORA["lora_alpha"], tuple(LORA["target_modules"])))

    def flat(module: Any) -> dict[str, Any]:
        return dict(tree_flatten(module.parameters()))

    wanted = {name: tuple(value.shape) for name, value in flat(model).items()}
    plan = load_keymap("canary").plan(shapes, wanted, file=str(folder))
    filled = [(a.target, tensors[a.sources[0]].reshape(wanted[a.target]).astype(mx.float32)) for a in plan.assignments]
    model.update(tree_unflatten(filled))
    model.eval()
    sizes = {name: sum(value.size for value in flat(module).values()) for name, module in model.items()}
    print(f"{len(tensors)} tensors, {len(plan.dropped)} dropped; parameters {sizes}, together {sum(sizes.values()):,}")
    del tensors, filled

    rows = {name: mx.array(value) for name, value in stored.items()}
    found: dict[str, tuple[Any, str]] = {}
    features = model.frontend(mx.array(recording(options)))
    found["features"] = features, "features"
    mx.eval(model.audio_encoder.parameters())
    start = time.perf_counter()
    states, mask = model.audio_encoder(rows["features"][None])
    mx.eval(states)
    seconds = time.perf_counter() - start
    found["encoder"] = states[0], "encoder"
    found["projection"] = model.adaptor(rows["encoder"][None])[0], "projection"
    model.audio_encoder.fold_batch_norms()
    found["encoder, folded"] = model.audio_encoder(rows["features"][None])[0][0], "encoder"
    states, mask = model.audio_encoder(features[None])
    audio = model.adaptor(states, mask)[0]
    found["projection, whole"] = audio, "projection"
    found["decoder, LoRA apart"] = model.decoder(rows["prompt"][None])[0], "decoder"
    mx.eval([value for value, _ in found.values()])
    fuse_lora(model.decoder)
    found["decoder, LoRA merged"] = model.decoder(rows["prompt"][None])[0], "decoder"
    good = True
    print(f"\n{'stage':<24}{'shape':>16}{'relative L2':>14}{'largest':>12}{'allowed':>18}")
    for name, limits in TOLERANCES.items():
        value, key = found[name]
        a, b = np.asarray(value).astype(np.float64), stored[key].astype(np.float64)
        if a.shape != b.shape:
            raise SystemExit(f"{name}: shape {a.shape} instead of {b.shape}")
        difference = np.abs(a - b)
        relative, largest = float(np.linalg.norm(difference) / np.linalg.norm(b)), float(difference.max())
        within = relative <= limits[0] and largest <= limits[1]
        good &= within
        allowed = f"{limits[0]:.0e} / {limits[1]:.0e}{'' if within else '  OUT OF TOLERANCE'}"
        print(f"{name:<24}{a.shape!s:>16}{relative:>14.2e}{largest:>12.2e}  {allowed:>16}")
    prompt = [audio if ids is None else model.decoder.embed(mx.array(ids)) for ids in facts["pieces"]]
    run = Generation(
        model.decoder,
        mx.concatenate(prompt),
        GenerationOptions(options.max_tokens, STOP, SamplingOptions(**PROCESSORS)),
    )
    ids, expected = list(run), [token for token in facts["ids"] if token not in STOP]
    good &= ids == expected
    print(f"{len(ids)} ids {'equal' if ids == expected else f'DIFFER from {expected}'}, smallest margin "
          f"{facts['margin']:.3f}: {ids[:12]}")  # fmt: skip
    print(f"encoder: {facts['seconds']['encoder']:.1f} s by torch, {seconds:.1f} s here; {facts['versions']}")
    print(f"BLAS {Path(blas).name if blas else None}, peak {mx.get_peak_memory() / 1e9:.1f} GB (MLX)")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {time.strftime('%Y-%m-%d')}")
    print("PASS" if good else "FAIL")
    if not good:
        raise SystemExit(1)


def main() -> None:
    """Run both sides, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("full-size"), help="directory for weights and results")
    parser.add_argument("--package-python", help="interpreter that has this package (default: this one)")
    parser.add_argument("--layers", type=int, default=32, help="encoder layers (default: all 32)")
    parser.add_argument("--llm-layers", type=int, default=28, help="decoder layers (default: all 28)")
    parser.add_argument("--speech", type=Path, help="16 kHz mono recording (default: the goldens' 3 s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the goldens' small one)")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--keep", action="store_true", help="keep the weights afterwards (5 GB)")
    parser.add_argument("--inside", choices=("reference", "package"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.inside:
        {"reference": reference, "package": package}[options.inside](options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    for step, python in (("reference", sys.executable), ("package", options.package_python or sys.executable)):
        print(f"== {step}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([python, __file__, *sys.argv[1:], "--inside", step], check=False)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            raise SystemExit(done.returncode)
    if not options.keep:
        shutil.rmtree(options.work / "checkpoint", ignore_errors=True)


if __name__ == "__main__":
    main()
