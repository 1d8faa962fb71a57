"""The first half of every pipeline: a recording becomes audio states, which a language model or a CTC head reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .encoder import LANGUAGE_QUERIES
from .errors import PromptError
from .model import SpeechModel


class Stopwatch:
    """Adds up the seconds that each named stage takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under `name`; what it computes must be evaluated inside."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Listener:
    """Front end and encoder of a loaded model.

    Args:
        model: The network, weights filled in.
        config: Its configuration.
    """

    def __init__(self, model: SpeechModel, config: ModelConfig) -> None:
        self.model = model
        self.config = config

    def audio_states(
        self, samples: npt.NDArray[np.float32], language: str, use_itn: bool, watch: Stopwatch
    ) -> mx.array:
        """Encode one window of a recording.

        Args:
            samples: (N,), 16 kHz.
            language: For the encoder's query frames; encoders without them do not ask.
            use_itn: Likewise.
            watch: Gets the seconds of ``features`` and ``encoder``.

        Returns:
            Audio states (1, R, D), query frames first where the encoder has some.

        Raises:
            AudioError: If the recording is too short.
            PromptError: If the encoder does not know the language.
        """
        queries = self.queries(language, use_itn)
        with watch.stage("features"):
            features = self.model.frontend(mx.array(samples))[None]
            mx.eval(features)
        with watch.stage("encoder"):
            states: mx.array
            states, _ = self.model.audio_encoder(features, **queries)
            mx.eval(states)
        return states

    def queries(self, language: str, use_itn: bool) -> dict[str, Any]:
        """Return what the encoder is told beside the features: nothing, unless it has query frames.

        Raises:
            PromptError: If the encoder does not know the language.
        """
        if not self.config.query_frames:
            return {}
        if language not in LANGUAGE_QUERIES:
            raise PromptError(f"unknown language {language!r}; choose one of {', '.join(LANGUAGE_QUERIES)}")
        return {"language": language, "use_itn": use_itn}
