"""Published checkpoints that are a whole model each: told apart by their tensors, and planned for conversion.

A new one is a key map, a way to read its sizes, and a prompt; the conversion itself knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..config import FILE_NAME as CONFIG_FILE
from ..config import GenerationConfig, ModelConfig
from ..errors import CheckpointError, ConfigError
from ..model import SpeechModel
from ..nano_prompt import MLT_NANO_LANGUAGES, NanoPromptConfig
from ..pieces import PIECE_FILES
from ..prompt import PromptConfig
from .adapters import checkpoint_adapter, merged_tensors
from .canary import canary_configs
from .checkpoint import open_checkpoint
from .config_yaml import read_config_yaml
from .conversion import Conversion, Fill, Tensors, check_floats, checked_mvn, renamed_shapes, shapes_of
from .derive import encoder_config, frontend_config, read_json_object
from .directory import PROVENANCE_FILE, TOKENIZER_FILE
from .find import is_model_directory
from .kaldi_mvn import read_kaldi_mvn
from .keymap import Assignment, KeyMap, Plan, load_keymap
from .load import check_names_and_shapes, parameter_shapes
from .nano import read_nano
from .pairing import family
from .parts import MVN_FILE, checked_tokenizer, mvn_vectors, sanm_fingerprint, stop_tokens, weights_file
from .quantized import settled_decoder
from .safetensors_file import read_safetensors_directory

LORA = ("keep", "merge")
# Their authors decode greedily, without a repetition penalty and without an n-gram ban.
_PLAIN_GREEDY = GenerationConfig(repetition_penalty=1.0, no_repeat_ngram=0)
_CANARY_TOKENS = 128


def plan_checkpoint(directory: Path, tokenizer: Path | None = None, *, lora: str = "keep") -> Conversion:
    """Find out which checkpoint a directory holds, and plan its conversion; only headers and small files are read.

    Args:
        directory: The checkpoint, as downloaded, or a model directory that is to be stored anew.
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
    if is_model_directory(directory):
        return _plan_again(directory, lora)
    refs = open_checkpoint(weights_file(directory))
    found = family(refs)
    if found not in _PLANS:
        some = ", ".join(list(refs)[:3]) or "nothing"
        raise CheckpointError(
            f"{directory}: is none of the checkpoints that are known ({', '.join(map(str, _PLANS))}); it has {some} ..."
        )
    conversion = _PLANS[found](directory, refs, tokenizer, lora)
    return replace(conversion, config=replace(conversion.config, name=_name(found, conversion.config)))


def _plan_again(directory: Path, lora: str) -> Conversion:
    """Plan to store a model directory anew: every tensor fills the parameter of its own name."""
    config = ModelConfig.load(directory)
    if lora == "merge" and config.decoder is not None and config.decoder.lora is not None:
        raise ConfigError(f"{directory}: has its adapter apart; merge it when you convert the published checkpoint")
    refs = read_safetensors_directory(directory)
    check_names_and_shapes(shapes_of(refs), parameter_shapes(SpeechModel(config)), source=str(directory))
    small = [name for name in (TOKENIZER_FILE, *PIECE_FILES) if (directory / name).is_file()]
    provenance = read_json_object(directory / PROVENANCE_FILE) if (directory / PROVENANCE_FILE).is_file() else {}
    plan = Plan(tuple(Assignment(name, (name,), "identity") for name in refs), {})
    fill = Fill("model", "", refs, plan, (directory / CONFIG_FILE, *(directory / name for name in small)))
    copies = {name: directory / name for name in small}
    return Conversion(config, (fill,), {}, copies, str(provenance.get("encoder_fingerprint", "")))


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
    return Conversion(config, (fill,), mvn_vectors(mvn), copies, sanm_fingerprint(refs, fill.plan))


def _plan_nano(directory: Path, refs: Tensors, tokenizer: Path | None, _: str) -> Conversion:
    found = read_nano(directory, llm=tokenizer)
    settings = read_json_object(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    decoder = settled_decoder(found.decoder, found.tensors, settings, keymap=found.keymap, file=str(found.file))
    tokens = checked_tokenizer(found.llm / TOKENIZER_FILE, found.decoder.vocab_size)
    try:
        config = ModelConfig(
            frontend=found.frontend,
            encoder=found.encoder,
            adaptor=found.adaptor,
            decoder=decoder,
            ctc=found.ctc,
            prompt=found.prompt,
            generation=replace(_PLAIN_GREEDY, stop_token_ids=stop_tokens(found.llm, tokens)),
        )
    except ValueError as error:
        raise CheckpointError(f"{found.file}: {error}") from error
    fill = _fill(config, found.tensors, found.keymap, "", str(found.file), found.used[1:])
    copies = {TOKENIZER_FILE: found.llm / TOKENIZER_FILE, **_piece_files(directory)}
    fingerprint = sanm_fingerprint(found.tensors, fill.plan, "audio_encoder.encoder.")
    return Conversion(config, (fill,), {}, copies, fingerprint)


def _plan_canary(directory: Path, refs: Tensors, tokenizer: Path | None, lora: str) -> Conversion:
    file, keymap = str(directory), load_keymap("canary")
    settings = read_json_object(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    adapter = settings.get("lora") or {}
    if lora == "merge":
        refs = merged_tensors(refs, adapter, file=file)
    parts = canary_configs(shapes_of(refs), settings, file=file)
    decoder = replace(parts.decoder, lora=checkpoint_adapter(refs, adapter, file=file))
    decoder = settled_decoder(decoder, refs, settings, keymap=keymap, file=file)
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


def _name(found: str | None, config: ModelConfig) -> str:
    if isinstance(config.prompt, NanoPromptConfig):
        return "fun-asr-mlt-nano" if config.prompt.languages == MLT_NANO_LANGUAGES else "fun-asr-nano"
    return "sensevoice-small" if found == "sensevoice" else str(found)


_PLANS: Mapping[str | None, Callable[[Path, Tensors, Path | None, str], Conversion]] = {
    "sensevoice": _plan_sensevoice,
    "fun-asr-nano": _plan_nano,
    "canary-qwen": _plan_canary,
}
