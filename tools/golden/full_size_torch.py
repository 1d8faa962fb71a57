# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""The full-size comparison's torch side: files full of noise, and what the original code makes of them."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_text
import numpy as np
import reference as ref
import torch
from full_size_shapes import ENCODER, ROOT, SEED, STOP, adaptor_shape, decoder_shape, recording
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_shard
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

torch.set_grad_enabled(False)
disable_progress_bar()


def make(options: argparse.Namespace) -> None:
    """Write the published files' counterparts, filled with noise."""
    encoder_dir, llm = options.work / "encoder", options.work / "llm"
    for directory in (encoder_dir, llm):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    model = ref.build_encoder(ENCODER)
    ref.randomise(model, SEED, embedding=1.0)
    state = model.state_dict()
    print(f"encoder: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} parameters")
    torch.save({"state_dict": state}, encoder_dir / "model.pt")
    mvn = options.mvn.read_bytes() if options.mvn else None
    if mvn is None:
        mvn = load_file(ROOT / "tests/golden/data/features.safetensors")["source/am_mvn"].tobytes()
    (encoder_dir / "am.mvn").write_bytes(mvn)
    (encoder_dir / "config.yaml").write_text(
        "encoder: SenseVoiceEncoderSmall\nencoder_conf:\n    output_size: 512\n    attention_heads: 4\n"
        "    linear_units: 2048\n    num_blocks: 50\n    tp_blocks: 20\n    kernel_size: 11\n    sanm_shfit: 0\n"
        "frontend_conf:\n    fs: 16000\n    window: hamming\n    n_mels: 80\n    frame_length: 25\n"
        "    frame_shift: 10\n    lfr_m: 7\n    lfr_n: 6\n"
    )
    adaptor = ref.Adaptor(**adaptor_shape(options))
    ref.randomise(adaptor, SEED + 1)
    state = adaptor.state_dict()
    print(f"adaptor: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} parameters")
    torch.save(state, options.work / "adaptor.pt")
    del model, adaptor, state

    config = decoder_shape(options)
    with torch.device("meta"):
        empty = ref.build_decoder(config)
    # Layers that write to the residual stream are scaled down, as in training, or depth swamps the prompt.
    residual = (2 * config["num_hidden_layers"]) ** -0.5
    stream = torch.Generator().manual_seed(SEED + 2)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, parameter in empty.named_parameters():
        value = torch.randn(parameter.shape, generator=stream)
        if name.endswith("embed_tokens.weight"):
            value *= 0.1
        elif parameter.ndim == 2:
            value *= parameter.shape[1] ** -0.5 * (residual if "o_proj" in name or "down_proj" in name else 1.0)
        else:
            value = 1.0 + 0.2 * value
        if sum(v.nbytes for v in shards[-1].values()) > 2e9:
            write_shard(llm, shards)
            shards.append({})
        shards[-1][name] = value.to(torch.bfloat16)
    write_shard(llm, shards)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (llm / f"{number}.part").rename(llm / final)
        index |= dict.fromkeys(shard, final)
    total = sum(p.numel() for p in empty.parameters())
    print(f"decoder: {len(index)} tensors, {total:,} parameters, {len(shards)} shards")
    (llm / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": index}, indent=1)
    )
    flat = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    (llm / "config.json").write_text(json.dumps(flat | config | {"attention_bias": False}, indent=1))
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOP)}))
    shutil.copy(options.tokenizer or ROOT / "tests/golden/data/tokenizer.json", llm / "tokenizer.json")


def write_shard(llm: Path, shards: list[dict[str, Any]]) -> None:
    """Write the last shard and keep only its names."""
    save_shard(shards[-1], llm / f"{len(shards)}.part", {"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1])


def reference(options: argparse.Namespace) -> None:
    """Run the original code on the files and record every stage."""
    out: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = work(*args, **kwargs)
        seconds[name] = time.perf_counter() - start
        return result

    front = ref.frontend((options.work / "encoder/am.mvn").read_bytes())
    features = timed("features", ref.run_frontend, front, recording(options))
    model = ref.build_encoder(ENCODER)
    model.load_state_dict(torch.load(options.work / "encoder/model.pt", weights_only=True)["state_dict"])
    states = timed("encoder", ref.encode, model, features[None], [len(features)])
    ctc = timed("ctc", model.ctc.ctc_lo, states)
    del model
    adaptor = ref.Adaptor(**adaptor_shape(options))
    adaptor.load_state_dict(torch.load(options.work / "adaptor.pt", weights_only=True))
    audio = timed("adaptor", adaptor, states)
    del adaptor
    out |= {"features": features.numpy(), "states": states[0].numpy(), "ctc": ctc[0].numpy(), "audio": audio[0].numpy()}
    decoder = Qwen3ForCausalLM.from_pretrained(options.work / "llm", dtype=torch.float32, attn_implementation="eager")
    decoder.eval()
    encode, _ = golden_text.load_tokenizer(options.work / "llm/tokenizer.json")
    runs = {}
    for form in options.forms:
        prompt = golden_text.splice(decoder, golden_text.PROMPTS[form], encode, audio)
        logits = timed(f"decoder {form}", decoder, inputs_embeds=prompt).logits
        out[f"prompt/{form}"], out[f"logits/{form}"] = prompt[0].numpy(), logits[0].numpy()
        ids, margin = timed(
            f"generate {form}",
            ref.generate,
            decoder,
            prompt,
            max_tokens=options.max_tokens,
            stop=STOP,
            repetition_penalty=1.2,
            no_repeat_ngram=4,
        )
        runs[form] = dict(ids=[i for i in ids if i not in STOP], margin=margin)
    facts = dict(runs=runs, seconds=seconds, versions=ref.versions(), threads=torch.get_num_threads())
    save_file({k: np.ascontiguousarray(v) for k, v in out.items()}, options.work / "reference.safetensors")
    (options.work / "reference.json").write_text(json.dumps(facts, indent=1))
