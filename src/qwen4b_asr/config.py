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
from .encoder import NUM_QUERY_FRAMES, EncoderConfig
from .errors import ConfigError
from .features import FrontendConfig
from .prompt import PromptConfig

SCHEMA = 1
FILE_NAME = "config.json"

T = TypeVar("T")


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

    Args:
        name: What the model calls itself.
        frontend: Waveform to features.
        encoder: Features to audio states.
        adaptor: Audio states to decoder rows.
        decoder: Language model.
        prompt: How it wants to be asked.
        generation: Decoding defaults.
        ctc_symbols: Text of each CTC symbol, the blank an empty string; None where only ids are known.
    """

    name: str = "funasr-qwen4b"
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    ctc_symbols: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for left, a, right, b in (
            ("frontend output", self.frontend.output_size, "encoder.input_size", self.encoder.input_size),
            ("encoder.output_size", self.encoder.output_size, "adaptor.input_size", self.adaptor.input_size),
            ("adaptor.output_size", self.adaptor.output_size, "decoder.hidden_size", self.decoder.hidden_size),
        ):
            if a != b:
                raise ValueError(f"[ModelConfig] {left} must equal {right} but got {a} and {b}")
        for token in self.generation.stop_token_ids:
            if not 0 <= token < self.decoder.vocab_size:
                raise ValueError(f"[ModelConfig] stop tokens must lie below {self.decoder.vocab_size} but got {token}")
        if self.ctc_symbols is not None:
            object.__setattr__(self, "ctc_symbols", tuple(self.ctc_symbols))
            if len(self.ctc_symbols) != self.encoder.vocab_size:
                wanted, got = self.encoder.vocab_size, len(self.ctc_symbols)
                raise ValueError(f"[ModelConfig] ctc_symbols must hold {wanted} texts but got {got}")

    @property
    def dropped_rows(self) -> int:
        """Rows at the start of the audio states that the decoder does not get."""
        return NUM_QUERY_FRAMES if self.prompt.query_frames == "drop" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the schema number first."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

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
        stages: dict[str, type[Any]] = {
            "frontend": FrontendConfig,
            "encoder": EncoderConfig,
            "adaptor": AdaptorConfig,
            "decoder": DecoderConfig,
            "prompt": PromptConfig,
            "generation": GenerationConfig,
        }
        for name, stage in stages.items():
            if name in values:
                values[name] = _build(stage, values[name], f"{source}: {name}")
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
