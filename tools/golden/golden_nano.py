# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,misc,untyped-decorator"
"""Golden tensors of Fun-ASR-Nano: funasr's FunASRNano from sound to token ids, and transformers' port of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import reference as ref
import torch
from golden_stages import DATA, SCHEMA, SEED, Tensors, numpy, save, sources, weights
from transformers import (
    FunAsrNanoConfig,
    FunAsrNanoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

with contextlib.redirect_stdout(io.StringIO()):
    import funasr.models.llm_asr.adaptor  # noqa: F401
    from funasr.models.fun_asr_nano.model import FunASRNano

MEL_BINS = 8
ENCODER: dict[str, Any] = dict(
    output_size=32, attention_heads=4, linear_units=48, num_blocks=3, tp_blocks=2, kernel_size=11, sanm_shift=0
)
ADAPTOR: dict[str, Any] = dict(hidden_size=40, output_size=64, num_layers=2, num_heads=8, ffn_size=16)
CTC: dict[str, Any] = dict(hidden_size=24, output_size=32, num_layers=2, num_heads=8, ffn_size=8)
CTC_SYMBOLS = 29
DECODER: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
    max_position_embeddings=4096,
)  # fmt: skip
AUDIO_TOKEN = 318  # of the tiny vocabulary, said by no prompt: transformers finds the audio's place by it
CLIPS = {"long": (0, 48000), "short": (28000, 36500), "other": (4000, 23000)}
MAX_TOKENS, MARGIN = 20, 5e-3
FAINT = 2.0**-10
KEPT_EMBEDDINGS = ("hotwords", "history")

# What is asked; `history` holds (clip, instruction's settings, answer) and `think` is dataset_conf.do_think.
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(clip="long"),
    "short": dict(clip="short", language="英文"),
    "no_itn": dict(clip="long", itn=False, language="中文"),
    "hotwords": dict(clip="other", hotwords=["开放时间", "Qwen 3"], language="日文"),
    "think_off": dict(clip="other", think=False, itn=False),
    "prefix": dict(clip="short", prev_text="我想"),
    "history": dict(
        clip="short", language="中文",
        history=[("long", {}, "滨海新区"), ("other", dict(hotwords=["房"], itn=False), "\ntwo  words")],
    ),
    "text_history": dict(clip="other", history=[(None, dict(user="你好。"), "你好！")], think=False),
}  # fmt: skip


class _Symbols:
    """Stands in for the CTC tokenizer, whose text nobody reads here."""


def build(seed: int, gain: float = 1.2) -> Any:
    """Return an evaluation-mode FunASRNano with noise in every parameter, of `gain` as in `reference.randomise`."""
    encoder = {key: value for key, value in ENCODER.items() if key != "sanm_shift"}
    with tempfile.TemporaryDirectory() as folder:
        ref.decoder_config(DECODER).save_pretrained(folder)
        model = FunASRNano(
            audio_encoder="SenseVoiceEncoderSmall",
            audio_encoder_conf=dict(sanm_shfit=ENCODER["sanm_shift"], normalize_before=True, **encoder),
            audio_adaptor="Transformer",
            audio_adaptor_conf=dict(
                downsample_rate=1, use_low_frame_rate=True, ffn_dim=ADAPTOR["hidden_size"],
                llm_dim=ADAPTOR["output_size"], n_layer=ADAPTOR["num_layers"],
            ),
            llm="Qwen3",
            llm_conf=dict(init_param_path=folder, load_kwargs=dict(attn_implementation="eager")),
            input_size=7 * MEL_BINS,
            ctc_decoder="Transformer",
            ctc_decoder_conf=dict(
                downsample_rate=1, ffn_dim=CTC["hidden_size"], llm_dim=CTC["output_size"], n_layer=CTC["num_layers"]
            ),
            ctc_tokenizer=_Symbols(),
            ctc_tokenizer_conf=None,
            ctc_vocab_size=CTC_SYMBOLS,
        )  # fmt: skip
    for index, part in enumerate((model.audio_encoder, model.audio_adaptor, model.ctc_decoder, model.ctc)):
        ref.randomise(part, seed + index, gain=gain)
    ref.randomise(model.llm, seed + 10, gain=gain + 0.1, embedding=0.5)
    return model.eval()


def conversation(model: Any, case: dict[str, Any], audio: Callable[[str], torch.Tensor]) -> list[dict[str, Any]]:
    """Return the chat that `inference` would build, earlier turns before it."""

    def turns(clip: str | None, settings: dict[str, Any], answer: str) -> list[dict[str, Any]]:
        if clip is None:
            return [dict(role="user", content=settings["user"]), dict(role="assistant", content=answer)]
        prompt = model.get_prompt(settings.get("hotwords", []), settings.get("language"), settings.get("itn", True))
        chat = model.generate_chatml(prompt, audio(clip))
        return [chat[1], dict(role="assistant", content=answer)]

    chat = [dict(role="system", content="You are a helpful assistant.")]
    for clip, settings, answer in case.get("history", []):
        chat += turns(clip, settings, answer)
    return chat + turns(case["clip"], case, "null")


def options(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case's arguments of `inference_prepare`."""
    chosen: dict[str, Any] = dict(device="cpu")
    if "think" in case:
        chosen["dataset_conf"] = dict(do_think=case["think"])
    if "prev_text" in case:
        chosen["prev_text"] = case["prev_text"]
    return chosen


