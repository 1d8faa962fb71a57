"""What each stage must reproduce; shared by the tests and by the planted defects that must fail them.

Every check looks its stage up when it runs, so that a defect patched into the package is seen.
"""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np

from qwen4b_asr import adaptor, decoder, encoder, features, generate, prompt, sampling, tokenizer
from qwen4b_asr.cache import KVCache

from .support import DATA, GoldenMismatch, StaleGolden, compare, compare_ids, fill, golden, recorded

WAVEFORMS = (
    "noise_400", "noise_401", "noise_559", "noise_560", "noise_1360", "noise_16000",
    "sine", "silence", "offset", "clipped", "faint", "impulse", "speech",
)  # fmt: skip
LFR_COUNTS = (*range(1, 20), *range(48, 56))
LFR_SHAPES = ((5, 3), (4, 2), (1, 2))
LANGUAGES = ("auto", "zh", "en", "yue", "ja", "ko", "nospeech")


def waveform(name: str) -> mx.array:
    """Return an input of the front end (N,) in [-1, 1]."""
    data = golden("features")
    if name.startswith("noise_"):
        return mx.array(data["input/noise_16000"][: int(name.removeprefix("noise_"))])
    samples = data[f"input/{name}"]
    return mx.array(samples.astype(np.float32) / 32768 if samples.dtype == np.int16 else samples)


def build_frontend() -> features.Frontend:
    """Return the front end with SenseVoiceSmall's statistics."""
    data = golden("features")
    front = features.Frontend(features.FrontendConfig())
    return fill(front, {"cmvn_shift": data["cmvn/shift"], "cmvn_scale": data["cmvn/scale"]})


def check_fbank(name: str) -> None:
    """Filter bank of one waveform."""
    compare(
        features.fbank(waveform(name), features.FrontendConfig()), golden("features")[f"fbank/{name}"], "fbank", name
    )


def check_features(name: str) -> None:
    """Filter bank, frame stacking and normalisation of one waveform."""
    compare(build_frontend()(waveform(name)), golden("features")[f"features/{name}"], "features", name)


def check_lfr(count: int) -> None:
    """Frame stacking 7/6 of `count` frames."""
    data = golden("features")
    compare(features.low_frame_rate(mx.array(data["lfr/input"][:count]), 7, 6), data[f"lfr/{count}"], "exact", "rows")


def build_encoder(variant: str | None = None) -> encoder.SenseVoiceEncoder:
    """Return the golden encoder, or one of its odd variants."""
    data = golden("encoder")
    config = data.fact("config") if variant is None else data.fact("variants")[variant]
    prefix = "weight/" if variant is None else f"{variant}/weight/"
    return fill(encoder.SenseVoiceEncoder(encoder.EncoderConfig(**config)), data.weights(prefix))


def check_encoder_layers(item: int) -> None:
    """Output after each group of layers, at the end, and of the CTC head, for one item."""
    data, model = golden("encoder"), build_encoder()
    groups = {
        "encoders0": model.encoder.encoders0[0],
        "encoders": model.encoder.encoders[-1],
        "after_norm": model.encoder.after_norm,
        "tp_encoders": model.encoder.tp_encoders[-1],
    }
    with recorded(groups) as layers:
        states, mask = model(mx.array(data[f"single/{item}/features"])[None])
    for name in groups:
        compare(layers[name][0], data[f"single/{item}/{name}"], "encoder", f"item {item} after {name}")
    compare(states[0], data[f"single/{item}/states"], "encoder", f"item {item}")
    compare(model.ctc_logits(states)[0], data[f"single/{item}/ctc_logits"], "encoder", f"CTC logits of item {item}")
    compare(mask[0], np.ones(states.shape[1]), "exact", "mask without padding")


def check_encoder_batch() -> None:
    """Real rows of a padded batch whose padding is not zero."""
    data, model = golden("encoder"), build_encoder()
    lengths = data["batch/lengths"]
    rows = np.arange(data["batch/features"].shape[1])
    states, mask = model(mx.array(data["batch/features"]), mx.array(rows[None] < lengths[:, None]))
    compare(mx.sum(mask, axis=1), lengths + 4, "exact", "real rows")
    for item, length in enumerate(lengths):
        wanted = data["batch/states"][item, : length + 4]
        compare(states[item, : length + 4], wanted, "encoder", f"item {item} of the batch")
        compare(wanted, data[f"single/{item}/states"], "encoder", f"the original's own item {item}, batch and single")


def check_encoder_query(language: str, use_itn: bool) -> None:
    """Language and text-normalisation queries."""
    data = golden("encoder")
    states, _ = build_encoder()(mx.array(data["single/2/features"])[None], language=language, use_itn=use_itn)
    compare(states[0], data[f"query/{language}/{int(use_itn)}"], "encoder", f"{language}, ITN {use_itn}")


