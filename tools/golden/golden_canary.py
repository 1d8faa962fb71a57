# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,attr-defined,untyped-decorator"
"""Golden tensors of Canary-Qwen: mel front end, FastConformer, projection, and sound to token ids through LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import reference as ref
import torch
from golden_stages import DATA, SEED, Tensors, numpy, save, sources, waveforms
from golden_text import AUDIO, MARGIN, load_tokenizer, splice
from torch import nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig, ParakeetFeatureExtractor

MEL_BINS = 128
# Two frames are the fewest that have a deviation; the synthetic inputs are those of features.safetensors.
MEL_INPUTS = (
    "noise_320", "noise_401", "noise_559", "noise_560", "noise_1360", "sine", "offset", "clipped",
    "impulse",
)  # fmt: skip
SPEECH_RANGE = (8000, 28000)

ENCODER: dict[str, Any] = dict(
    input_size=MEL_BINS, output_size=48, attention_heads=4, linear_units=64, num_blocks=3, kernel_size=9,
    subsampling_factor=8, subsampling_channels=8, scale_input=False,
)  # fmt: skip
ODD_ENCODER: dict[str, Any] = dict(
    input_size=20, output_size=16, attention_heads=2, linear_units=24, num_blocks=2, kernel_size=5,
    subsampling_factor=4, subsampling_channels=6, scale_input=True,
)  # fmt: skip
DECODER: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
    max_position_embeddings=4096,
)  # fmt: skip
LORA: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
PROMPT = ["<|im_start|>user\nTranscribe the following: ", AUDIO, "<|im_end|>\n<|im_start|>assistant\n"]
MAX_TOKENS = 24
LENGTHS = (41, 1, 18, 16)

# transformers' names for what NeMo's checkpoint calls otherwise.
NEMO_NAMES = (
    ("subsampling.layers.", "pre_encode.conv."),
    ("subsampling.linear.", "pre_encode.out."),
    (".relative_k_proj.", ".linear_pos."),
    (".q_proj.", ".linear_q."),
    (".k_proj.", ".linear_k."),
    (".v_proj.", ".linear_v."),
    (".o_proj.", ".linear_out."),
    (".bias_u", ".pos_bias_u"),
    (".bias_v", ".pos_bias_v"),
    (".conv.norm.", ".conv.batch_norm."),
)


def build_encoder(config: dict[str, Any], seed: int) -> Any:
    """Return transformers' encoder with noise in every parameter, the batch norms' statistics included."""
    model = ParakeetEncoder(
        ParakeetEncoderConfig(
            hidden_size=config["output_size"],
            num_hidden_layers=config["num_blocks"],
            num_attention_heads=config["attention_heads"],
            intermediate_size=config["linear_units"],
            conv_kernel_size=config["kernel_size"],
            subsampling_factor=config["subsampling_factor"],
            subsampling_conv_channels=config["subsampling_channels"],
            num_mel_bins=config["input_size"],
            scale_input=config["scale_input"],
            attn_implementation="eager",
        )
    ).eval()
    ref.randomise(model, seed, gain=1.2)
    stream = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=stream))
                module.running_var.copy_(0.3 + torch.rand(module.num_features, generator=stream))
    return model


def nemo_state(model: Any, prefix: str) -> Tensors:
    """Return an encoder's state under the checkpoint's names, counters of the batch norms left out."""
    out: Tensors = {}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        name = f".{key}"
        for theirs, nemo in NEMO_NAMES:
            name = name.replace(theirs, nemo)
        out[prefix + name[1:]] = numpy(value)
    return out


@torch.no_grad()
def encode(model: Any, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Encode (B, T, F), of which `lengths` frames are real, to (B, R, D)."""
    mask = torch.arange(features.shape[1])[None] < torch.tensor(lengths)[:, None]
    return model(features, attention_mask=mask).last_hidden_state


@contextlib.contextmanager
def published_rounding(extractor: Any) -> Iterator[None]:
    """Round window and triangles to bfloat16, as the published file holds them."""
    exact, hann = extractor.mel_filters, torch.hann_window

    def rounded(*args: Any, **kwargs: Any) -> torch.Tensor:
        return hann(*args, **kwargs).bfloat16().float()

    extractor.mel_filters = exact.bfloat16().float()
    try:
        with mock.patch.object(torch, "hann_window", rounded):
            yield
    finally:
        extractor.mel_filters = exact


def mel(extractor: Any, samples: np.ndarray) -> torch.Tensor:
    """Return the real frames (T, F) of one recording (N,)."""
    result = extractor(samples, sampling_rate=16000, return_tensors="pt")
    return result["input_features"][0][result["attention_mask"][0]]


