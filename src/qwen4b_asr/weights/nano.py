"""Fun-ASR-Nano and MLT-Nano as they are published: one file with all stages, in FunASR's or transformers' layout.

FunASR's ``model.pt`` has ``audio_encoder.*``, ``audio_adaptor.*``, ``llm.*`` and, in newer files, ``ctc_decoder.*`` and
``ctc.*``. The official safetensors came out with three sets of names one after another; all have query, key and value
apart, and two number the encoder's layers by group where the third, which transformers kept, counts them through.
Nothing but headers and small files is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..decoder import DecoderConfig
from ..encoder import EncoderConfig
from ..errors import CheckpointError
from ..features import FrontendConfig
from ..nano_adaptor import NanoAdaptorConfig, NanoCtcConfig
from ..nano_prompt import MLT_NANO_LANGUAGES, NANO_LANGUAGES, NanoPromptConfig
from .checkpoint import open_checkpoint
from .config_yaml import read_config_yaml
from .derive import Sizes, decoder_config, encoder_config, frontend_config, number_of, read_json_object
from .keymap import KeyMap, Shape, load_keymap
from .pairing import require_family
from .safetensors_file import INDEX_FILE, SINGLE_FILE
from .tensors import TensorRef

T = TypeVar("T")

_TOWER = re.compile(r"(?P<head>(?:model\.)?audio_tower\.)(?P<rest>.+)", re.DOTALL)
_LAYER = re.compile(r"layers\.(?P<i>0|[1-9][0-9]*)\.(?P<rest>.+)", re.DOTALL)
_END = "final_layernorm."
# Names of groups that say which layers are meant, and FunASR's for them. The longer stand first.
_GROUPS = (
    ("timestamp_prediction_layer_norm.", "tp_norm."),
    ("timestamp_prediction_layers.", "tp_encoders."),
    ("layer_norm.", "after_norm."),
    ("layers.", "encoders."),
    ("stem.", "encoders0.0."),
)
_HEADS = 8  # of adaptor and CTC branch; FunASR's default, which no published file changes


@dataclass(frozen=True)
class NanoCheckpoint:
    """A published checkpoint, found, named and measured.

    Args:
        file: The file or directory of the weights, for messages.
        tensors: The tensors under the names that `keymap` knows.
        keymap: How they fill the parameters of the whole model; the front end has none.
        frontend: Sizes of the front end, which normalises nothing.
        encoder: Sizes of the encoder, which has neither query frames nor a CTC head.
        adaptor: Sizes of the adaptor and the rule for its rows.
        ctc: Sizes of the CTC branch; None if the file has none, and then there are no times.
        decoder: Sizes of the language model.
        prompt: How it wants to be asked.
        llm: Directory with the language model's ``tokenizer.json`` and ``generation_config.json``.
        used: Every file that something was read from, the weights' first.
    """

    file: Path
    tensors: Mapping[str, TensorRef]
    keymap: KeyMap
    frontend: FrontendConfig
    encoder: EncoderConfig
    adaptor: NanoAdaptorConfig
    ctc: NanoCtcConfig | None
    decoder: DecoderConfig
    prompt: NanoPromptConfig
    llm: Path
    used: tuple[Path, ...]


def read_nano(
    directory: Path, *, llm: Path | None = None, multilingual: bool | None = None, encoder_heads: int | None = None
) -> NanoCheckpoint:
    """Find a published checkpoint's files and read its sizes.

    Args:
        directory: What was downloaded, in either layout.
        llm: Directory with the language model's small files, where they are not inside `directory`.
        multilingual: Whether it is MLT-Nano, whose weights have the same shapes; None goes by the directory's name.
        encoder_heads: Attention heads of the encoder, where neither the files nor the width tell.

    Raises:
        CheckpointError: If a file is missing or damaged, or holds another model.
    """
    file = _weights_file(directory)
    refs = open_checkpoint(file)
    require_family(refs, "fun-asr-nano", file=str(file))
    tensors, keymap = name_tensors(refs, file=str(file)), load_keymap(keymap_name(refs))
    shapes = {name: ref.shape for name, ref in tensors.items()}
    targets = {target: shapes[names[0]] for target, names in keymap.rename(shapes).items()}
    ported = keymap.name != "nano"
    config, yaml = directory / "config.json", directory / "config.yaml"
    if ported:
        values = read_json_object(config)
        settings, used = _ported_settings(values), [file, config]
        decoder, llm = _ported_decoder(values, config), llm or directory
    else:
        settings, used = read_config_yaml(yaml) if yaml.is_file() else {}, [file]
        llm = llm or _language_model(directory)
        decoder = decoder_config(llm / "config.json")
        used += [yaml] if yaml.is_file() else []
        used.append(llm / "config.json")
    tokenizer = llm / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: missing; it is published beside the weights and holds the tokenizer")
    encoder = encoder_config(
        _under("audio_encoder.", targets), settings, file=str(file), heads=encoder_heads,
        section="audio_encoder_conf", queries=False,
    )  # fmt: skip
    ctc = _ctc_config(targets, settings, str(file))
    if multilingual is None:
        multilingual = any("mlt-nano" in part.lower() for part in directory.absolute().parts[-4:])
    return NanoCheckpoint(
        file=file,
        tensors=tensors,
        keymap=keymap,
        frontend=frontend_config(encoder.input_size, settings, file=str(file), cmvn=False),
        encoder=encoder,
        adaptor=_adaptor_config(targets, settings, str(file)),
        ctc=ctc,
        decoder=decoder,
        prompt=NanoPromptConfig(languages=MLT_NANO_LANGUAGES if multilingual else NANO_LANGUAGES),
        llm=llm,
        used=(*used, tokenizer),
    )


def keymap_name(names: Iterable[str]) -> str:
    """Return which key map knows a checkpoint's names: ``nano`` (FunASR's) or ``nano-hf`` (transformers')."""
    return "nano-hf" if any(_TOWER.fullmatch(name) for name in names) else "nano"


def name_tensors(tensors: Mapping[str, T], *, file: str) -> dict[str, T]:
    """Give the encoder's layers FunASR's names, whichever way a file counts them; other names stay.

    Where layers are counted through, the two that end in a norm are the last of their groups.

    Args:
        tensors: Name -> anything.
        file: The checkpoint, for messages.

    Raises:
        CheckpointError: If two ways of counting are mixed, or the ends of the groups cannot be told.
    """
    inside = [match["rest"] for name in tensors if (match := _TOWER.fullmatch(name))]
    layers = [match for rest in inside if (match := _LAYER.fullmatch(rest))]
    ends = sorted({int(match["i"]) for match in layers if match["rest"].startswith(_END)})
    grouped = any(rest.startswith("stem.") for rest in inside)
    if not inside:
        return dict(tensors)
    if grouped == bool(ends):
        raise CheckpointError(
            f"{file}: the encoder's layers must be named either by group ('stem', 'layers', "
            f"'timestamp_prediction_layers') or throughout, with a '{_END}' at the end of each group"
        )
    last = max((int(match["i"]) for match in layers), default=0)
    if ends and (len(ends) > 2 or ends[-1] != last):
        raise CheckpointError(
            f"{file}: of the encoder's {last + 1} layers the last of each of two groups must end in '{_END}', "
            f"but {ends} do"
        )
    named: dict[str, T] = {}
    for name, value in tensors.items():
        match = _TOWER.fullmatch(name)
        if match:
            rest = _by_group(match["rest"]) if grouped else _by_number(match["rest"], ends)
            name = match["head"] + rest
        if name in named:
            raise CheckpointError(f"{file}: two tensors are both {name!r}")
        named[name] = value
    return named


def _by_group(rest: str) -> str:
    for old, new in _GROUPS:
        if rest.startswith(old):
            return new + rest[len(old) :]
    return rest


def _by_number(rest: str, ends: list[int]) -> str:
    match = _LAYER.fullmatch(rest)
    if not match:
        return rest
    number, tail = int(match["i"]), match["rest"]
    if tail.startswith(_END):
        return f"{'after_norm' if number == ends[0] else 'tp_norm'}.{tail[len(_END) :]}"
    if number == 0:
        return f"encoders0.0.{tail}"
    return f"encoders.{number - 1}.{tail}" if number <= ends[0] else f"tp_encoders.{number - ends[0] - 1}.{tail}"


def _weights_file(directory: Path) -> Path:
    for name in ("model.pt", SINGLE_FILE):
        if (directory / name).is_file():
            return directory / name
    if (directory / INDEX_FILE).is_file():
        return directory
    raise CheckpointError(f"{directory}: the weights are missing: model.pt or {SINGLE_FILE}")


def _language_model(directory: Path) -> Path:
    """Return the one directory inside that describes the language model (``Qwen3-0.6B``)."""
    found = sorted(path.parent for path in directory.glob("*/config.json"))
    if len(found) != 1:
        have = f"there are {', '.join(path.name for path in found)}" if found else "there is none"
        raise CheckpointError(
            f"{directory}: one directory with the language model's config.json and tokenizer.json is needed beside "
            f"model.pt (Qwen3-0.6B), but {have}"
        )
    return found[0]


def _under(prefix: str, targets: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in targets.items() if name.startswith(prefix)}


def _adaptor_config(targets: Mapping[str, Shape], settings: Mapping[str, str], file: str) -> NanoAdaptorConfig:
    shapes = _under("adaptor.", targets)
    kept = settings.get("audio_adaptor_conf.use_low_frame_rate", "true").lower()
    if kept not in ("true", "false"):
        raise CheckpointError(f"{file}: config.yaml gives use_low_frame_rate as {kept!r}, not as true or false")
    return _transformer(shapes, settings, "audio_adaptor_conf", file, "Fun-ASR-Nano's adaptor", kept == "true")


def _ctc_config(targets: Mapping[str, Shape], settings: Mapping[str, str], file: str) -> NanoCtcConfig | None:
    shapes = _under("ctc.", targets)
    if not shapes:
        return None
    layers = _transformer(
        _under("ctc_decoder.", shapes), settings, "ctc_decoder_conf", file, "Fun-ASR-Nano's CTC branch", False
    )
    symbols = Sizes(shapes, file, "Fun-ASR-Nano's CTC branch").get("ctc.ctc_lo.weight", 0, 2)
    blank = number_of(settings, "ctc_conf.blank_id", file)
    try:
        return NanoCtcConfig(transformer=layers, vocab_size=symbols, blank_id=None if blank is None else int(blank))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _transformer(
    shapes: Mapping[str, Shape], settings: Mapping[str, str], section: str, file: str, what: str, low_frame_rate: bool
) -> NanoAdaptorConfig:
    sizes = Sizes(shapes, file, what)
    heads = number_of(settings, f"{section}.attention_heads", file)
    output = sizes.get("linear2.weight", 0, 2)
    count = sizes.count(r"blocks\.(\d+)\..*")
    try:
        return NanoAdaptorConfig(
            input_size=sizes.get("linear1.weight", 1, 2),
            hidden_size=sizes.get("linear1.weight", 0, 2),
            output_size=output,
            num_layers=count,
            num_heads=_HEADS if heads is None else int(heads),
            ffn_size=sizes.get("blocks.0.feed_forward.w_1.weight", 0, 2) if count else max(1, output // 4),
            low_frame_rate=low_frame_rate,
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _ported_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what transformers' ``config.json`` says, under the keys of FunASR's ``config.yaml``.

    Its epsilon of 1e-5 for the adaptor is not taken over: the weights are FunASR's, trained with 1e-12.
    """
    sources = {
        "audio_encoder_conf.attention_heads": (
            ("audio_config", "num_attention_heads"),
            ("audio_config", "encoder_attention_heads"),
            ("encoder_config", "encoder_attention_heads"),
        ),
        "audio_adaptor_conf.attention_heads": (
            ("adaptor_config", "num_attention_heads"),
            ("adaptor_num_attention_heads",),
        ),
        "frontend_conf.n_mels": (("audio_config", "num_mel_bins"), ("encoder_config", "num_mel_bins")),
        "frontend_conf.lfr_m": (("audio_config", "num_stacked_frames"), ("encoder_config", "num_stacked_frames")),
    }
    settings = {}
    for key, paths in sources.items():
        for path in paths:
            value: Any = values
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            if value is not None:
                settings[key] = str(value)
                break
    return settings


def _ported_decoder(values: Mapping[str, Any], path: Path) -> DecoderConfig:
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{path}: has no 'text_config', which holds the language model's sizes")
    # The head is tied in the whole model's settings, which the language model's own need not repeat.
    tied = {"tie_word_embeddings": values["tie_word_embeddings"]} if "tie_word_embeddings" in values else {}
    try:
        return DecoderConfig.from_huggingface({"model_type": "qwen3", **text, **tied})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: text_config: {error}") from error
