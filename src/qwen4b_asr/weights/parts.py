"""The three published parts of a model: finding them, checking that they fit, assigning every tensor.

Nothing but headers and small files is read here; `convert` does the writing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..config import FILE_NAME as CONFIG_FILE
from ..config import GenerationConfig, ModelConfig
from ..errors import CheckpointError, PromptError
from ..model import SpeechModel
from ..pieces import PIECE_FILES
from ..prompt import PROFILES, SPEECH_PROFILES, PromptConfig, spell
from ..tokenizer import Tokenizer
from .checkpoint import open_checkpoint
from .config_yaml import read_config_yaml
from .conversion import Conversion, Fill, Tensors, check_floats, checked_mvn, renamed_shapes, shapes_of
from .derive import adaptor_config, decoder_config, encoder_config, frontend_config, read_json_object
from .directory import TOKENIZER_FILE
from .kaldi_mvn import KaldiMvn, read_kaldi_mvn
from .keymap import Plan, load_keymap
from .load import parameter_shapes
from .pairing import encoder_fingerprint, require_family
from .quantized import decoder_quantization
from .safetensors_file import INDEX_FILE, SINGLE_FILE

MVN_FILE = "am.mvn"
_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def plan_parts(
    encoder: Path, adaptor: Path, llm: Path, encoder_heads: int | None = None, adaptor_heads: int | None = None
) -> Conversion:
    """Read the parts' headers, derive the configuration, and assign every tensor; writes nothing.

    Raises:
        CheckpointError: If the parts are damaged or do not fit together.
    """
    encoder_file = weights_file(encoder)
    encoder_refs, adaptor_refs, llm_refs = (open_checkpoint(path) for path in (encoder_file, adaptor, llm))
    require_family(encoder_refs, "sensevoice", file=str(encoder))
    for refs in (encoder_refs, adaptor_refs):
        check_floats(refs)
    yaml = encoder / "config.yaml"
    settings = read_config_yaml(yaml) if yaml.is_file() else {}
    maps = {
        "audio_encoder": load_keymap("sensevoice"),
        "adaptor": load_keymap("adaptor"),
        "decoder": load_keymap("qwen3"),
    }
    shapes = {
        "audio_encoder": shapes_of(encoder_refs),
        "adaptor": shapes_of(adaptor_refs),
        "decoder": shapes_of(llm_refs),
    }
    files = {"audio_encoder": str(encoder_file), "adaptor": str(adaptor), "decoder": str(llm)}
    encoder_shapes = renamed_shapes(encoder_refs, maps["audio_encoder"])
    enc = encoder_config(encoder_shapes, settings, file=str(encoder_file), heads=encoder_heads)
    ada = adaptor_config(shapes["adaptor"], maps["adaptor"], file=str(adaptor), heads=adaptor_heads)
    dec = decoder_quantization(
        decoder_config(llm / CONFIG_FILE), shapes["decoder"], keymap=maps["decoder"], file=str(llm)
    )
    front = frontend_config(enc.input_size, settings, file=str(encoder))
    _check_fit("the encoder", encoder, enc.output_size, "takes", adaptor, ada.input_size)
    _check_fit("the language model", llm, dec.hidden_size, "gives", adaptor, ada.output_size)
    mvn = read_kaldi_mvn(encoder / MVN_FILE)
    checked_mvn(mvn.shift, front.output_size, encoder / MVN_FILE)
    tokenizer = checked_tokenizer(llm / TOKENIZER_FILE, dec.vocab_size)
    try:
        config = ModelConfig(
            frontend=front,
            encoder=enc,
            adaptor=ada,
            decoder=dec,
            prompt=_prompt_config(tokenizer),
            generation=GenerationConfig(stop_token_ids=stop_tokens(llm, tokenizer)),
        )
    except ValueError as error:
        raise CheckpointError(f"{llm}: {error}") from error
    wanted = parameter_shapes(SpeechModel(config))
    plans = {}
    for part, keymap in maps.items():
        inside = {name[len(part) + 1 :]: shape for name, shape in wanted.items() if name.startswith(f"{part}.")}
        plans[part] = keymap.plan(shapes[part], inside, file=files[part])
    fills = (
        Fill("encoder", "audio_encoder.", encoder_refs, plans["audio_encoder"], (encoder / MVN_FILE,)),
        Fill("adaptor", "adaptor.", adaptor_refs, plans["adaptor"]),
        Fill("llm", "decoder.", llm_refs, plans["decoder"], (llm / CONFIG_FILE, llm / TOKENIZER_FILE)),
    )
    copies = {TOKENIZER_FILE: llm / TOKENIZER_FILE}
    copies.update({name: encoder / name for name in PIECE_FILES if (encoder / name).is_file()})
    return Conversion(config, fills, mvn_vectors(mvn), copies, sanm_fingerprint(encoder_refs, plans["audio_encoder"]))


def sanm_fingerprint(refs: Tensors, plan: Plan, prefix: str = "encoder.") -> str:
    """Return the fingerprint of the SANM layers that a plan fills under `prefix`."""
    names = {a.target.removeprefix(prefix): a.sources[0] for a in plan.assignments if a.target.startswith(prefix)}
    return encoder_fingerprint(refs, names)


def mvn_vectors(mvn: KaldiMvn) -> dict[str, npt.NDArray[Any]]:
    """Return a normalisation under the names of the front end's parameters."""
    return {"frontend.cmvn_shift": mvn.shift, "frontend.cmvn_scale": mvn.scale}


