"""Published checkpoints that are a whole model each: told apart by their tensors, and planned for conversion.

A new one is a key map, a way to read its sizes, and a prompt; the conversion itself knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..config import FILE_NAME as CONFIG_FILE
from ..config import GenerationConfig, ModelConfig
from ..decoder import DecoderConfig
from ..errors import CheckpointError, ConfigError
from ..model import SpeechModel
from ..nano_adaptor import NanoAdaptorConfig, NanoCtcConfig
from ..nano_prompt import MLT_NANO_LANGUAGES, NANO_LANGUAGES, NanoPromptConfig
from ..pieces import PIECE_FILES
from ..prompt import PromptConfig
from .adapters import checkpoint_adapter, merged_tensors
from .canary import canary_configs
from .checkpoint import open_checkpoint
from .config_yaml import read_config_yaml
from .conversion import Conversion, Fill, Tensors, check_floats, checked_mvn, identify, renamed_shapes, shapes_of
from .derive import Sizes, decoder_config, encoder_config, frontend_config, read_json_object
from .directory import TOKENIZER_FILE
from .kaldi_mvn import read_kaldi_mvn
from .keymap import KeyMap, Shape, load_keymap
from .load import parameter_shapes
from .parts import MVN_FILE, checked_tokenizer, mvn_vectors, stop_tokens, weights_file

LORA = ("keep", "merge")
# Their authors decode greedily, without a repetition penalty and without an n-gram ban.
_PLAIN_GREEDY = GenerationConfig(repetition_penalty=1.0, no_repeat_ngram=0)
_CANARY_TOKENS = 128


def plan_checkpoint(directory: Path, tokenizer: Path | None = None, *, lora: str = "keep") -> Conversion:
    """Find out which checkpoint a directory holds, and plan its conversion; only headers and small files are read.

    Args:
        directory: The checkpoint, as downloaded.
        tokenizer: Directory of the language model's ``tokenizer.json``, where the checkpoint has none.
        lora: ``keep`` adapters apart, or ``merge`` them into the weights.

    Raises:
        CheckpointError: If it is none of the known checkpoints, or damaged.
        ConfigError: If `lora` is something else.
    """
    if lora not in LORA:
        raise ConfigError(f"lora {lora!r}: choose one of {', '.join(LORA)}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: must be the directory of a checkpoint, and there is none")
    refs = open_checkpoint(weights_file(directory))
    family = identify(refs)
    if family is None:
        some = ", ".join(list(refs)[:3]) or "nothing"
        raise CheckpointError(
            f"{directory}: is none of the checkpoints that are known ({', '.join(_PLANS)}); it has {some} ..."
        )
    conversion = _PLANS[family](directory, refs, tokenizer, lora)
    return replace(conversion, config=replace(conversion.config, name=_name(family, conversion.config)))


def _plan_sensevoice(directory: Path, refs: Tensors, _: Path | None, __: str) -> Conversion:
    check_floats(refs)
    file, keymap, settings = str(directory), load_keymap("sensevoice"), _settings(directory)
    encoder = encoder_config(renamed_shapes(refs, keymap), settings, file=file)
    front = frontend_config(encoder.input_size, settings, file=file)
    if not encoder.vocab_size:
        raise CheckpointError(f"{file}: has no CTC head (ctc.ctc_lo), so it writes no text by itself")
    mvn = read_kaldi_mvn(directory / MVN_FILE)
    checked_mvn(mvn.shift, front.output_size, directory / MVN_FILE)
    copies = _piece_files(directory)
    if not copies:
        raise CheckpointError(
            f"{file}: nothing says what the CTC symbols read as: {' or '.join(PIECE_FILES)} is needed"
        )
    config = ModelConfig(frontend=front, encoder=encoder, adaptor=None, decoder=None, prompt=None)
    fill = _fill(config, refs, keymap, "audio_encoder.", file, (directory / MVN_FILE,))
    return Conversion(config, (fill,), mvn_vectors(mvn), copies)


def _plan_nano(directory: Path, refs: Tensors, tokenizer: Path | None, _: str) -> Conversion:
    check_floats(refs)
    file, keymap, settings = str(directory), load_keymap("nano"), _settings(directory)
    llm = _language_model_folder(directory, tokenizer)
    decoder = decoder_config(llm / CONFIG_FILE)
    shapes = renamed_shapes(refs, keymap)
    low_frame_rate = settings.get("audio_adaptor_conf.use_low_frame_rate", "true").lower() != "false"
    epsilon = 1e-12  # funasr's, which trained the weights
    config = _nano_config(shapes, settings, decoder, llm, file, epsilon, low_frame_rate)
    return Conversion(
        config,
        (_fill(config, refs, keymap, "", file, (llm / CONFIG_FILE, llm / TOKENIZER_FILE)),),
        copies={TOKENIZER_FILE: llm / TOKENIZER_FILE, **_piece_files(directory)},
    )


def _plan_nano_hf(directory: Path, refs: Tensors, tokenizer: Path | None, _: str) -> Conversion:
    check_floats(refs)
    file, keymap = str(directory), load_keymap("nano-hf")
    values = read_json_object(directory / CONFIG_FILE)
    text = values.get("text_config") or values.get("llm_config")
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: has no text_config, so the language model's sizes are unknown"
        )
    try:
        decoder = DecoderConfig.from_huggingface({**text, "model_type": "qwen3"})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: text_config: {error}") from error
    llm = directory if (directory / TOKENIZER_FILE).is_file() else _language_model_folder(directory, tokenizer)
    audio = values.get("audio_config") or {}
    heads = (
        {"encoder_conf.attention_heads": str(audio["num_attention_heads"])} if "num_attention_heads" in audio else {}
    )
    shapes = renamed_shapes(refs, keymap)
    joined = {name: _joined_shape(name, refs, keymap) for name in shapes if ".linear_q_k_v." in name}
    config = _nano_config({**shapes, **joined}, heads, decoder, llm, file, 1e-12, True)
    return Conversion(
        config,
        (_fill(config, refs, keymap, "", file, (directory / CONFIG_FILE, llm / TOKENIZER_FILE)),),
        copies={TOKENIZER_FILE: llm / TOKENIZER_FILE},
    )


def _nano_config(
    shapes: Mapping[str, Shape],
    settings: Mapping[str, str],
    decoder: DecoderConfig,
    llm: Path,
    file: str,
    epsilon: float,
    low_frame_rate: bool,
) -> ModelConfig:
    sizes = Sizes(shapes, file, "Fun-ASR-Nano")
    inside = {name.removeprefix("audio_encoder."): shape for name, shape in shapes.items()}
    renamed = {key.replace("audio_encoder_conf.", "encoder_conf."): value for key, value in settings.items()}
    encoder = encoder_config(inside, renamed, file=file, queries=False)
    front = replace(frontend_config(encoder.input_size, renamed, file=file), cmvn=False)
    tokenizer = checked_tokenizer(llm / TOKENIZER_FILE, decoder.vocab_size)
    ctc = None
    if "ctc.ctc.ctc_lo.weight" in shapes:
        ctc = NanoCtcConfig(
            transformer=_nano_transformer(sizes, "ctc.ctc_decoder", epsilon, False),
            vocab_size=sizes.get("ctc.ctc.ctc_lo.weight", 0, 2),
        )
    multilingual = "mlt" in file.lower()
    try:
        return ModelConfig(
            frontend=front,
            encoder=encoder,
            adaptor=_nano_transformer(sizes, "adaptor", epsilon, low_frame_rate),
            decoder=decoder,
            ctc=ctc,
            prompt=NanoPromptConfig(languages=MLT_NANO_LANGUAGES if multilingual else NANO_LANGUAGES),
            generation=replace(_PLAIN_GREEDY, stop_token_ids=stop_tokens(llm, tokenizer)),
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _nano_transformer(sizes: Sizes, path: str, epsilon: float, low_frame_rate: bool) -> NanoAdaptorConfig:
    return NanoAdaptorConfig(
        input_size=sizes.get(f"{path}.linear1.weight", 1, 2),
        hidden_size=sizes.get(f"{path}.linear1.weight", 0, 2),
        output_size=sizes.get(f"{path}.linear2.weight", 0, 2),
        num_layers=sizes.count(rf"{path}\.blocks\.(\d+)\..*".replace("ctc.ctc", r"ctc\.ctc")),
        ffn_size=sizes.get(f"{path}.blocks.0.feed_forward.w_1.weight", 0, 2),
        norm_eps=epsilon,
        low_frame_rate=low_frame_rate,
    )


def _plan_canary(directory: Path, refs: Tensors, tokenizer: Path | None, lora: str) -> Conversion:
    check_floats(refs)
    file, keymap = str(directory), load_keymap("canary")
    settings = read_json_object(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    adapter = settings.get("lora") or {}
    if lora == "merge":
        refs = merged_tensors(refs, adapter, file=file)
    parts = canary_configs(shapes_of(refs), settings, file=file)
    decoder = replace(parts.decoder, lora=checkpoint_adapter(refs, adapter, file=file))
    llm = _tokenizer_folder(directory, tokenizer)
    tokens = checked_tokenizer(llm / TOKENIZER_FILE, decoder.vocab_size)
    ends = tuple(t for name in ("<|im_end|>", "<|endoftext|>") if (t := tokens.token_id(name)) is not None)
    try:
        config = ModelConfig(
            frontend=parts.frontend,
            encoder=parts.encoder,
            adaptor=parts.adaptor,
            decoder=decoder,
            prompt=PromptConfig(profile="canary", profiles=("canary",)),
            generation=replace(_PLAIN_GREEDY, stop_token_ids=ends, min_tokens=_CANARY_TOKENS),
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    read = (directory / CONFIG_FILE,) if settings else ()
    fill = _fill(config, refs, keymap, "", file, (*read, llm / TOKENIZER_FILE))
    return Conversion(config, (fill,), copies={TOKENIZER_FILE: llm / TOKENIZER_FILE})


def _fill(config: ModelConfig, refs: Tensors, keymap: KeyMap, prefix: str, file: str, files: tuple[Path, ...]) -> Fill:
    wanted = parameter_shapes(SpeechModel(config))
    inside = {name.removeprefix(prefix): shape for name, shape in wanted.items() if name.startswith(prefix)}
    return Fill("model", prefix, refs, keymap.plan(shapes_of(refs), inside, file=file), files)


def _joined_shape(target: str, refs: Tensors, keymap: KeyMap) -> Shape:
    """Return the shape of a parameter that several tensors make up along their first axis."""
    shapes = [refs[name].shape for name in keymap.rename(shapes_of(refs))[target]]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _piece_files(directory: Path) -> dict[str, Path]:
    return {name: directory / name for name in PIECE_FILES if (directory / name).is_file()}


def _settings(directory: Path) -> Mapping[str, str]:
    file = directory / "config.yaml"
    return read_config_yaml(file) if file.is_file() else {}


def _tokenizer_folder(directory: Path, tokenizer: Path | None) -> Path:
    """Find the folder of tokenizer.json: the one that is named, the checkpoint's, or one inside it."""
    folders = (
        [tokenizer] if tokenizer is not None else [directory, *sorted(p for p in directory.iterdir() if p.is_dir())]
    )
    found = next((folder for folder in folders if (folder / TOKENIZER_FILE).is_file()), None)
    if found is None:
        where = tokenizer or directory
        raise CheckpointError(f"{where}: {TOKENIZER_FILE} is missing; give the language model's folder as --tokenizer")
    return found


def _language_model_folder(directory: Path, tokenizer: Path | None) -> Path:
    """Find the folder with the language model's config.json and tokenizer.json."""
    folder = _tokenizer_folder(directory, tokenizer)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: {CONFIG_FILE} of the language model is missing beside {TOKENIZER_FILE}")
    return folder


def _name(family: str, config: ModelConfig) -> str:
    if isinstance(config.prompt, NanoPromptConfig):
        return "fun-asr-mlt-nano" if config.prompt.languages == MLT_NANO_LANGUAGES else "fun-asr-nano"
    return family


_PLANS: Mapping[str, Callable[[Path, Tensors, Path | None, str], Conversion]] = {
    "sensevoice-small": _plan_sensevoice,
    "fun-asr-nano": _plan_nano,
    "fun-asr-nano-hf": _plan_nano_hf,
    "canary-qwen": _plan_canary,
}
