"""From a recording to its words: every stage in order. Start reading here.

waveform (N,) → features (L, 560) → audio states (1, L+4, D) → audio embeddings (1, A, H) →
prompt rows (S, H) → token ids → text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .audio import SAMPLE_RATE, Source, load_audio
from .batch import BatchResult, transcribe_batch
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
from .prefix import PrefixCache
from .prompt import chat_prompt, spell
from .prompt_rows import leading_ids, prompt_rows
from .recognise import Recogniser
from .sampling import SamplingOptions
from .segment import split_at_pauses
from .speculate import DraftedGeneration
from .text import join_segments
from .tokenizer import Tokenizer
from .transcript import OnToken, Segment, TranscribeOptions, Transcript, Turn
from .written import WrittenWindow, text_of, written

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
        self._prefixes = PrefixCache(model.decoder)

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
        return self.transcribe_window_by_window(samples, chosen, on_token, watch)

    def transcribe_batch(
        self, sources: Iterable[Source], *, batch_size: int | None = None, **options: Any
    ) -> list[BatchResult]:
        """Transcribe many recordings, several at once; see `batch.transcribe_batch` for all of this."""
        return transcribe_batch(self, sources, batch_size=batch_size, **options)

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

    def transcribe_window_by_window(
        self,
        samples: npt.NDArray[np.float32],
        options: TranscribeOptions,
        on_token: OnToken | None,
        watch: Stopwatch,
    ) -> Transcript:
        """Transcribe samples (N,), 16 kHz; see `transcribe`."""
        start = time.perf_counter()
        self.check(options)
        heard: list[WrittenWindow] = []
        for first, last in split_at_pauses(samples, SAMPLE_RATE, options.segment_seconds):
            previous = heard[-1].text if heard else ""
            emit = None if on_token is None else _after(previous, on_token)
            generation, text = self._transcribe_segment(samples[first:last], options, emit, watch)
            heard.append(WrittenWindow.of(first, last, text, generation))
        transcript = self.joined(heard, options, watch)
        watch.add("total", watch.seconds["audio"] + time.perf_counter() - start)
        return transcript

    def check(self, options: TranscribeOptions) -> None:
        """Refuse before the work what this model cannot do.

        Raises:
            PromptError: If it cannot translate and should.
        """
        if options.translate:
            self._check_translation()

    def joined(self, heard: Sequence[WrittenWindow], options: TranscribeOptions, watch: Stopwatch) -> Transcript:
        """Join the windows of one recording, in order, and translate them if that is asked for."""
        text = join_segments([window.text for window in heard])
        translation = None
        if options.translate:
            with watch.stage("translation"):
                translation = self.translate_text(text)
        return Transcript(
            text=text,
            tokens=tuple(token for window in heard for token in window.tokens),
            language=None if options.language == "auto" else options.language,
            duration_seconds=heard[-1].last / SAMPLE_RATE,
            segments=tuple(Segment(w.first / SAMPLE_RATE, w.last / SAMPLE_RATE, w.text) for w in heard),
            timings=watch.seconds,
            finish_reason="length" if any(window.finish_reason == "length" for window in heard) else "stop",
            model=self.config.name,
            translation=translation,
            decoder_passes=sum(window.decoder_passes for window in heard),
            drafted=sum(window.drafted for window in heard),
            accepted=sum(window.accepted for window in heard),
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
        rows = self.prompt(embeddings[0], options, watch)
        chosen = self.generation_options(samples.size / SAMPLE_RATE, options)
        draft = self._draft(states, options, watch)
        known = self.known_prefix(options)
        if draft:
            generation: Generation = DraftedGeneration(decoder, rows, chosen, draft, **known)
        else:
            generation = Generation(decoder, rows, chosen, **known)
        text = self._run(generation, emit)
        watch.add("prefill", generation.prefill_seconds)
        watch.add("decode", generation.decode_seconds)
        return generation, text

    def known_prefix(self, options: TranscribeOptions) -> dict[str, Any]:
        """Return what a generation is told of the text that all prompts under these options begin with."""
        ids = leading_ids(self.config.prompt, options, spell=self._spell)
        return {"prefix": ids, "prefixes": self._prefixes}

    def _audio_embeddings(
        self, samples: npt.NDArray[np.float32], options: TranscribeOptions, watch: Stopwatch
    ) -> tuple[mx.array, mx.array]:
        """Return the rows for the decoder (1, A, H), and the audio states (1, R, D) that they come from."""
        states = self.audio_states(samples, options.language, bool(options.use_itn), watch)
        with watch.stage("adaptor"):
            embeddings = self.adapt(states, None, options)
            mx.eval(embeddings)
        return embeddings, states

    def adapt(self, states: mx.array, mask: mx.array | None, options: TranscribeOptions) -> mx.array:
        """Turn audio states (B, R, D), real where mask (B, R) is True, into rows for the decoder (B, A, H)."""
        dropped = self.config.dropped_rows
        choice = {}
        if isinstance(self.config.adaptor, NanoAdaptorConfig):
            choice = {"low_frame_rate": options.low_frame_rate}
        embeddings: mx.array = self.model.adaptor(
            states[:, dropped:], None if mask is None else mask[:, dropped:], **choice
        )
        return embeddings

    def _draft(self, states: mx.array, options: TranscribeOptions, watch: Stopwatch) -> list[int]:
        """Return the CTC head's text of audio states (1, R, D) as token ids; none if there is to be no draft.

        Raises:
            PromptError: If a draft is asked for and the model cannot make one.
        """
        if options.draft is False:
            return []
        if options.draft == "auto":
            # The CTC head writes what is said, in the language in which it is said.
            likely = options.temperature == 0 and options.task == "transcribe" and options.kv_bits is None
            if not likely or not self.config.ctc_size or not drafts_pay(self.model.decoder):
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

    def prompt(self, audio: mx.array, options: TranscribeOptions, watch: Stopwatch) -> mx.array:
        """Put audio rows (A, H) into the model's prompt: (S, H)."""
        history = [(turn.text, self._heard(turn, options, watch)) for turn in options.history]
        return prompt_rows(
            self.config.prompt, options, audio, spell=self._spell, embed=self.model.decoder.embed, history=history
        )

    def _heard(self, turn: Turn, options: TranscribeOptions, watch: Stopwatch) -> mx.array:
        """Return the audio rows (A, H) of an earlier turn."""
        return self._audio_embeddings(load_audio(turn.source, turn.sample_rate), options, watch)[0][0]

    def generation_options(self, duration_seconds: float, options: TranscribeOptions) -> GenerationOptions:
        """Return when to stop and how to choose in a window of this length."""
        defaults = self.config.generation
        return GenerationOptions(
            max_tokens=options.max_tokens or defaults.token_budget(duration_seconds),
            stop_token_ids=defaults.stop_token_ids,
            kv_bits=options.kv_bits,
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
        return written(generation, self.tokenizer, emit, marks_silence=self._marks_silence)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens, without what is not speech."""
        return text_of(tokens, self.tokenizer, marks_silence=self._marks_silence)

    @property
    def _marks_silence(self) -> bool:
        return isinstance(self.config.prompt, NanoPromptConfig)

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
