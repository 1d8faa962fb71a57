"""What Canary-Qwen's stages must reproduce, shared by the tests and by the planted defects that must fail them.

The golden file holds a checkpoint under the published names, so every check also goes through its key map.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from qwen4b_asr import decoder, fastconformer, lora, mel, projection
from qwen4b_asr.weights.keymap import load_keymap

from .checks import run_generation, waveform
from .support import compare, compare_ids, golden, recorded

MEL_INPUTS = (
    "noise_320", "noise_401", "noise_559", "noise_560", "noise_1360", "sine", "offset", "clipped",
    "impulse", "speech",
)  # fmt: skip


def fill_from_checkpoint(module: Any, tensors: dict[str, np.ndarray], part: str = "") -> Any:
    """Fill the model, or one part of it, with the tensors of a checkpoint by the package's own key map."""
    prefix = f"{part}." if part else ""
    parameters = {f"{prefix}{name}": value.shape for name, value in tree_flatten(module.parameters())}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    plan = load_keymap("canary").plan(shapes, parameters, file="canary.safetensors")
    weights = []
    for assignment in plan.assignments:
        (source,) = assignment.sources
        value = tensors[source].reshape(parameters[assignment.target])
        weights.append((assignment.target.removeprefix(prefix), mx.array(value)))
    module.update(tree_unflatten(weights))
    module.eval()
    return module


def canary_waveform(name: str) -> mx.array:
    """Return an input of the front end (N,) in [-1, 1]."""
    if name != "speech":
        return waveform(name)
    first, last = golden("canary")["speech/range"]
    return waveform("speech")[int(first) : int(last)]


def build_frontend(rounded: bool = False) -> mel.MelFrontend:
    """Return the front end; `rounded` fills it with the window and triangles that the published file holds."""
    front = mel.MelFrontend(mel.MelConfig())
    if not rounded:
        return front
    fb, window = mx.array(golden("canary")["mel/fb"])[None], mel.hann_window(400)
    tensors = {
        f"perception.preprocessor.featurizer.{name}": np.array(value.astype(mx.bfloat16).astype(mx.float32))
        for name, value in (("fb", fb), ("window", window))
    }
    filled: mel.MelFrontend = fill_from_checkpoint(front, tensors, "frontend")
    return filled


def check_mel(name: str) -> None:
    """Mel frames of one waveform."""
    compare(build_frontend()(canary_waveform(name)), golden("canary")[f"mel/{name}"], "features", name)


def check_log_mel() -> None:
    """Mel energies near the guard, before normalisation."""
    for name in ("faint", "silence"):
        compare(build_frontend().log_mel(canary_waveform(name)), golden("canary")[f"log/{name}"], "fbank", name)


def check_mel_rounded() -> None:
    """Mel frames by the window and the triangles of the published file."""
    frames = build_frontend(rounded=True)(canary_waveform("speech"))
    compare(frames, golden("canary")["mel/speech_rounded"], "features", "speech, rounded triangles")


def build_encoder(variant: str = "") -> fastconformer.FastConformerEncoder:
    """Return the golden encoder, or the odd one."""
    data = golden("canary")
    config = fastconformer.FastConformerConfig(**data.fact("odd_encoder" if variant else "encoder"))
    prefix = f"{variant}/weight/" if variant else "weight/perception.encoder."
    tensors = {f"perception.encoder.{name}": value for name, value in data.weights(prefix).items()}
    encoder: fastconformer.FastConformerEncoder = fill_from_checkpoint(
        fastconformer.FastConformerEncoder(config), tensors, "audio_encoder"
    )
    return encoder


def check_encoder_parts(encoder: Any = None) -> None:
    """Output of the subsampling, of the first layer's attention and convolution, and of the layers."""
    data = golden("canary")
    model = encoder or build_encoder()
    parts = {
        "attention": model.layers[0].self_attn,
        "conv": model.layers[0].conv,
        "layers.0": model.layers[0],
        "layers.1": model.layers[1],
    }
    features = mx.array(data["batch/features"][:1])
    rows, _ = model.pre_encode(features, None)
    compare(rows[0], data["single/0/pre_encode"], "encoder", "rows after the subsampling")
    with recorded(parts) as outputs:
        states, _ = model(features)
    for name in parts:
        compare(outputs[name][0], data[f"single/0/{name}"], "encoder", f"after {name}")
    compare(states[0], data["single/0/states"], "encoder", "states")


def check_encoder_item(item: int, encoder: Any = None) -> None:
    """States of one item without padding."""
    data = golden("canary")
    length = int(data["batch/lengths"][item])
    states, mask = (encoder or build_encoder())(mx.array(data["batch/features"][item : item + 1, :length]))
    compare(states[0], data[f"single/{item}/states"], "encoder", f"item {item}")
    compare(mask[0], np.ones(states.shape[1]), "exact", "mask without padding")


