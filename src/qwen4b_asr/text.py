"""Decoded text: cleaned, joined across segments, and written in the output formats.

Pure functions and one small state machine. A transcript is here the dictionary
that `Transcript.to_dict()` gives; nothing in this file knows the class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = ("txt", "json")
"""Names that `format_transcript` knows, which are also the file suffixes."""

JSON_KEYS = ("text", "tokens", "language", "duration_seconds", "segments", "timings", "finish_reason")
"""What every JSON transcript carries, whatever else it may carry."""

_THINK_OPEN = "<think>"
_THINK_CLOSE = "</think>"


def clean_text(text: str) -> str:
    """Remove what is not speech: empty think blocks at the start, and white space around the text."""
    return _clean_head(text).rstrip()


class CleanStream:
    """`clean_text` for text that comes in pieces: what it returns, joined, equals the cleaned whole.

    The beginning is held back while it may still become an empty think block, and white space until
    something follows it.
    """

    def __init__(self) -> None:
        self._held = ""
        self._started = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that is certain now, often empty."""
        self._held += piece
        if not self._started:
            head = self._held.lstrip()
            if _may_be_empty_think(head):
                return ""
            self._held = _clean_head(head)
            if not self._held:
                return ""
            self._started = True
        certain = self._held.rstrip()
        self._held = self._held[len(certain) :]
        return certain

    def flush(self) -> str:
        """Return what is left at the end."""
        rest = self._held.rstrip() if self._started else clean_text(self._held)
        self._held = ""
        return rest


def _clean_head(text: str) -> str:
    """Remove white space and empty think blocks from the start of `text`, leaving its end alone."""
    text = text.lstrip()
    while text.startswith(_THINK_OPEN):
        inside, close, rest = text[len(_THINK_OPEN) :].partition(_THINK_CLOSE)
        if not close or inside.strip():
            break
        text = rest.lstrip()
    return text


def _may_be_empty_think(head: str) -> bool:
    """Tell whether `head`, without leading white space, could still turn into an empty think block and no more."""
    if len(head) < len(_THINK_OPEN):
        return _THINK_OPEN.startswith(head)
    if not head.startswith(_THINK_OPEN):
        return False
    inside = head[len(_THINK_OPEN) :].lstrip()
    return len(inside) < len(_THINK_CLOSE) and _THINK_CLOSE.startswith(inside)


def join_segments(texts: Sequence[str]) -> str:
    """Join the texts of consecutive segments: a space between words that need one, none between CJK characters."""
    joined = ""
    for text in texts:
        if joined and text and not (_is_wide(joined[-1]) or _is_wide(text[0])):
            joined += " "
        joined += text
    return joined


def _is_wide(character: str) -> bool:
    """Tell whether a character belongs to a script written without spaces, or to its punctuation."""
    code = ord(character)
    return (
        0x2E80 <= code <= 0x30FF  # radicals, CJK punctuation, kana
        or 0x3400 <= code <= 0x9FFF  # ideographs
        or 0xF900 <= code <= 0xFAFF  # compatibility ideographs
        or 0xFF00 <= code <= 0xFFEF  # full-width forms
        or 0x20000 <= code <= 0x3FFFF  # further ideographs
    )


def one_line(text: str) -> str:
    """Join lines with one space each, for listings of one transcript per line."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def texts_of(transcript: Mapping[str, Any]) -> list[str]:
    """Return the text of a transcript and, if there is one, its translation."""
    translation = transcript.get("translation")
    return [transcript["text"]] if translation is None else [transcript["text"], translation]


def format_transcript(transcript: Mapping[str, Any], name: str) -> str:
    r"""Write a transcript in one of `FORMATS`.

    Args:
        transcript: what `Transcript.to_dict()` gives, and whatever a caller adds to it.
        name: `txt`, the text and, if there is one, its translation on a line of its own; or `json`, one object on
            one line, in UTF-8 characters rather than `\u` escapes.

    Returns:
        The text, ending in a line break.

    Raises:
        ValueError: an unknown format; a number that JSON cannot hold (NaN or infinity); or, for JSON, a transcript
            without one of `JSON_KEYS`.
    """
    if name == "txt":
        return "".join(f"{text}\n" for text in texts_of(transcript))
    if name == "json":
        return _to_json(transcript)
    raise ValueError(f"[format_transcript] name must be one of {', '.join(FORMATS)} but got {name!r}")


def _to_json(transcript: Mapping[str, Any]) -> str:
    missing = [key for key in JSON_KEYS if key not in transcript]
    if missing:
        raise ValueError(f"[format_transcript] a transcript must have {', '.join(JSON_KEYS)} but got no {missing[0]}")
    # Other code units that end a line somewhere are escaped, so that one object is one line for every reader.
    line = json.dumps(dict(transcript), ensure_ascii=False, allow_nan=False)
    return line.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029") + "\n"