def checked_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer and make sure that the language model knows its tokens.

    Raises:
        CheckpointError: If it is none, or has more tokens than the model.
    """
    tokenizer = Tokenizer(file)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"{file}: has {tokenizer.vocab_size} tokens, but the language model only {vocab_size}")
    return tokenizer


def check_files(encoder: Path, adaptor: Path, llm: Path) -> None:
    """Say what is missing and what is expected before anything is read."""
    for path, what in ((encoder, "encoder"), (llm, "llm")):
        if not path.is_dir():
            raise CheckpointError(f"{path}: --{what} must be a directory, and there is none")
    weights_file(encoder)
    if not (encoder / MVN_FILE).is_file():
        raise CheckpointError(
            f"{encoder}: {MVN_FILE} is missing; it comes with SenseVoiceSmall and holds the features' normalisation, "
            "without which the encoder hears noise"
        )
    if not adaptor.is_file():
        raise CheckpointError(f"{adaptor}: --adaptor must be a file (.pt or .safetensors), and there is none")
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        if not (llm / name).is_file():
            raise CheckpointError(f"{llm}: {name} is missing; --llm must be a Hugging Face directory of Qwen3")
    if not any((llm / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(f"{llm}: the weights are missing: {SINGLE_FILE}, or {INDEX_FILE} with its shards")


def weights_file(directory: Path) -> Path:
    """Return the file of weights in a directory, or the directory itself where they are in shards.

    Raises:
        CheckpointError: If there is none.
    """
    for name in ("model.pt", SINGLE_FILE):
        if (directory / name).is_file():
            return directory / name
    if (directory / INDEX_FILE).is_file():
        return directory
    raise CheckpointError(f"{directory}: the weights are missing: model.pt or {SINGLE_FILE}")


def _check_fit(what: str, path: Path, width: int, verb: str, adaptor: Path, adaptor_width: int) -> None:
    if width != adaptor_width:
        raise CheckpointError(
            f"{adaptor}: the adaptor {verb} rows of {adaptor_width}, but {what} in {path} is {width} wide; "
            "they were not trained together"
        )


def _prompt_config(tokenizer: Tokenizer) -> PromptConfig:
    """Keep the prompt profiles whose every text the vocabulary can spell."""

    def spells(text: str) -> bool:
        try:
            spell(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special=False), text)
        except PromptError:
            return False
        return True

    names = tuple(
        name for name in SPEECH_PROFILES if all(spells(t) for form in PROFILES[name].forms.values() for t in form)
    )
    return PromptConfig(profile=PromptConfig.profile if PromptConfig.profile in names else names[0], profiles=names)


def stop_tokens(llm: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Collect the ends of text that the checkpoint's own files name."""
    found: list[int] = []
    for name in ("generation_config.json", CONFIG_FILE):
        values = read_json_object(llm / name).get("eos_token_id") if (llm / name).is_file() else None
        found += [v for v in (values if isinstance(values, list) else [values]) if type(v) is int]
    found += [token for text in _STOP_TOKENS if (token := tokenizer.token_id(text)) is not None]
    if not found:
        raise CheckpointError(
            f"{llm}: no file says which token ends a text (eos_token_id in generation_config.json or config.json)"
        )
    return tuple(dict.fromkeys(found))
