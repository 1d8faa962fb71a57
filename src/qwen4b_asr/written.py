"""From token ids to text, whole or piece by piece as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .generate import Generation
from .nano_prompt import NanoTextStream, nano_text
from .speculate import DraftedGeneration
from .text import CleanStream, clean_text
from .tokenizer import Tokenizer
from .transcript import OnToken


@dataclass(frozen=True)
class WrittenWindow:
    """What the language model wrote of one window.

    Args:
        first: Its first sample.
        last: The sample behind it.
        text: The words.
        tokens: Token ids behind them.
        finish_reason: ``stop`` or ``length``.
        decoder_passes: Passes of the decoder that took part, after the prefill.
        drafted: Drafted tokens that were verified.
        accepted: How many of them were right.
    """

    first: int
    last: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    decoder_passes: int
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, first: int, last: int, text: str, generation: Generation) -> WrittenWindow:
        """Take over what a generation says about itself."""
        drafted = accepted = 0
        if isinstance(generation, DraftedGeneration):
            drafted, accepted = generation.drafted, generation.accepted
        tokens, passes = tuple(generation.tokens), generation.decoder_passes
        return cls(first, last, text, tokens, generation.finish_reason, passes, drafted, accepted)


def text_of(tokens: Sequence[int], tokenizer: Tokenizer, *, marks_silence: bool = False) -> str:
    """Return the text of generated tokens, without what is not speech; see `written`."""
    text = clean_text(tokenizer.decode(tokens))
    return nano_text(text) if marks_silence else text


def written(
    generation: Generation, tokenizer: Tokenizer, emit: OnToken | None = None, *, marks_silence: bool = False
) -> str:
    """Run a generation to its end.

    Args:
        generation: The run; not iterated over yet.
        tokenizer: Of the model.
        emit: Called with each piece of text as soon as it is certain; the pieces joined are the text.
        marks_silence: Whether the model writes Fun-ASR-Nano's mark for silence, which is no text.

    Returns:
        The text, without what is not speech.
    """
    if emit is None:
        for _ in generation:
            pass
        return text_of(generation.tokens, tokenizer, marks_silence=marks_silence)
    stream, clean = tokenizer.stream(), CleanStream()
    tidy = NanoTextStream() if marks_silence else None
    pieces = []

    def show(piece: str, last: bool = False) -> None:
        if tidy is not None:
            piece = tidy.push(piece) + (tidy.flush() if last else "")
        pieces.append(piece)
        if piece:
            emit(piece)

    for token in generation:
        show(clean.push(stream.push(token)))
    show(clean.push(stream.flush()) + clean.flush(), last=True)
    return "".join(pieces)
