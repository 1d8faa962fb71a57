"""The configuration of a whole model: the stages' configurations, composed and read strictly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .adaptor import AdaptorConfig
from .decoder import DecoderConfig
from .encoder import EncoderConfig
from .errors import ConfigError
from .fastconformer import FastConformerConfig
from .features import FrontendConfig
from .mel import MelConfig
from .nano_adaptor import NanoAdaptorConfig, NanoCtcConfig
from .nano_prompt import NanoPromptConfig
from .projection import ProjectionConfig
from .prompt import PromptConfig
from .quantization import Quantization

SCHEMA = 1
FILE_NAME = "config.json"

T = TypeVar("T")

STAGES: dict[str, tuple[type[Any], ...]] = {
    "frontend": (FrontendConfig, MelConfig),
    "encoder": (EncoderConfig, FastConformerConfig),
    "adaptor": (AdaptorConfig, NanoAdaptorConfig, ProjectionConfig),
    "decoder": (DecoderConfig,),
    "ctc": (NanoCtcConfig,),
    "prompt": (PromptConfig, NanoPromptConfig),
}
"""What may stand in each place. ``kind`` in a file chooses; without it the first is meant."""

_QUANTIZABLE = ("encoder", "adaptor")


@dataclass(frozen=True)
class GenerationConfig:
    """A checkpoint's defaults for decoding.

    Args:
        stop_token_ids: Tokens that end a text.
        repetition_penalty: See `sampling.SamplingOptions`.
        no_repeat_ngram: See `sampling.SamplingOptions`.
        tokens_per_second: Growth of the token budget with the audio's duration.
        min_tokens: The budget of the shortest recording.
    """

    stop_token_ids: tuple[int, ...] = (151645, 151643)
    repetition_penalty: float = 1.2
    no_repeat_ngram: int = 4
    tokens_per_second: float = 12.0
    min_tokens: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not self.stop_token_ids:
            raise ValueError("[GenerationConfig] stop_token_ids must not be empty")
        if self.min_tokens < 1 or self.tokens_per_second < 0:
            raise ValueError(
                f"[GenerationConfig] min_tokens must be at least 1 and tokens_per_second not negative but got "
                f"{self.min_tokens} and {self.tokens_per_second}"
            )

    def token_budget(self, duration_seconds: float) -> int:
        """Return the most tokens that a recording of this length may give."""
        return self.min_tokens + int(self.tokens_per_second * duration_seconds)


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is not a weight.

    A model writes text with its language model, from what the adaptor makes of the audio states, or, without the two,
    with its CTC head.

    Args:
        name: What the model calls itself.
        frontend: Waveform to features.
        encoder: Features to audio states.
        adaptor: Audio states to decoder rows; None in a model without a language model.
        decoder: Language model; None in a model that has only its CTC head.
        ctc: CTC branch beside the adaptor; None where the encoder has its own head, or there is none.
        prompt: How it wants to be asked; None in a model without a language model.
        generation: Decoding defaults.
        ctc_symbols: Text of each CTC symbol, the blank an empty string; None where only ids are known, or a file of
            pieces lies beside the weights.
        quantized_stages: How matrices of ``encoder`` and ``adaptor`` are quantised, by the paths within them; the
            decoder's own configuration says it of the decoder.
    """

    name: str = "funasr-qwen4b"
    frontend: FrontendConfig | MelConfig = field(default_factory=FrontendConfig)
    encoder: EncoderConfig | FastConformerConfig = field(default_factory=EncoderConfig)
    adaptor: AdaptorConfig | NanoAdaptorConfig | ProjectionConfig | None = field(default_factory=AdaptorConfig)
    decoder: DecoderConfig | None = field(default_factory=DecoderConfig)
    ctc: NanoCtcConfig | None = None
    prompt: PromptConfig | NanoPromptConfig | None = field(default_factory=PromptConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    ctc_symbols: tuple[str, ...] | None = None
    quantized_stages: Mapping[str, Quantization] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_parts()
        stages = {n: Quantization(**q) if isinstance(q, Mapping) else q for n, q in self.quantized_stages.items()}
        object.__setattr__(self, "quantized_stages", stages)
        if not stages.keys() <= set(_QUANTIZABLE) or ("adaptor" in stages and self.adaptor is None):
            raise ValueError(f"[ModelConfig] quantized_stages must be among the model's but got {sorted(stages)}")
        for left, a, right, b in self._joints():
            if a != b:
                raise ValueError(f"[ModelConfig] {left} must equal {right} but got {a} and {b}")
        if self.decoder is not None:
            for token in self.generation.stop_token_ids:
                if not 0 <= token < self.decoder.vocab_size:
                    raise ValueError(
                        f"[ModelConfig] stop tokens must lie below {self.decoder.vocab_size} but got {token}"
                    )
        if self.ctc_symbols is not None:
            object.__setattr__(self, "ctc_symbols", tuple(self.ctc_symbols))
            if len(self.ctc_symbols) != self.ctc_size:
                raise ValueError(
                    f"[ModelConfig] ctc_symbols must hold {self.ctc_size} texts but got {len(self.ctc_symbols)}"
                )

    def _check_parts(self) -> None:
        together = [self.adaptor is None, self.decoder is None, self.prompt is None]
        if len(set(together)) > 1:
            raise ValueError("[ModelConfig] adaptor, decoder and prompt must be all there or all missing")
        if self.decoder is None and not self.ctc_size:
            raise ValueError("[ModelConfig] a model without a decoder must have a CTC head")
        if self.ctc is not None and self._encoder_symbols:
            raise ValueError("[ModelConfig] ctc must be None where the encoder has its own CTC head")

    def _joints(self) -> list[tuple[str, int, str, int]]:
        states = ("encoder.output_size", self.encoder.output_size)
        joints = [("frontend output", self.frontend.output_size, "encoder.input_size", self.encoder.input_size)]
        if self.adaptor is not None and self.decoder is not None:
            joints.append((*states, "adaptor.input_size", self.adaptor.input_size))
            joints.append(
                ("adaptor.output_size", self.adaptor.output_size, "decoder.hidden_size", self.decoder.hidden_size)
            )
        if self.ctc is not None:
            joints.append((*states, "ctc.transformer.input_size", self.ctc.transformer.input_size))
        return joints

    def quantization(self, part: str) -> Quantization | None:
        """Return how ``encoder``, ``adaptor`` or ``decoder`` is quantised, None if it is not."""
        if part == "decoder":
            return None if self.decoder is None else self.decoder.quantization
        return self.quantized_stages.get(part)

    def with_quantization(self, forms: Mapping[str, Quantization]) -> ModelConfig:
        """Return a copy with some of ``encoder``, ``adaptor`` and ``decoder`` quantised."""
        decoder = self.decoder
        if decoder is not None and "decoder" in forms:
            decoder = dataclasses.replace(decoder, quantization=forms["decoder"])
        stages = {**self.quantized_stages, **{part: forms[part] for part in _QUANTIZABLE if part in forms}}
        return dataclasses.replace(self, decoder=decoder, quantized_stages=stages)

    @property
    def _encoder_symbols(self) -> int:
        return self.encoder.vocab_size if isinstance(self.encoder, EncoderConfig) else 0

    @property
    def ctc_size(self) -> int:
        """Symbols of the CTC head, 0 if there is none."""
        return self._encoder_symbols if self.ctc is None else self.ctc.vocab_size

    @property
    def ctc_blank(self) -> int:
        """The CTC blank."""
        if self.ctc is not None:
            assert self.ctc.blank_id is not None  # its own check fills it in
            return self.ctc.blank_id
        return self.encoder.blank_id if isinstance(self.encoder, EncoderConfig) else 0

    @property
    def query_frames(self) -> int:
        """Rows at the start of the audio states that are no audio."""
        return self.encoder.query_frames if isinstance(self.encoder, EncoderConfig) else 0

    @property
    def dropped_rows(self) -> int:
        """Rows at the start of the audio states that the decoder does not get."""
        drops = isinstance(self.prompt, PromptConfig) and self.prompt.query_frames == "drop"
        return self.query_frames if drops else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the schema number first."""
        values = dataclasses.asdict(self)
        if not self.quantized_stages:  # most models: their files read as before there was such a key
            del values["quantized_stages"]
        return {"schema": SCHEMA, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = FILE_NAME) -> ModelConfig:
        """Build a configuration from JSON values.

        Args:
            values: What `to_dict` wrote.
            source: The file's name, for messages.

        Raises:
            ConfigError: On another schema, an unknown key, or values that do not fit.
        """
        values = dict(values)
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise ConfigError(
                f"{source}: schema {SCHEMA} is needed but the file has {schema!r}; convert the model again"
            )
        for name, kinds in STAGES.items():
            if values.get(name) is not None:
                where = f"{source}: {name}"
                values[name] = _build(_kind(kinds, values[name], where), values[name], where)
        if "generation" in values:
            values["generation"] = _build(GenerationConfig, values["generation"], f"{source}: generation")
        return _build(cls, values, source)

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` into a directory."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=2)
        (Path(directory) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Read ``config.json`` from a directory.

        Raises:
            ConfigError: If it is missing, is not JSON, or does not describe a model.
        """
        path = Path(directory) / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: missing; {directory} is not a converted model") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a JSON object is needed but it holds {type(values).__name__}")
        return cls.from_dict(values, source=str(path))


def _kind(kinds: tuple[type[Any], ...], values: Any, source: str) -> type[Any]:
    """Choose a configuration's class by its ``kind``."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind is None:
        return kinds[0]
    known = {getattr(cls, "kind", None): cls for cls in kinds}
    if kind not in known:
        names = ", ".join(repr(name) for name in known if name is not None) or "none"
        raise ConfigError(f"{source}: unknown kind {kind!r}; known are {names}")
    return known[kind]


def _build(cls: type[T], values: Any, source: str) -> T:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: a JSON object is needed but got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{source}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