@cache
def noisy_padding() -> np.ndarray:
    """The batch's features with noise behind the end of each item; the original's own front end leaves zeros there."""
    data = golden("canary")
    features, lengths = data["batch/features"], data["batch/lengths"]
    noise = 3.0 * np.random.default_rng(7).standard_normal(features.shape).astype(np.float32)
    real = np.arange(features.shape[1])[None] < lengths[:, None]
    mixed: np.ndarray = np.where(real[..., None], features, noise)
    return mixed


def check_encoder_batch(encoder: Any = None) -> None:
    """Real rows of a padded batch: those of the original's batch, and of its items alone."""
    data = golden("canary")
    lengths = data["batch/lengths"]
    model = encoder or build_encoder()
    mask = mx.array(np.arange(data["batch/features"].shape[1])[None] < lengths[:, None])
    states, rows = model(mx.array(noisy_padding()), mask)
    real = [model.config.rows(int(length)) for length in lengths]
    compare(mx.sum(rows, axis=1), np.array(real), "exact", "real rows")
    for item, count in enumerate(real):
        compare(states[item, :count], data["batch/states"][item, :count], "encoder", f"item {item} of the batch")
        compare(states[item, :count], data[f"single/{item}/states"], "encoder", f"item {item} of the batch, alone")


def check_odd_encoder() -> None:
    """Another subsampling factor, scaled input, short kernel."""
    data = golden("canary")
    states, _ = build_encoder("odd")(mx.array(data["odd/features"])[None])
    compare(states[0], data["odd/states"], "encoder", "odd encoder")


def build_projection() -> projection.Projection:
    """Return the golden projection."""
    data = golden("canary")
    tensors = {f"perception.proj.{n}": value for n, value in data.weights("weight/perception.proj.").items()}
    rows, width = tensors["perception.proj.weight"].shape
    module = projection.Projection(projection.ProjectionConfig(input_size=width, output_size=rows))
    filled: projection.Projection = fill_from_checkpoint(module, tensors, "adaptor")
    return filled


def check_speech() -> None:
    """From a recording to the rows that the decoder reads."""
    data = golden("canary")
    states, mask = build_encoder()(build_frontend()(canary_waveform("speech"))[None])
    compare(states[0], data["speech/states"], "whole", "states of speech")
    compare(build_projection()(states, mask)[0], data["speech/audio"], "whole", "audio rows of speech")


class Stages(nn.Module):
    """All stages under the names that they have in a model, LoRA kept apart."""

    def __init__(self) -> None:
        super().__init__()
        data = golden("canary")
        encoder, llm, adapter = data.fact("encoder"), data.fact("decoder"), data.fact("lora")
        sizes = projection.ProjectionConfig(input_size=encoder["output_size"], output_size=llm["hidden_size"])
        self.frontend = mel.MelFrontend(mel.MelConfig())
        self.audio_encoder = fastconformer.FastConformerEncoder(fastconformer.FastConformerConfig(**encoder))
        self.adaptor = projection.Projection(sizes)
        self.decoder = decoder.Qwen3(decoder.DecoderConfig(**llm))
        config = lora.LoraConfig(adapter["r"], adapter["lora_alpha"], tuple(adapter["target_modules"]))
        lora.build_lora(self.decoder, config)


def build_stages() -> Stages:
    """Return the golden checkpoint as a whole, by its key map."""
    data = golden("canary")
    featurizer = {"fb": data["mel/fb"][None], "window": np.array(mel.hann_window(400))}
    tensors = data.weights() | {f"perception.preprocessor.featurizer.{n}": v for n, v in featurizer.items()}
    filled: Stages = fill_from_checkpoint(Stages(), tensors)
    return filled


def check_ids(adapters: str) -> None:
    """From a recording to token ids, with the adapters kept apart (keep), merged, or folded in for good (fuse)."""
    data, model = golden("canary"), build_stages()
    if adapters != "keep":
        {"merge": lora.merge_lora, "fuse": lora.fuse_lora}[adapters](model.decoder)
    model.audio_encoder.fold_batch_norms()
    states, mask = model.audio_encoder(model.frontend(canary_waveform("speech"))[None])
    audio = model.adaptor(states, mask)[0]
    run = data.fact("run")
    rows = mx.concatenate([audio if ids is None else model.decoder.embed(mx.array(ids)) for ids in run["piece_ids"]])
    logits = model.decoder(rows[None])[0]
    compare(logits if logits.ndim == 1 else logits[-1], data["speech/logits"], "whole", "logits after the prompt")
    compare_ids(run_generation(model.decoder, rows, {"options": {}}, len(run["ids"])), run["ids"], "speech")