def frontend() -> Any:
    """Return funasr's front end with few mel bins; Fun-ASR-Nano normalises nothing."""
    front = ref.frontend()
    front.n_mels = MEL_BINS
    return front


@torch.no_grad()
def attempt(seed: int, clips: dict[str, torch.Tensor], tokenizer: Any) -> tuple[Any, dict[str, Any], Tensors] | None:
    """Generate every case with the weights of one seed, or give up where a step was too close."""
    model, front = build(seed), frontend()
    facts, out = {}, {}
    for name, case in CASES.items():
        embeds, _, _, source_ids, _ = model.inference_prepare(
            [conversation(model, case, clips.__getitem__)], None, None, tokenizer, front, **options(case)
        )
        ids, margin = ref.generate(model.llm, embeds, max_tokens=MAX_TOKENS)
        if margin < MARGIN:
            return None
        facts[name] = case | dict(source_ids=source_ids[0].tolist(), ids=ids, margin=margin)
        if name in KEPT_EMBEDDINGS:
            out[f"embeds/{name}"] = numpy(embeds[0])
    if len({tuple(fact["ids"]) for fact in facts.values()}) < len(facts):
        return None
    return model, facts, out


@torch.no_grad()
def stages(model: Any, clips: dict[str, torch.Tensor]) -> Tensors:
    """Encoder, adaptor and CTC branch: each clip alone, and a batch whose padding is not zero."""
    out: Tensors = {}
    items = {name: ref.run_frontend(frontend(), numpy(clip)) for name, clip in clips.items()}
    blocks = {f"blocks.{i}": block for i, block in enumerate(model.audio_adaptor.blocks)}
    for name, features in items.items():
        lengths = torch.tensor([len(features)])
        states, _ = model.encode(features[None].clone(), lengths)
        with ref.recorded(blocks) as layers:
            audio, _ = model.audio_adaptor(states, lengths)
        logits = model.ctc.ctc_lo(model.ctc_decoder(states, lengths)[0])
        out |= {
            f"{name}/features": numpy(features),
            f"{name}/states": numpy(states[0]),
            f"{name}/audio": numpy(audio[0]),
            f"{name}/ctc_logits": numpy(logits[0]),
            **{f"{name}/{key}": numpy(value[0]) for key, value in layers.items()},
        }
    lengths = torch.tensor([len(features) for features in items.values()])
    padded = (
        3.0
        * torch.from_numpy(
            np.random.default_rng(SEED + 200).standard_normal((len(items), int(lengths.max()), 7 * MEL_BINS))
        ).float()
    )
    for index, features in enumerate(items.values()):
        padded[index, : len(features)] = features
    states, _ = model.encode(padded.clone(), lengths)
    out["batch/features"], out["batch/lengths"] = numpy(padded), numpy(lengths.int())
    out["batch/states"] = numpy(states)
    out["batch/audio"] = numpy(model.audio_adaptor(states, lengths)[0])
    out["batch/ctc_logits"] = numpy(model.ctc.ctc_lo(model.ctc_decoder(states, lengths)[0]))
    with faint(model.audio_adaptor.linear2):
        out["faint/audio"] = numpy(model.audio_adaptor(states, lengths)[0])
    return out


