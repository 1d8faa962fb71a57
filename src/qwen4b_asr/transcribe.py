"""From a recording to its words: every stage in order. Start reading here.

waveform (N,) → features (L, 560) → audio states (1, L+4, D) → audio embeddings (1, A, H) →
prompt rows (S, H) → token ids → text.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .audio import SAMPLE_RATE, Source, load_audio
from .config import ModelConfig
from .draft import Drafter
from .errors import ConfigError, PromptError
from .generate import Generation, GenerationOptions
from .listen import Listener, Stopwatch
from .model import SpeechModel
from .nano_adaptor import NanoAdaptorConfig
from .nano_prompt import NanoPromptConfig
from .pass_costs import drafts_pay
from .pieces import PieceTable
from .prompt import chat_prompt, spell
from .prompt_rows import prompt_rows
from .recognise import Recogniser
from .sampling import SamplingOptions
from .segment import split_at_pauses
from .speculate import DraftedGeneration
from .text import join_segments
from .tokenizer import Tokenizer
from .transcript import OnToken, Segment, TranscribeOptions, Transcript, Turn
from .written import written

_TRANSLATE = "Translate to English: "


class Transcriber(Listener):
    """A loaded model whose language model writes the text.

    Args:
        model: The network, weights filled in.
        config: Its configuration.
        tokenizer: Its tokenizer.
        pieces: Text of the symbols of its CTC head, if it has one that the configuration does not spell.
    """

    def __init__(
        self, model: SpeechModel, config: ModelConfig, tokenizer: Tokenizer, pieces: PieceTable | None = None
    ) -> None:
        super().__init__(model, config)
        self.tokenizer = tokenizer
        self.pieces = pieces
        self._drafter: Drafter | None = None

    def recogniser(self) -> Recogniser:
        """Return the CTC head of the same loaded model as a recogniser of its own.

        Raises:
            ConfigError: If the model has none.
        """
        return Recogniser(self.model, self.config, self.pieces)

    def transcribe(
        self,
        source: Source,
        sample_rate: int | None = None,
        *,
        on_token: OnToken | None = None,
        **options: Any,
    ) -> Transcript:
        """Transcribe a recording.

        Args:
            source: Path, bytes or binary file object of an audio file, or samples (N,) or (N, channels).
            sample_rate: Samples per second of an array; None means 16 kHz. Files know their own.
            on_token: Called with each piece of text as soon as it is certain; the pieces joined are the text.
            **options: Fields of `TranscribeOptions`.

        Returns:
            The transcript.

        Raises:
            AudioError: If the recording cannot be read or is too short.
            PromptError: If language, profile or task do not fit the model.
            TypeError: On an unknown option.
        """
        chosen = TranscribeOptions.of(options)
        if chosen.decoder not in (None, "llm"):
            return self.recogniser().transcribe(source, sample_rate, on_token=on_token, **options)
        watch = Stopwatch()
        with watch.stage("audio"):
            samples = load_audio(source, sample_rate)
        return self._transcribe(samples, chosen, on_token, watch)

    def transcribe_samples(
        self, samples: npt.NDArray[Any] | mx.array, sample_rate: int | None = None, **options: Any
    ) -> Transcript:
        """Transcribe samples (N,) or (N, channels); see `transcribe`, which also takes them."""
        return self.transcribe(samples, sample_rate, **options)

    def encode_audio(
        self,
        samples: Source,
        sample_rate: int | None = None,
        *,
        language: str = "auto",
        use_itn: bool | None = None,
    ) -> mx.array:
        """Turn a recording into the rows that the decoder reads in place of token embeddings.

        Args:
            samples: As in `transcribe`.
            sample_rate: As in `transcribe`.
            language: Language query of the encoder.
            use_itn: Ask the encoder for inverse text normalisation.

        Returns:
            Audio embeddings (1, A, H).

        Raises:
            AudioError: If the recording cannot be read or is too short.
        """
        waveform = load_audio(samples, sample_rate)
        options = TranscribeOptions(language=language, use_itn=use_itn)
        return self._audio_embeddings(waveform, options, Stopwatch())[0]

    def generate_text(self, prompt: str, max_tokens: int = 256) -> str:
        """Continue a text with the decoder alone, greedily, without processors.

        Raises:
            PromptError: If the model's vocabulary cannot spell the prompt.
        """
        return self._continue(prompt, max_tokens, SamplingOptions())

    def complete(self, prompt: str, max_tokens: int = 256, temperature: float = 0.0) -> str:
        """Answer one user turn through Qwen3's chat template, thinking off.

        Args:
            prompt: What the user says.
            max_tokens: Budget of the answer.
            temperature: 0 is greedy; above 0 tokens are drawn.

        Raises:
            PromptError: If the model's vocabulary cannot spell the template.
        """
        return self._continue(chat_prompt(prompt), max_tokens, SamplingOptions(temperature=temperature))

    def translate_text(self, text: str) -> str:
        """Translate a text to English with the decoder alone.

        Raises:
            PromptError: If the model's vocabulary cannot spell the template.
        """
        self._check_translation()
        budget = 64 + 4 * len(self.tokenizer.encode(text))
        return self.complete(f"{_TRANSLATE}{text}", max_tokens=budget)

    def _check_translation(self) -> None:
        """Refuse before the work rather than after it: a small vocabulary may lack the chat template's words."""
        try:
            self._spell(chat_prompt(_TRANSLATE))
        except PromptError as error:
            raise PromptError("this model cannot translate: its vocabulary lacks the words of the request") from error

    def _transcribe(
        self,
        samples: npt.NDArray[np.float32],
        options: TranscribeOptions,
        on_token: OnToken | None,
        watch: Stopwatch,
    ) -> Transcript:
        start = time.perf_counter()
        if options.translate:
            self._check_translation()
        tokens: list[int] = []
        passes = drafted = accepted = 0
        segments: list[Segment] = []
        finish_reason = "stop"
        for first, last in split_at_pauses(samples, SAMPLE_RATE, options.segment_seconds):
            previous = segments[-1].text if segments else ""
            emit = None if on_token is None else _after(previous, on_token)
            generation, text = self._transcribe_segment(samples[first:last], options, emit, watch)
            tokens += generation.tokens
            passes += generation.decoder_passes
            if isinstance(generation, DraftedGeneration):
                drafted += generation.drafted
                accepted += generation.accepted
            segments.append(Segment(first / SAMPLE_RATE, last / SAMPLE_RATE, text))
            if generation.finish_reason == "length":
                finish_reason = "length"
        text = join_segments([s.text for s in segments])
        translation = None
        if options.translate:
            with watch.stage("translation"):
                translation = self.translate_text(text)
        watch.add("total", watch.seconds["audio"] + time.perf_counter() - start)
        return Transcript(
            text=text,
            tokens=tuple(tokens),
            language=None if options.language == "auto" else options.language,
            duration_seconds=samples.size / SAMPLE_RATE,
            segments=tuple(segments),
            timings=watch.seconds,
            finish_reason=finish_reason,
            model=self.config.name,
            translation=translation,
            decoder_passes=passes,
            drafted=drafted,
            accepted=accepted,
        )

    def _transcribe_segment(
        self,
        samples: npt.NDArray[np.float32],
        options: TranscribeOptions,
        emit: OnToken | None,
        watch: Stopwatch,
    ) -> tuple[Generation, str]:
        decoder = self.model.decoder
        embeddings, states = self._audio_embeddings(samples, options, watch)
        rows = self._prompt_rows(embeddings[0], options, watch)
        chosen = self._generation_options(samples.size / SAMPLE_RATE, options)
        draft = self._draft(states, options, watch)
        generation = DraftedGeneration(decoder, rows, chosen, draft) if draft else Generation(decoder, rows, chosen)
        text = self._run(generation, emit)
        watch.add("prefill", generation.prefill_seconds)
        watch.add("decode", generation.decode_seconds)
        return generation, text

    def _audio_embeddings(
        self, samples: npt.NDArray[np.float32], options: TranscribeOptions, watch: Stopwatch
    ) -> tuple[mx.array, mx.array]:
        """Return the rows for the decoder (1, A, H), and the audio states (1, R, D) that they come from."""
        states = self.audio_states(samples, options.language, bool(options.use_itn), watch)
        with watch.stage("adaptor"):
            choice = {}
            if isinstance(self.config.adaptor, NanoAdaptorConfig):
                choice = {"low_frame_rate": options.low_frame_rate}
            embeddings: mx.array = self.model.adaptor(states[:, self.config.dropped_rows :], **choice)
            mx.eval(embeddings)
        return embeddings, states

    def _draft(self, states: mx.array, options: TranscribeOptions, watch: Stopwatch) -> list[int]:
        """Return the CTC head's text of audio states (1, R, D) as token ids; none if there is to be no draft.

        Raises:
            PromptError: If a draft is asked for and the model cannot make one.
        """
        if options.draft is False:
            return []
        if options.draft == "auto":
            # The CTC head writes what is said, in the language in which it is said.
            likely = options.temperature == 0 and options.task == "transcribe" and drafts_pay(self.model.decoder)
            if not likely or not self.config.ctc_size:
                return []
        try:
            drafter = self._own_drafter()
        except ConfigError as error:
            if options.draft == "auto":
                return []
            raise PromptError(f"this model cannot make a draft: {error}") from error
        with watch.stage("draft"):
            return drafter(self.model.ctc_logits(states)[0])

    def _own_drafter(self) -> Drafter:
        if not self.config.ctc_size:
            raise ConfigError("it has no CTC head")
        if self._drafter is None:
            decode, encode = self.recogniser().decode, self.tokenizer.encode
            self._drafter = Drafter(decode, encode, self.model.decoder.config.vocab_size, self.config.ctc_symbols)
        return self._drafter

    def _prompt_rows(self, audio: mx.array, options: TranscribeOptions, watch: Stopwatch) -> mx.array:
        """Put audio rows (A, H) into the model's prompt: (S, H)."""
        history = [(turn.text, self._heard(turn, options, watch)) for turn in options.history]
        return prompt_rows(
            self.config.prompt, options, audio, spell=self._spell, embed=self.model.decoder.embed, history=history
        )

    def _heard(self, turn: Turn, options: TranscribeOptions, watch: Stopwatch) -> mx.array:
        """Return the audio rows (A, H) of an earlier turn."""
        return self._audio_embeddings(load_audio(turn.source, turn.sample_rate), options, watch)[0][0]

    def _generation_options(self, duration_seconds: float, options: TranscribeOptions) -> GenerationOptions:
        defaults = self.config.generation
        return GenerationOptions(
            max_tokens=options.max_tokens or defaults.token_budget(duration_seconds),
            stop_token_ids=defaults.stop_token_ids,
            sampling=SamplingOptions(
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                repetition_penalty=_either(options.repetition_penalty, defaults.repetition_penalty),
                no_repeat_ngram=_either(options.no_repeat_ngram, defaults.no_repeat_ngram),
                seed=options.seed,
            ),
        )

    def _continue(self, prompt: str, max_tokens: int, sampling: SamplingOptions) -> str:
        ids = self._spell(prompt)
        if not ids:
            raise PromptError("the prompt is empty")
        options = GenerationOptions(max_tokens, self.config.generation.stop_token_ids, sampling)
        return self._run(Generation(self.model.decoder, self.model.decoder.embed(mx.array(ids)), options), None)

    def _run(self, generation: Generation, emit: OnToken | None) -> str:
        return written(generation, self.tokenizer, emit, marks_silence=isinstance(self.config.prompt, NanoPromptConfig))

    def _spell(self, text: str) -> list[int]:
        return spell(
            self.tokenizer.encode,
            lambda ids: self.tokenizer.decode(ids, skip_special=False),
            text,
        )


def _either(chosen: Any, default: Any) -> Any:
    return default if chosen is None else chosen


def _after(previous: str, emit: OnToken) -> OnToken:
    """Put before the first piece what `join_segments` puts between two texts."""
    pending = [previous]

    def joined(piece: str) -> None:
        before = pending.pop() if pending else ""
        emit(join_segments([before, piece])[len(before) :] if before else piece)

    return joined
