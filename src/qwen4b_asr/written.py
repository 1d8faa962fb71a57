"""From token ids to text, whole or piece by piece as they come."""

from __future__ import annotations

from .generate import Generation
from .nano_prompt import NanoTextStream, nano_text
from .text import CleanStream, clean_text
from .tokenizer import Tokenizer
from .transcript import OnToken


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
        text = clean_text(tokenizer.decode(generation.tokens))
        return nano_text(text) if marks_silence else text
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
