# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""Golden tensors of the single stages: front end, encoder, adaptor, decoder; and how a golden file is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import reference as ref
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

SCHEMA = 1
DATA = Path(__file__).resolve().parents[2] / "tests" / "golden" / "data"
SEED = 20251
Tensors = dict[str, np.ndarray]

NOISE_LENGTHS = (400, 401, 559, 560, 1360, 16000)
SPEECH_START, SPEECH_SAMPLES = 11200, 48000
LFR_COUNTS = (*range(1, 20), 48, 49, 50, 51, 52, 53, 54, 55)

ENCODER: dict[str, Any] = dict(
    input_size=560, output_size=64, attention_heads=4, linear_units=96, num_blocks=3, tp_blocks=2, kernel_size=11,
    sanm_shift=0, vocab_size=48,
)  # fmt: skip
# Input as wide as the output keeps the residual of the first layer; the shifted filter is the streaming variant's.
ENCODER_VARIANTS: dict[str, dict[str, Any]] = {
    "square": dict(
        input_size=24, output_size=24, attention_heads=3, linear_units=40, num_blocks=2, tp_blocks=1, kernel_size=5,
        sanm_shift=0, vocab_size=20,
    ),
    "shifted": dict(
        input_size=36, output_size=24, attention_heads=2, linear_units=40, num_blocks=2, tp_blocks=1, kernel_size=7,
        sanm_shift=2, vocab_size=20,
    ),
}  # fmt: skip
ADAPTOR: dict[str, Any] = dict(
    input_size=64, hidden_size=80, output_size=64, num_layers=2, num_heads=4, ffn_size=160, norm_eps=1e-5
)
DECODER: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
    max_position_embeddings=4096,
)  # fmt: skip
LANGUAGES = ("auto", "zh", "en", "yue", "ja", "ko", "nospeech")


def numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a contiguous copy as numpy."""
    return np.ascontiguousarray(tensor.detach().numpy())


def save(name: str, tensors: Tensors, **facts: Any) -> None:
    """Write one golden file with what a reader needs to trust and remake it."""
    metadata = {
        "schema": str(SCHEMA),
        "seed": str(SEED),
        "versions": json.dumps(ref.versions()),
        "regenerate": f"python tools/golden/make_golden.py --only {name}",
        **{key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()},
    }
    path = DATA / f"{name}.safetensors"
    content = serialise({key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata)
    # The library writes the header in an order of chance; sorted, the same numbers are the same file.
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB")


def weights(module: torch.nn.Module, prefix: str = "weight/") -> Tensors:
    """Return the parameters under their torch names; a tied head appears once, as in a checkpoint."""
    return {prefix + key: numpy(value) for key, value in module.named_parameters()}


def fingerprint(tensors: Tensors) -> str:
    """Return a digest of a set of weights, so that a golden that builds on another file notices a change there."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].tobytes())
    return digest.hexdigest()[:16]


def sources(speech: Path | None = None, mvn: Path | None = None) -> tuple[np.ndarray, bytes]:
    """Return the recording (N,) int16 at 16 kHz and the am.mvn text."""
    stored = DATA / "features.safetensors"
    if speech is not None:
        import soundfile

        samples, rate = soundfile.read(speech, dtype="int16")
        if rate != 16000 or samples.ndim != 1:
            raise SystemExit(f"{speech}: the excerpt must be 16 kHz mono, got {rate} Hz and shape {samples.shape}")
        excerpt = samples[SPEECH_START : SPEECH_START + SPEECH_SAMPLES]
    else:
        excerpt = load_file(stored)["input/speech"]
    text = mvn.read_bytes() if mvn is not None else load_file(stored)["source/am_mvn"].tobytes()
    return excerpt, text


