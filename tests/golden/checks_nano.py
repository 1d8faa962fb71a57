"""What Fun-ASR-Nano's stages must reproduce; shared by the tests and by the planted defects that must fail them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from qwen4b_asr import decoder, encoder, features, generate, nano_adaptor, nano_prompt, sampling, tokenizer

from .checks import waveform
from .support import DATA, compare, compare_ids, fill, golden, recorded

CLIPS = ("long", "short", "other")
CASES = ("plain", "short", "no_itn", "hotwords", "think_off", "prefix", "history", "text_history")


def clip(name: str) -> mx.array:
    """Return a recording (N,) in [-1, 1]."""
    first, last = golden("nano").fact("clips")[name]
    return waveform("speech")[first:last]


def build_frontend() -> features.Frontend:
    """Return the front end: few mel bins, and no statistics, since Fun-ASR-Nano has none."""
    bins = golden("nano").fact("mel_bins")
    return features.Frontend(features.FrontendConfig(num_mel_bins=bins, cmvn=False))


def build_encoder() -> encoder.SenseVoiceEncoder:
    """Return the golden encoder, without query frames and CTC head."""
    data = golden("nano")
    config = encoder.EncoderConfig(**data.fact("encoder"), num_queries=0, vocab_size=0)
    weights = {f"encoder.{name}": value for name, value in data.weights("weight/audio_encoder.").items()}
    return fill(encoder.SenseVoiceEncoder(config), weights)


def build_adaptor(**changes: Any) -> nano_adaptor.NanoAdaptor:
    """Return the golden adaptor, which keeps every row unless it is told otherwise."""
    data = golden("nano")
    config = nano_adaptor.NanoAdaptorConfig(**{"low_frame_rate": False, **data.fact("adaptor"), **changes})
    return fill(nano_adaptor.NanoAdaptor(config), data.weights("weight/audio_adaptor."))


def build_ctc() -> nano_adaptor.NanoCtc:
    """Return the golden CTC branch."""
    data = golden("nano")
    sizes = data.fact("ctc")
    transformer = nano_adaptor.NanoAdaptorConfig(**sizes["transformer"], low_frame_rate=False)
    config = nano_adaptor.NanoCtcConfig(transformer=transformer, vocab_size=sizes["vocab_size"])
    weights = {f"ctc_decoder.{name}": value for name, value in data.weights("weight/ctc_decoder.").items()}
    weights |= {f"ctc.{name}": value for name, value in data.weights("weight/ctc.").items()}
    return fill(nano_adaptor.NanoCtc(config), weights)


def build_decoder() -> decoder.Qwen3:
    """Return the golden decoder."""
    data = golden("nano")
    return fill(decoder.Qwen3(decoder.DecoderConfig(**data.fact("decoder"))), data.weights("weight/llm."))


def padded() -> tuple[mx.array, mx.array, np.ndarray]:
    """Return a batch of features (B, L, F) whose padding is not zero, its mask and its lengths."""
    data = golden("nano")
    lengths = data["batch/lengths"]
    mask = np.arange(data["batch/features"].shape[1])[None] < lengths[:, None]
    return mx.array(data["batch/features"]), mx.array(mask), lengths


def check_features(name: str) -> None:
    """Filter bank and frame stacking, nothing subtracted."""
    compare(build_frontend()(clip(name)), golden("nano")[f"{name}/features"], "features", name)


def check_encoder(name: str) -> None:
    """Audio states of one clip: as many rows as features."""
    data = golden("nano")
    states, mask = build_encoder()(mx.array(data[f"{name}/features"])[None])
    compare(states[0], data[f"{name}/states"], "encoder", name)
    compare(mask[0], np.ones(len(data[f"{name}/features"])), "exact", "mask without padding")


def check_encoder_batch() -> None:
    """Real rows of a padded batch."""
    data = golden("nano")
    rows, mask, lengths = padded()
    states, out_mask = build_encoder()(rows, mask)
    compare(mx.sum(out_mask, axis=1), lengths, "exact", "real rows")
    for item, length in enumerate(lengths):
        compare(states[item, :length], data["batch/states"][item, :length], "encoder", f"item {item} of the batch")


def check_adaptor(name: str) -> None:
    """Output of each block and at the end."""
    data, model = golden("nano"), build_adaptor()
    groups = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    with recorded(groups) as blocks:
        audio = model(mx.array(data[f"{name}/states"])[None])
    for block in groups:
        compare(blocks[block][0], data[f"{name}/{block}"], "adaptor", f"{name} after {block}")
    compare(audio[0], data[f"{name}/audio"], "adaptor", name)


def check_adaptor_batch() -> None:
    """Real rows of a padded batch."""
    data = golden("nano")
    _, mask, lengths = padded()
    audio = build_adaptor()(mx.array(data["batch/states"]), mask)
    for item, length in enumerate(lengths):
        compare(audio[item, :length], data["batch/audio"][item, :length], "adaptor", f"item {item} of the batch")


def faint_audio(norm_eps: float) -> tuple[mx.array, np.ndarray]:
    """Return the adaptor's output (B, L, H) on variances so small that the norms' epsilon decides, and lengths."""
    data, model = golden("nano"), build_adaptor(norm_eps=norm_eps)
    _, mask, lengths = padded()
    model.linear2.weight = model.linear2.weight * data.fact("faint")
    model.linear2.bias = model.linear2.bias * data.fact("faint")
    return model(mx.array(data["batch/states"]), mask), lengths


def check_epsilon(norm_eps: float) -> None:
    """The epsilon of funasr or of transformers' port."""
    data = golden("nano")
    audio, lengths = faint_audio(norm_eps)
    if norm_eps == 1e-12:
        for item, length in enumerate(lengths):
            compare(audio[item, :length], data["faint/audio"][item, :length], "adaptor", f"faint item {item}")
    else:
        rows = mx.concatenate([audio[item, :length] for item, length in enumerate(lengths.tolist())])
        compare(rows, data["port/faint"], "adaptor", "faint rows of transformers' port")