@contextlib.contextmanager
def faint(linear: Any) -> Iterator[None]:
    """Shrink a layer while the block runs: the epsilons of the norms behind it show where the variance is small."""
    for value in linear.parameters():
        value.mul_(FAINT)
    yield
    for value in linear.parameters():
        value.div_(FAINT)


def ported_config() -> Any:
    """Return transformers' configuration of the same sizes."""
    text = {key: value for key, value in DECODER.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": DECODER["rope_theta"]}
    return FunAsrNanoConfig(
        audio_config=dict(
            model_type="fun_asr_nano_encoder", num_mel_bins=MEL_BINS, num_stacked_frames=7,
            hidden_size=ENCODER["output_size"], num_attention_heads=ENCODER["attention_heads"],
            intermediate_size=ENCODER["linear_units"], num_hidden_layers=ENCODER["num_blocks"] + ENCODER["tp_blocks"],
            num_timestamp_prediction_layers=ENCODER["tp_blocks"], fsmn_kernel_size=ENCODER["kernel_size"],
        ),
        adaptor_config=dict(
            hidden_size=ADAPTOR["output_size"], intermediate_size=ADAPTOR["ffn_size"],
            num_attention_heads=ADAPTOR["num_heads"], num_hidden_layers=ADAPTOR["num_layers"],
            projector_hidden_size=ADAPTOR["hidden_size"],
        ),
        text_config=dict(model_type="qwen3", rope_parameters=rope, attention_bias=False, eos_token_id=None, **text),
        audio_token_id=AUDIO_TOKEN,
    )  # fmt: skip


def ported_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return FunASRNano's tensors under the names that transformers' port gives them."""
    blocks = ENCODER["num_blocks"]
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if first == "llm":
            out[rest.replace("model.", "model.language_model.") if rest != "lm_head.weight" else rest] = value
            continue
        if first in ("ctc_decoder", "ctc"):
            continue
        if first == "audio_adaptor":
            head = "model.multi_modal_projector."
            rest = rest.replace("linear1.", "linear_1.").replace("linear2.", "linear_2.").replace("blocks.", "layers.")
        else:
            head = "model.audio_tower.layers."
            group, _, rest = rest.partition(".")
            number, _, tail = rest.partition(".")
            if group in ("after_norm", "tp_norm"):
                rest = f"{blocks - 1 if group == 'after_norm' else blocks + ENCODER['tp_blocks'] - 1}"
                rest += f".final_layernorm.{number}"
            else:
                start = {"encoders0": 0, "encoders": 1, "tp_encoders": blocks}[group]
                rest = f"{start + int(number)}.{tail}"
        for old, new in (
            ("norm1.", "input_layernorm."), ("norm2.", "post_attention_layernorm."), ("feed_forward.w_", "mlp.fc"),
            ("linear_out.", "o_proj."), ("fsmn_block.", "fsmn.conv."),
            *((f"linear_{letter}.", f"{letter}_proj.") for letter in "qkv"),
        ):  # fmt: skip
            rest = rest.replace(old, new)
        if "linear_q_k_v" in rest:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                out[head + rest.replace("linear_q_k_v", f"{letter}_proj")] = third
        else:
            out[head + rest] = value
    return out


@torch.no_grad()
def ported(model: Any, facts: dict[str, Any], front: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Run transformers' port on the same weights; it gives the decoder every row, and its epsilon is 1e-5."""
    port = FunAsrNanoForConditionalGeneration(ported_config()).eval()
    # Left to itself, transformers 5.23 picks no attention for the adaptor's configuration, and so masks nothing there.
    port.set_attn_implementation("eager")
    missing, unknown = port.load_state_dict(ported_names(model.state_dict()), strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"transformers' port does not take the weights: missing {missing}, unknown {unknown}")
    out: Tensors = {}
    features = torch.from_numpy(front["batch/features"])
    mask = torch.arange(features.shape[1])[None] < torch.from_numpy(front["batch/lengths"])[:, None]
    heard = port.get_audio_features(features, mask.long())
    out["port/audio"] = numpy(heard.pooler_output)  # the real rows of all items, one after another
    if not np.allclose(numpy(heard.last_hidden_state[mask]), front["batch/states"][mask.numpy()], atol=1e-4):
        raise SystemExit("the encoders of funasr and transformers disagree")
    projector = port.model.multi_modal_projector
    with faint(projector.linear_2):
        out["port/faint"] = numpy(projector(heard.last_hidden_state, mask.long())[mask])
    # The prompt of the first case with all of its rows.
    clip, ids = "long", facts["plain"]["source_ids"]
    start, kept = ids.index(0), ids.count(0)
    rows = torch.from_numpy(front[f"{clip}/features"])[None]
    prompt = ids[:start] + [AUDIO_TOKEN] * rows.shape[1] + ids[start + kept :]
    inputs = dict(input_features=rows, input_features_mask=torch.ones(rows.shape[:2], dtype=torch.long))
    result = port(input_ids=torch.tensor([prompt]), **inputs)
    out["port/logits"] = numpy(result.logits[0, -1])
    state = {key: value for key, value in port.state_dict().items() if key != "lm_head.weight"}
    digests = {
        key: [list(value.shape), hashlib.sha256(numpy(value).tobytes()).hexdigest()[:16]]
        for key, value in state.items()
    }
    return out, digests


def make_nano() -> None:
    """Fun-ASR-Nano from sound to ids in every form of its prompt, and transformers' port."""
    excerpt, _ = sources()
    samples = torch.from_numpy(excerpt.astype(np.float32) / 32768)
    clips = {name: samples[first:last] for name, (first, last) in CLIPS.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "tokenizer.json"))
    for seed in range(SEED + 2000, SEED + 3000):
        found = attempt(seed, clips, tokenizer)
        if found is not None:
            break
    else:
        raise SystemExit("no seed gives every case a clear margin: lower MARGIN or widen the search")
    model, facts, out = found
    print(f"seed {seed} after {seed - SEED - 1999} tries")
    out |= weights(model) | stages(model, clips)
    tensors, digests = ported(model, facts, out)
    save(
        "nano",
        out | tensors,
        mel_bins=MEL_BINS,
        encoder=ENCODER | dict(input_size=7 * MEL_BINS),
        adaptor=ADAPTOR | dict(input_size=ENCODER["output_size"]),
        ctc=dict(transformer=CTC | dict(input_size=ENCODER["output_size"]), vocab_size=CTC_SYMBOLS),
        decoder=DECODER,
        clips=CLIPS,
        cases=facts,
        faint=FAINT,
        max_tokens=MAX_TOKENS,
        port=digests,
    )


def make_nano_prompt_ids(path: Path) -> None:
    """Ids of funasr's prompts by the real Qwen3 tokenizer, zeros where the audio goes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    model, front = build(SEED), frontend()
    silent = {name: torch.zeros(last - first) for name, (first, last) in CLIPS.items()}
    prompts = {}
    for name, case in CASES.items():
        contents = model.data_template(conversation(model, case, silent.__getitem__))
        output = model.data_load_speech(contents, tokenizer, front, **options(case))
        prompts[name] = case | dict(source_ids=output["source_ids"][0].tolist())
    golden = {
        "schema": SCHEMA,
        "regenerate": "python tools/golden/make_golden.py --only nano_prompt_ids --qwen3-tokenizer PATH/tokenizer.json",
        "tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "versions": ref.versions(),
        "clips": CLIPS,
        "prompts": prompts,
    }
    target = DATA / "nano_prompt_ids.json"
    target.write_text(json.dumps(golden, ensure_ascii=False, indent=None) + "\n", encoding="utf-8")
    print(f"{target.name}: {target.stat().st_size / 1e3:.1f} kB")