def waveforms() -> Tensors:
    """Return every synthetic input of the front end by name, float32 in [-1, 1]."""
    random = np.random.default_rng(SEED)
    time = np.arange(4000) / 16000
    noise = (0.3 * random.standard_normal(max(NOISE_LENGTHS))).clip(-1, 1)
    impulse = np.zeros(1200)
    impulse[0], impulse[640] = 1.0, -0.5
    signals = {
        "sine": 0.5 * np.sin(2 * np.pi * 440 * time),
        "silence": np.zeros(1360),
        "offset": 0.25 + 0.05 * random.standard_normal(1700),
        "clipped": np.sign(np.sin(2 * np.pi * 1234 * time[:2000])),
        "faint": 1e-4 * random.standard_normal(1500),
        "impulse": impulse,
    } | {f"noise_{length}": noise[:length] for length in NOISE_LENGTHS}
    return {name: value.astype(np.float32) for name, value in signals.items()}


def make_features(speech: Path | None, mvn: Path | None) -> None:
    """Fbank, frame stacking and normalisation by funasr's WavFrontend."""
    excerpt, mvn_text = sources(speech, mvn)
    out: Tensors = {"input/speech": excerpt, "source/am_mvn": np.frombuffer(mvn_text, np.uint8)}
    signals = waveforms() | {"speech": excerpt.astype(np.float32) / 32768}
    plain, unscaled = ref.frontend(lfr=False), ref.frontend(lfr=False, upscale=False)
    whole = ref.frontend(mvn_text)
    for name, samples in signals.items():
        out.setdefault(f"input/{name}", samples)
        out[f"fbank/{name}"] = numpy(ref.run_frontend(plain, samples))
        out[f"features/{name}"] = numpy(ref.run_frontend(whole, samples))
    for name in [key for key in out if key.startswith("input/noise_") and key != "input/noise_16000"]:
        del out[name]  # prefixes of the longest
    unit = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    out["unscaled/sine"] = numpy(ref.run_frontend(unscaled, unit))
    cmvn = numpy(whole.cmvn)
    out["cmvn/shift"], out["cmvn/scale"] = cmvn[0], cmvn[1]
    stack = torch.from_numpy(np.random.default_rng(SEED + 1).standard_normal((max(LFR_COUNTS), 3)).astype(np.float32))
    out["lfr/input"] = numpy(stack)
    for count in LFR_COUNTS:
        out[f"lfr/{count}"] = numpy(ref.apply_lfr(stack[:count].clone(), 7, 6))
    for m, n in ((5, 3), (4, 2), (1, 2)):
        out[f"lfr/{m}x{n}"] = numpy(ref.apply_lfr(stack[:23].clone(), m, n))
    save("features", out, note="speech: excerpt of a FunASR example recording, MIT; am.mvn: SenseVoiceSmall, MIT")


