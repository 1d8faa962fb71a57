"""Text to token ids and back, from a checkpoint's ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from .errors import CheckpointError


class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: The ``tokenizer.json`` file.

    Raises:
        CheckpointError: If the file is missing or is not a tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: the tokenizer is missing; convert the checkpoint again")
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer.json that can be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Tokenise `text`; special tokens written in it are recognised, none are added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn ids back into text; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """Return the id of one token's text, or None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def stream(self) -> StreamDecoder:
        """Return a decoder that gives text as soon as it is certain."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one at a time; the pieces joined equal `Tokenizer.decode` of all ids.

    A character may need several tokens, so text that ends in U+FFFD is held back until it is whole or
    `flush` is called. Each step decodes only the ids since the last certain piece and the run before it.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of the last piece given out, the context of what follows
        self._given = 0  # ids whose text was given out

    def push(self, token_id: int) -> str:
        """Add an id; return the text that became certain, often empty."""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Return what is left, replacement characters included."""
        return self._give(self._pending())

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._given])
        return self._tokenizer.decode(self._ids[self._start :])[len(known) :]

    def _give(self, text: str) -> str:
        self._start = self._given
        self._given = len(self._ids)
        return text