def check_encoder_variant(name: str) -> None:
    """An encoder of unusual sizes."""
    data = golden("encoder")
    states, _ = build_encoder(name)(mx.array(data[f"{name}/features"])[None])
    compare(states[0], data[f"{name}/states"], "encoder", f"{name} encoder")


def build_adaptor() -> adaptor.Adaptor:
    """Return the golden adaptor."""
    data = golden("adaptor")
    return fill(adaptor.Adaptor(adaptor.AdaptorConfig(**data.fact("config"))), data.weights())


def check_adaptor_layers() -> None:
    """Output of each layer and at the end, for one item."""
    data, model = golden("adaptor"), build_adaptor()
    groups = {f"layers.{i}": layer for i, layer in enumerate(model.transformer.layers)}
    with recorded(groups) as layers:
        output = model(mx.array(data["batch/states"][:1]))
    for name in groups:
        compare(layers[name], data[f"single/{name}"], "adaptor", name)
    compare(output, data["single/output"], "adaptor", "one item")


def check_adaptor_zeros() -> None:
    """Zeros, which leave nothing but biases and norms."""
    data = golden("adaptor")
    shape = (1, 7, data.fact("config")["input_size"])
    compare(build_adaptor()(mx.zeros(shape)), data["zeros/output"], "adaptor", "zeros")


def check_adaptor_batch() -> None:
    """Real rows of a padded batch."""
    data, model = golden("adaptor"), build_adaptor()
    lengths = data["batch/lengths"]
    rows = np.arange(data["batch/states"].shape[1])
    output = model(mx.array(data["batch/states"]), mx.array(rows[None] < lengths[:, None]))
    for item, length in enumerate(lengths):
        compare(output[item, :length], data["batch/output"][item, :length], "adaptor", f"item {item} of the batch")


DECODERS = ("decoder", "generation")  # a head of its own; tied to the embeddings


def build_decoder(name: str) -> decoder.Qwen3:
    """Return a golden decoder."""
    data = golden(name)
    return fill(decoder.Qwen3(decoder.DecoderConfig(**data.fact("config"))), data.weights())


class Cache:
    """The plainest cache: concatenates, may start anywhere."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.held: tuple[mx.array, mx.array] | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append and return everything."""
        if self.held is not None:
            keys = mx.concatenate([self.held[0], keys], axis=2)
            values = mx.concatenate([self.held[1], values], axis=2)
        self.offset += keys.shape[2] - (0 if self.held is None else self.held[0].shape[2])
        self.held = (keys, values)
        return self.held


def check_decoder_ids(name: str) -> None:
    """Logits of a batch of token ids."""
    data, model = golden(name), build_decoder(name)
    compare(model(model.embed(mx.array(data["ids"]))), data["logits/ids"], "decoder", "logits of ids")


def check_decoder_embeds(name: str) -> None:
    """Logits of embeddings."""
    data, model = golden(name), build_decoder(name)
    compare(model(mx.array(data["embeds"])), data["logits/embeds"], "decoder", "logits of embeddings")


def check_decoder_padded(name: str) -> None:
    """Logits on the real rows of a padded batch."""
    data, model = golden(name), build_decoder(name)
    mask = np.arange(data["ids"].shape[1])[None] < data["lengths"][:, None]
    logits = model(model.embed(mx.array(data["ids"])), mask=mx.array(mask))
    for item, length in enumerate(data["lengths"]):
        wanted = data["logits/padded"][item, :length]
        compare(logits[item, :length], wanted, "decoder", f"item {item} of the padded batch")


def check_decoder_steps(name: str, make_cache: Any = None) -> None:
    """Logits of a prompt taken in chunks of 6, 1, 1, 4 and 2 through a cache."""
    data, model = golden(name), build_decoder(name)
    caches = [(make_cache or KVCache)() for _ in model.model.layers]
    embeds, start = model.embed(mx.array(data["ids"])), 0
    for step in range(5):
        wanted = data[f"steps/{step}"]
        logits = model(embeds[:, start : start + wanted.shape[1]], caches)
        compare(logits, wanted, "decoder", f"logits of step {step}")
        start += wanted.shape[1]
    compare(np.array(start), np.array(data["ids"].shape[1]), "exact", "positions taken")


def check_decoder_far(name: str) -> None:
    """Positions that begin at 1000."""
    data, model = golden(name), build_decoder(name)
    caches = [Cache(1000) for _ in model.model.layers]
    logits = model(model.embed(mx.array(data["ids"])), caches)
    compare(logits, data["logits/far"], "decoder", "logits at positions from 1000")


