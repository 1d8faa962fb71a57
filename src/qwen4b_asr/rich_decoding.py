"""From the CTC scores of SenseVoiceSmall to words, their times and what the tags say.

The first four rows are those of the query frames, which the model answers with tags: they are classified, one
symbol a row. The rows after them spell the words.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .ctc import CtcToken, align, ctc_log_probs, greedy, prefix_beam_search, row_times_ms
from .pieces import PieceKind, PieceTable, word_groups
from .rich import TAG, UNKNOWN_EMOTION, RichText, parse_rich


@dataclass(frozen=True)
class CtcOptions:
    """How to decode.

    Args:
        beam_size: Prefixes of the beam search; 1 is greedy, as the original does it.
        symbols_per_row: See `ctc.prefix_beam_search`.
        ban_unknown_emotion: Make the model name an emotion, however unsure.
    """

    beam_size: int = 1
    symbols_per_row: int = 20
    ban_unknown_emotion: bool = False

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.symbols_per_row < 1:
            raise ValueError(
                f"[CtcOptions] beam_size and symbols_per_row must be at least 1 but got "
                f"{self.beam_size} and {self.symbols_per_row}"
            )


@dataclass(frozen=True)
class TimedText:
    """A piece or a word; `start` and `end` in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class RichRecognition:
    """What one recording says.

    Args:
        raw: The symbols' text, tags included.
        rich: The text without tags, and the tags as fields.
        ids: The symbols, those of the tags included.
        pieces: What each symbol after the query rows adds to the text, and when.
        words: Words, ideographs and punctuation, and their times.
        log_prob: Natural logarithm of the probability: of the best path if greedy, of tags and text if not.
    """

    raw: str
    rich: RichText
    ids: tuple[int, ...]
    pieces: tuple[TimedText, ...]
    words: tuple[TimedText, ...]
    log_prob: float


class RichDecoder:
    """Decodes the CTC scores of SenseVoiceSmall.

    Args:
        table: The checkpoint's pieces.
        blank: The CTC blank.
        query_rows: Rows at the start that belong to query frames.

    Raises:
        ValueError: If the blank is not in the table.
    """

    def __init__(self, table: PieceTable, *, blank: int = 0, query_rows: int = 4) -> None:
        if not 0 <= blank < len(table):
            raise ValueError(f"[RichDecoder] blank must lie in 0..{len(table) - 1} but got {blank}")
        self.table = table
        self.blank = blank
        self.query_rows = query_rows

    def __call__(self, logits: mx.array, options: CtcOptions | None = None) -> RichRecognition:
        """Decode one recording.

        Args:
            logits: CTC scores (R, V), the query rows first, padding rows left out.
            options: How; greedy by default.

        Raises:
            ValueError: If the scores are misshapen or have another number of symbols than the table.
        """
        options = options or CtcOptions()
        if logits.ndim != 2 or logits.shape[1] != len(self.table):
            raise ValueError(
                f"[RichDecoder] logits must have the shape (rows, {len(self.table)}) but got {tuple(logits.shape)}"
            )
        unknown = self.table.id_of(UNKNOWN_EMOTION) if options.ban_unknown_emotion else None
        log_probs = ctc_log_probs(logits, () if unknown is None else (unknown,))
        if options.beam_size == 1:
            tokens, log_prob = greedy(log_probs, blank=self.blank)
        else:
            tokens, log_prob = self._search(log_probs, options)
        ids = tuple(token.id for token in tokens)
        raw = self.table.decode(ids)
        pieces = self._timed(tokens)
        return RichRecognition(raw, parse_rich(raw), ids, pieces, _words(pieces), log_prob)

    def _search(self, log_probs: mx.array, options: CtcOptions) -> tuple[list[CtcToken], float]:
        """Classify the query rows and search the others for the best text."""
        tags, tags_log_prob = greedy(log_probs[: self.query_rows], blank=self.blank)
        speech = log_probs[self.query_rows :]
        best, *_ = prefix_beam_search(
            speech, beam_size=options.beam_size, symbols_per_row=options.symbols_per_row, blank=self.blank
        )
        text = align(speech, best.ids, blank=self.blank)
        rows = self.query_rows
        moved = [CtcToken(token.id, token.start + rows, token.end + rows) for token in text]
        return tags + moved, tags_log_prob + best.log_prob

    def _timed(self, tokens: list[CtcToken]) -> tuple[TimedText, ...]:
        """Give the visible pieces after the query rows, tags left out, their times."""
        spoken = [t for t in tokens if t.start >= self.query_rows and not TAG.fullmatch(self.table.pieces[t.id])]
        timed: list[TimedText] = []
        held: int | None = None  # where a character began whose last byte is still to come
        for token, surface in zip(spoken, self.table.surfaces(t.id for t in spoken), strict=True):
            place = CtcToken(token.id, token.start - self.query_rows, token.end - self.query_rows)
            start, end = row_times_ms(place)
            begun = start if held is None else held
            if surface:
                timed.append(TimedText(surface, begun / 1000, end / 1000))
            held = begun if not surface and self.table.kinds[token.id] == PieceKind.BYTE else None
        return tuple(timed)


def _words(pieces: tuple[TimedText, ...]) -> tuple[TimedText, ...]:
    """Join timed pieces into timed words."""
    return tuple(
        TimedText("".join(pieces[i].text for i in group).strip(), pieces[group.start].start, pieces[group[-1]].end)
        for group in word_groups([piece.text for piece in pieces])
    )