def check_port_audio() -> None:
    """Features to audio rows as transformers' port computes them, every row of a padded batch."""
    rows, mask, lengths = padded()
    states, out_mask = build_encoder()(rows, mask)
    audio = build_adaptor(norm_eps=1e-5)(states, out_mask)
    real = mx.concatenate([audio[item, :length] for item, length in enumerate(lengths.tolist())])
    compare(real, golden("nano")["port/audio"], "adaptor", "transformers' port")


def check_port_logits() -> None:
    """Scores of the first token when the decoder gets every row."""
    data, model = golden("nano"), build_decoder()
    rows = prompt_rows("plain", model, norm_eps=1e-5, low_frame_rate=False)
    compare(model(rows[None])[0, -1], data["port/logits"], "decoder", "logits of transformers' port")


def check_ctc(name: str) -> None:
    """CTC scores of one clip."""
    data = golden("nano")
    logits = build_ctc().ctc_logits(mx.array(data[f"{name}/states"])[None])
    compare(logits[0], data[f"{name}/ctc_logits"], "adaptor", f"CTC scores of {name}")


def check_ctc_batch() -> None:
    """CTC scores on the real rows of a padded batch."""
    data = golden("nano")
    _, mask, lengths = padded()
    logits = build_ctc().ctc_logits(mx.array(data["batch/states"]), mask)
    for item, length in enumerate(lengths):
        compare(logits[item, :length], data["batch/ctc_logits"][item, :length], "adaptor", f"CTC scores of item {item}")


def asked(case: dict[str, Any]) -> tuple[nano_prompt.NanoPromptConfig, str]:
    """Return the prompt's configuration and the instruction of a case."""
    config = nano_prompt.NanoPromptConfig(empty_think=not case.get("think", True))
    return config, _instruction(config, case)


def _instruction(config: nano_prompt.NanoPromptConfig, settings: dict[str, Any]) -> str:
    if "user" in settings:
        return str(settings["user"])
    return nano_prompt.instruction(
        config,
        hotwords=settings.get("hotwords", ()),
        language=settings.get("language", "auto"),
        use_itn=settings.get("itn", True),
    )


def turns(case: dict[str, Any], audio: dict[str, mx.array]) -> list[nano_prompt.NanoTurn]:
    """Return the earlier turns of a case with the audio rows of their clips."""
    config, _ = asked(case)
    return [
        nano_prompt.NanoTurn(answer, None if name is None else audio[name], _instruction(config, settings))
        for name, settings, answer in case.get("history", [])
    ]


def prompt_rows(name: str, model: decoder.Qwen3, **adaptor: Any) -> mx.array:
    """Return the rows of a case's prompt (S, H), from sound."""
    case = golden("nano").fact("cases")[name]
    front, states, project = build_frontend(), build_encoder(), build_adaptor(**{"low_frame_rate": True, **adaptor})
    clips = {case["clip"], *(clip for clip, _, _ in case.get("history", []) if clip is not None)}
    audio = {name: project(states(front(clip(name))[None])[0])[0] for name in clips}
    config, request = asked(case)
    return nano_prompt.nano_rows(
        config,
        request,
        audio[case["clip"]],
        spell=tokenizer.Tokenizer(DATA / "tokenizer.json").encode,
        embed=model.embed,
        history=turns(case, audio),
        prefix=case.get("prev_text", ""),
    )


def prompt_ids(case: dict[str, Any], encode: Any) -> list[int]:
    """Return the ids of a case's prompt, zeros where its audio goes: FunASR's ``source_ids``."""
    data = golden("nano")

    def zeros(name: str) -> mx.array:
        return mx.zeros((nano_adaptor.NanoAdaptorConfig().rows_kept(len(data[f"{name}/features"])), 1))

    config, request = asked(case)
    audio = {name: zeros(name) for name in CLIPS}
    rows = nano_prompt.nano_rows(
        config,
        request,
        audio[case["clip"]],
        spell=encode,
        embed=lambda ids: ids[:, None].astype(mx.float32),  # each id stands for itself
        history=turns(case, audio),
        prefix=case.get("prev_text", ""),
    )
    return [int(value) for value in np.array(rows[:, 0])]


def check_prompt_ids(name: str) -> None:
    """Token ids of a case's prompt."""
    case = golden("nano").fact("cases")[name]
    reader = tokenizer.Tokenizer(DATA / "tokenizer.json")
    compare_ids(prompt_ids(case, reader.encode), case["source_ids"], f"prompt {name}")


def check_prompt_rows(name: str) -> None:
    """Rows of a case's prompt, from sound; earlier turns were encoded in one padded batch by the original."""
    compare(prompt_rows(name, build_decoder()), golden("nano")[f"embeds/{name}"], "features", f"prompt rows of {name}")


def check_sound_to_ids(name: str) -> None:
    """Token ids that a recording gives."""
    data, model = golden("nano"), build_decoder()
    options = generate.GenerationOptions(data.fact("max_tokens"), (), sampling.SamplingOptions())
    ids = list(generate.Generation(model, prompt_rows(name, model), options))
    compare_ids(ids, data.fact("cases")[name]["ids"], f"case {name}")