def random_features(seed: int, rows: int, width: int) -> torch.Tensor:
    """Return features with the unit variance that normalisation leaves."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32))


def encoder_model(config: dict[str, Any], seed: int) -> Any:
    """Return a tiny encoder whose attention is far from uniform."""
    model = ref.build_encoder(config)
    ref.randomise(model, seed, gain=1.2, embedding=1.0)
    return model


def make_encoder() -> None:
    """SenseVoiceSmall: layer groups, padding, every query, the CTC head; two odd variants."""
    model = encoder_model(ENCODER, SEED + 10)
    out = weights(model)
    groups = {
        "encoders0": model.encoder.encoders0[0],
        "encoders": model.encoder.encoders[-1],
        "after_norm": model.encoder.after_norm,
        "tp_encoders": model.encoder.tp_encoders[-1],
    }
    lengths = (17, 1, 9)
    items = [random_features(SEED + 20 + i, length, ENCODER["input_size"]) for i, length in enumerate(lengths)]
    with ref.recorded(groups) as layers:
        for index, item in enumerate(items):
            states = ref.encode(model, item[None], [len(item)])
            out[f"single/{index}/features"], out[f"single/{index}/states"] = numpy(item), numpy(states[0])
            for name, value in layers.items():
                out[f"single/{index}/{name}"] = numpy(value[0])
            with torch.no_grad():
                out[f"single/{index}/ctc_logits"] = numpy(model.ctc.ctc_lo(states[0]))
    # What stands behind an item's end must not matter; zeros could hide that it does.
    padded = 3.0 * random_features(SEED + 30, len(items) * max(lengths), ENCODER["input_size"])
    padded = padded.reshape(len(items), max(lengths), -1)
    for index, item in enumerate(items):
        padded[index, : len(item)] = item
    out["batch/features"], out["batch/lengths"] = numpy(padded), np.array(lengths, np.int32)
    out["batch/states"] = numpy(ref.encode(model, padded, lengths))
    for language in LANGUAGES:
        for use_itn in (False, True):
            states = ref.encode(model, items[2][None], [9], language=language, use_itn=use_itn)
            out[f"query/{language}/{int(use_itn)}"] = numpy(states[0])
    for index, (name, config) in enumerate(ENCODER_VARIANTS.items()):
        variant = encoder_model(config, SEED + 40 + index)
        item = random_features(SEED + 50 + index, 11, config["input_size"])
        out |= weights(variant, f"{name}/weight/")
        out[f"{name}/features"] = numpy(item)
        out[f"{name}/states"] = numpy(ref.encode(variant, item[None], [11])[0])
    save("encoder", out, config=ENCODER, variants=ENCODER_VARIANTS)


def make_adaptor() -> None:
    """The post-norm adaptor: one item, a padded batch, and zeros."""
    model = ref.Adaptor(**ADAPTOR)
    ref.randomise(model, SEED + 60, gain=1.2)
    out = weights(model)
    lengths = (13, 5, 1)
    states = torch.from_numpy(
        np.random.default_rng(SEED + 61).standard_normal((3, max(lengths), ADAPTOR["input_size"])).astype(np.float32)
    )
    padding = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    groups = {f"layers.{i}": layer for i, layer in enumerate(model.transformer.layers)}
    with torch.no_grad(), ref.recorded(groups) as layers:
        out["batch/output"] = numpy(model(states, padding))
        out["single/output"] = numpy(model(states[:1]))
        for name, value in layers.items():
            out[f"single/{name}"] = numpy(value)
        out["zeros/output"] = numpy(model(torch.zeros(1, 7, ADAPTOR["input_size"])))
    out["batch/states"], out["batch/lengths"] = numpy(states), np.array(lengths, np.int32)
    save("adaptor", out, config=ADAPTOR)


def decoder_model(config: dict[str, Any], seed: int) -> Any:
    """Return a tiny decoder whose logits are a few units apart."""
    model = ref.build_decoder(config)
    ref.randomise(model, seed, gain=1.3, embedding=0.5)
    return model


def decoder_activations(model: Any, config: dict[str, Any]) -> Tensors:
    """Logits for ids, embeddings, a padded batch, and a prompt taken in chunks through the cache."""
    random = np.random.default_rng(SEED + 70)
    ids = torch.from_numpy(random.integers(0, config["vocab_size"], (2, 14)))
    embeds = torch.from_numpy(random.standard_normal((1, 11, config["hidden_size"])).astype(np.float32))
    lengths = (14, 6)
    mask = (torch.arange(14)[None] < torch.tensor(lengths)[:, None]).long()
    out: Tensors = {"ids": numpy(ids).astype(np.int32), "embeds": numpy(embeds), "lengths": np.array(lengths, np.int32)}
    with torch.no_grad():
        out["logits/ids"] = numpy(model(input_ids=ids).logits)
        out["logits/embeds"] = numpy(model(inputs_embeds=embeds).logits)
        out["logits/padded"] = numpy(model(input_ids=ids, attention_mask=mask).logits)
        cache, start = None, 0
        for step, width in enumerate((6, 1, 1, 4, 2)):
            result = model(input_ids=ids[:, start : start + width], past_key_values=cache, use_cache=True)
            cache, start = result.past_key_values, start + width
            out[f"steps/{step}"] = numpy(result.logits)
        # Positions far from zero, where a wrong frequency or angle shows.
        far = torch.arange(1000, 1014)[None].expand(2, -1)
        out["logits/far"] = numpy(model(input_ids=ids, position_ids=far).logits)
    return out


def make_decoder() -> None:
    """Qwen3 with a head of its own; the tied one is in generation.safetensors, with what it says."""
    config = DECODER | dict(vocab_size=131, tie_word_embeddings=False, num_attention_heads=6, num_key_value_heads=3)
    model = decoder_model(config, SEED + 80)
    save("decoder", weights(model) | decoder_activations(model, config), config=config)
