# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""Golden tensors of low-rank adapters: PEFT's own directories, and a Qwen3 that has them."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from golden_stages import DECODER, SEED, Tensors, decoder_model, numpy, save, weights

CONFIG: dict[str, Any] = DECODER | dict(vocab_size=97, num_hidden_layers=2)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    # The first pattern that matches counts, from the end of the path; alpha is looked up apart from the rank.
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 5},
        alpha_pattern={r"layers\.\d+\.mlp\.down_proj": 9, "1.self_attn.k_proj": 3},
    ),
    "stabilised": dict(r=3, lora_alpha=2, use_rslora=True, target_modules=r".*\.(o_proj|gate_proj)"),
}


def add_adapter(model: Any, name: str, seed: int) -> Any:
    """Return a PeftModel whose factors, which would begin at zero, are noise."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name])).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for key, value in sorted(wrapped.named_parameters()):
            if "lora_" in key:
                value.copy_(torch.from_numpy(0.3 * random.standard_normal(value.shape).astype(np.float32)))
    return wrapped


def directory(model: Any) -> Tensors:
    """Return the files of the directory that PEFT writes, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        factors = (Path(folder) / "adapter_model.safetensors").read_bytes()
    for key, value in settings.items():
        if isinstance(value, list):  # a set, written in an order of chance
            settings[key] = sorted(value)
    files = {"adapter_config.json": json.dumps(settings, indent=2).encode(), "adapter_model.safetensors": factors}
    return {name: np.frombuffer(content, np.uint8) for name, content in files.items()}


def make_lora() -> None:
    """Logits with each adapter apart, at half strength and merged; a merged weight; names within a checkpoint."""
    base = decoder_model(CONFIG, SEED + 90)
    out = weights(base)
    ids = torch.from_numpy(np.random.default_rng(SEED + 91).integers(0, CONFIG["vocab_size"], (2, 9)))
    out["ids"] = numpy(ids).astype(np.int32)
    names: dict[str, Any] = {}
    with torch.no_grad():
        out["logits/base"] = numpy(base(input_ids=ids).logits)
        for index, name in enumerate(ADAPTERS):
            model = add_adapter(decoder_model(CONFIG, SEED + 90), name, SEED + 92 + index)
            out |= {f"files/{name}/{file}": content for file, content in directory(model).items()}
            names[name] = {key: list(value.shape) for key, value in sorted(model.state_dict().items())}
            out[f"logits/{name}"] = numpy(model(input_ids=ids).logits)
            layers = {key: m for key, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
            for layer in layers.values():
                layer.set_scale("default", 0.5)
            out[f"logits/{name}/half"] = numpy(model(input_ids=ids).logits)
            for layer in layers.values():
                layer.set_scale("default", 1.0)
            merged = model.merge_and_unload()
            out[f"logits/{name}/merged"] = numpy(merged(input_ids=ids).logits)
            for key in sorted(layers):
                path = key.removeprefix("base_model.model.")
                out[f"merged/{name}/{path}"] = numpy(merged.get_submodule(path).weight)
    facts = dict(config=CONFIG, adapters=list(ADAPTERS), names=names, peft=importlib.metadata.version("peft"))
    save("lora", out, **json.loads(json.dumps(facts)))
