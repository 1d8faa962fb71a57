"""What a language model will probably write: the text of a CTC head, and the place in it that was reached.

The CTC head has read the same audio states, costs next to nothing and is often right, so its text is a draft that the
language model only has to confirm (`speculate`). Source of the alignment: the recurrence of Smith and Waterman,
"Identification of Common Molecular Subsequences" (1981).
Shapes: R audio rows, V CTC symbols, D tokens of a draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .rich_decoding import RichDecoder

# Scores of the alignment. A draft that lacks a token is a little less likely than one that has another in its place,
# and a token that the model leaves out more likely than either if the next one fits.
_MATCH, _OTHER, _ADDED, _LEFT_OUT = 1.0, -1.0, -1.1, -0.6
# What it costs to go on anywhere else: a stretch that was left out, or written twice. So no place is further behind the
# best one, and what counts is the recent text.
_JUMP = -4.0


class Drafter:
    """Turns CTC scores into the tokens of a draft.

    Args:
        decode: Reads the scores.
        encode: Turns text into token ids of the language model.
        vocabulary: Ids that the language model knows.
        symbols: Text of each symbol as the language model writes it, where the configuration has it; None where the
            decoder's text is to be taken, without its tags.
    """

    def __init__(
        self,
        decode: RichDecoder,
        encode: Callable[[str], list[int]],
        vocabulary: int,
        symbols: Sequence[str] | None = None,
    ) -> None:
        self.decode = decode
        self.encode = encode
        self.vocabulary = vocabulary
        self.symbols = symbols

    def __call__(self, logits: mx.array) -> list[int]:
        """Draft the text of one window from its CTC scores (R, V), the query rows first; may be empty."""
        heard = self.decode(logits)
        text = heard.rich.text if self.symbols is None else "".join(self.symbols[i] for i in heard.ids)
        return [token for token in self.encode(text) if token < self.vocabulary] if text else []


class Place:
    """The place in a draft that a text has reached, found anew with every token.

    The place follows the best alignment of the text with the draft: tokens may differ, be added or be left out, and
    a long stretch costs no more than a jump.

    Args:
        draft: Token ids (D,).
    """

    def __init__(self, draft: Sequence[int]) -> None:
        self.draft = tuple(draft)
        self._ids = np.array(self.draft, dtype=np.int64)
        self._climb = -_LEFT_OUT * np.arange(len(self.draft) + 1)
        # Entry j: the best score of all alignments of the text so far that end behind draft token j.
        self._scores = np.maximum(-self._climb, _JUMP)

    @property
    def position(self) -> int:
        """Tokens of the draft that lie behind the text."""
        return int(np.argmax(self._scores))

    def ahead(self, count: int) -> tuple[int, ...]:
        """Return up to `count` tokens that should come next."""
        position = self.position
        return self.draft[position : position + count]

    def push(self, token: int) -> None:
        """Take note of the text's next token."""
        before = self._scores - self._scores.max()
        scores = before + _ADDED
        np.maximum(scores, _JUMP, out=scores)
        scores[1:] = np.maximum(scores[1:], before[:-1] + np.where(self._ids == token, _MATCH, _OTHER))
        # Leaving out any number of draft tokens: a running maximum over what lies before.
        self._scores = np.maximum.accumulate(scores + self._climb) - self._climb