def log_mel(extractor: Any, samples: np.ndarray) -> torch.Tensor:
    """Return the real frames (T, F) before normalisation."""
    x = torch.from_numpy(samples)
    x = torch.cat([x[:1], x[1:] - extractor.preemphasis * x[:-1]])
    return extractor._torch_extract_fbank_features(x[None])[0, : len(samples) // extractor.hop_length]


def front_end(speech: np.ndarray) -> Tensors:
    """Mel frames of the synthetic inputs and of speech, with exact and with published window and triangles."""
    extractor = ParakeetFeatureExtractor(feature_size=MEL_BINS)
    synthetic = waveforms()
    out: Tensors = {"mel/fb": numpy(extractor.mel_filters)}
    for name in MEL_INPUTS:
        kind, _, length = name.partition("_")
        samples = synthetic["noise_16000"][: int(length)] if kind == "noise" else synthetic[name]
        out[f"mel/{name}"] = numpy(mel(extractor, samples))
    # Near the guard each bin deviates by some hundredths and in silence not at all; divided by that, the original's
    # frames are its own rounding, enlarged.
    for name in ("faint", "silence"):
        out[f"log/{name}"] = numpy(log_mel(extractor, synthetic[name]))
    out["mel/speech"] = numpy(mel(extractor, speech))
    with published_rounding(extractor):
        out["mel/speech_rounded"] = numpy(mel(extractor, speech))
    return out


def encoders(model: Any) -> Tensors:
    """Single items after every part of a layer's stack, the same items in a padded batch, and an odd encoder."""
    out: Tensors = {}
    random = np.random.default_rng(SEED + 210)
    groups = {"pre_encode": model.subsampling, "layers.0": model.layers[0], "layers.1": model.layers[1]}
    groups |= {"attention": model.layers[0].self_attn, "conv": model.layers[0].conv}
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), MEL_BINS)
    for index, length in enumerate(LENGTHS):
        padded[index, :length] = torch.from_numpy(random.standard_normal((length, MEL_BINS)).astype(np.float32))
        with ref.recorded(groups) as parts:
            states = encode(model, padded[index : index + 1, :length], [length])
        out[f"single/{index}/states"] = numpy(states[0])
        if index == 0:
            out |= {f"single/0/{name}": numpy(value[0]) for name, value in parts.items()}
    out["batch/features"], out["batch/lengths"] = numpy(padded), np.array(LENGTHS, np.int32)
    out["batch/states"] = numpy(encode(model, padded, LENGTHS))
    odd = build_encoder(ODD_ENCODER, SEED + 220)
    features = torch.from_numpy(random.standard_normal((1, 23, ODD_ENCODER["input_size"])).astype(np.float32))
    out |= nemo_state(odd, "odd/weight/")
    out["odd/features"], out["odd/states"] = numpy(features[0]), numpy(encode(odd, features, [23])[0])
    return out


@torch.no_grad()
def build_decoder(seed: int) -> tuple[Any, Tensors]:
    """Return a decoder with LoRA added into its weights, and the same apart under the checkpoint's names."""
    model = ref.build_decoder(DECODER)
    ref.randomise(model, seed, gain=1.3, embedding=0.5)
    stream = torch.Generator().manual_seed(seed + 1)
    out: Tensors = {"embed_tokens.weight": numpy(model.model.embed_tokens.weight).copy()}
    for key, value in model.model.named_parameters():
        name = f"llm.base_model.model.model.{key}"
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in LORA["target_modules"]:
            down = torch.randn(LORA["r"], value.shape[1], generator=stream) / value.shape[1] ** 0.5
            up = 0.3 * torch.randn(value.shape[0], LORA["r"], generator=stream)
            stem = name.removesuffix(".weight")
            out[f"{stem}.base_layer.weight"] = numpy(value).copy()
            out[f"{stem}.lora_A.default.weight"], out[f"{stem}.lora_B.default.weight"] = numpy(down), numpy(up)
            value += LORA["lora_alpha"] / LORA["r"] * up @ down
        elif module != "embed_tokens":
            out[name] = numpy(value)
    return model, out


def make_canary() -> None:
    """A whole tiny checkpoint under the published names, each stage of it, and ids of one recording."""
    first, last = SPEECH_RANGE
    speech = sources()[0].astype(np.float32)[first:last] / 32768
    encoder = build_encoder(ENCODER, SEED + 200)
    projection = nn.Linear(ENCODER["output_size"], DECODER["hidden_size"])
    ref.randomise(projection, SEED + 230, gain=1.2)
    out = front_end(speech) | encoders(encoder)
    out |= nemo_state(encoder, "weight/perception.encoder.")
    out |= {f"weight/perception.proj.{key}": numpy(value) for key, value in projection.named_parameters()}
    states = encode(encoder, torch.from_numpy(out["mel/speech"])[None], [len(out["mel/speech"])])
    with torch.no_grad():
        audio = projection(states)
    out["speech/range"] = np.array(SPEECH_RANGE, np.int32)
    out["speech/states"], out["speech/audio"] = numpy(states[0]), numpy(audio[0])
    text_ids, _ = load_tokenizer(DATA / "tokenizer.json")
    for seed in range(SEED + 240, SEED + 440):
        decoder, decoder_weights = build_decoder(seed)
        embeds = splice(decoder, PROMPT, text_ids, audio)
        ids, margin = ref.generate(decoder, embeds, max_tokens=MAX_TOKENS)
        if margin >= MARGIN and len(set(ids)) > MAX_TOKENS // 2:
            break
    else:
        raise SystemExit("no seed gives a varied sequence with clear margins: lower MARGIN or widen the search")
    with torch.no_grad():
        out["speech/logits"] = numpy(decoder(inputs_embeds=embeds).logits[0, -1])
    out |= {f"weight/{key}": value for key, value in decoder_weights.items()}
    run = dict(ids=ids, margin=margin, pieces=PROMPT, piece_ids=[None if p == AUDIO else text_ids(p) for p in PROMPT])
    save("canary", out, encoder=ENCODER, odd_encoder=ODD_ENCODER, decoder=DECODER, lora=LORA, run=run)