def run_generation(model: decoder.Qwen3, embeds: mx.array, case: dict[str, Any], max_tokens: int) -> list[int]:
    """Generate with the settings of a golden case; the token that stops a run is part of the original's ids."""
    chosen = sampling.SamplingOptions(**case["options"])
    options = generate.GenerationOptions(max_tokens, tuple(case.get("stop", ())), chosen, prefill_chunk=7)
    run = generate.Generation(model, embeds, options)
    ids = list(run)
    return [*ids, *case["stop"]] if run.finish_reason == "stop" else ids


def check_generation(name: str) -> None:
    """Ids that transformers' generate gives for one setting of the processors."""
    data, model = golden("generation"), build_decoder("generation")
    case = data.fact("cases")[name]
    embeds = model.embed(mx.array(case["prompt"]))
    compare_ids(run_generation(model, embeds, case, data.fact("max_tokens")), case["ids"], f"generation {name}")


PROCESSORS = ("penalty_1.2", "ngram_1", "ngram_2", "ngram_3", "ngram_4", "top_k_1", "top_k_7", "top_p_0.3", "top_p_0.9")


def check_processor(name: str) -> None:
    """Scores after one of the processors."""
    data = golden("generation")
    scores, history = mx.array(data["processors/scores"]), data["processors/history"].tolist()
    kind, _, value = name.rpartition("_")
    found = {
        "penalty": lambda: sampling.penalise_repetition(scores, history, float(value)),
        "ngram": lambda: sampling.ban_repeated_ngrams(scores, history, int(value)),
        "top_k": lambda: sampling.keep_top_k(scores, int(value)),
        "top_p": lambda: sampling.keep_top_p(scores, float(value)),
    }[kind]()
    wanted = data[f"processors/{name}"]
    compare(np.isfinite(np.asarray(found)), np.isfinite(wanted), "exact", f"tokens left by {name}")
    kept = np.isfinite(wanted)
    compare(np.asarray(found)[kept], wanted[kept], "decoder", f"scores after {name}")


def run_names() -> list[str]:
    """Return every run of the whole pipeline: profile, task and clip."""
    return sorted(golden("generation").fact("runs"))


def clip_samples(clip: str) -> mx.array:
    """Return the recording of a run, (N,) in [-1, 1]."""
    first, last = golden("generation")[f"{clip}/range"].tolist()
    return waveform("speech")[first:last]


def require_one_set(built: str = "generation", parts: tuple[str, ...] = ("encoder", "adaptor")) -> None:
    """Refuse a file that was built on other weights than the files of those parts hold."""
    for name in parts:
        digest = hashlib.sha256()
        weights = {key: value for key, value in golden(name).tensors.items() if key.startswith("weight/")}
        for key in sorted(weights):
            digest.update(key.encode() + weights[key].tobytes())
        if digest.hexdigest()[:16] != golden(built).fact(f"{name}_weights"):
            raise StaleGolden(
                f"{built}.safetensors was made with another {name}: {golden(built).metadata['regenerate']}"
            )


def check_pipeline(name: str) -> None:
    """Sound to token ids through every stage, each compared on the way."""
    require_one_set()
    data = golden("generation")
    run = data.fact("runs")[name]
    profile, task, clip = name.split("/")
    rows = build_frontend()(clip_samples(clip))
    compare(rows, data[f"{clip}/features"], "features", f"features of {clip}")
    states, _ = build_encoder()(rows[None])
    # From here on the small differences of the features count as well, hence the looser bound.
    compare(states[0], data[f"{clip}/states"], "whole", f"audio states of {clip}")
    audio = build_adaptor()(states)
    compare(audio[0], data[f"{clip}/audio"], "whole", f"audio embeddings of {clip}")
    model, reader = build_decoder("generation"), tokenizer.Tokenizer(DATA / "tokenizer.json")
    before, after = (reader.encode(t) for t in prompt.prompt_pieces(prompt.PromptConfig(), profile, task))
    spelled = [ids for ids in run["piece_ids"] if ids is not None]
    if [ids for ids in (before, after) if ids] != spelled:
        raise GoldenMismatch(f"{name}: the prompt is spelled {(before, after)} instead of {spelled}")
    embeds = prompt.splice(before, audio[0], after, model.embed)
    case = {"options": {"repetition_penalty": 1.2, "no_repeat_ngram": 4}}
    ids = run_generation(model, embeds, case, data.fact("max_tokens"))
    compare_ids(ids, run["ids"], name)
    if reader.decode(ids) != run["text"]:
        raise GoldenMismatch(f"{name}: text {reader.decode(ids)!r} instead of {run['text']!r}")
