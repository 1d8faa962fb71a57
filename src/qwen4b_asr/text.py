"""Decoded text made presentable, and transcripts written as text or JSON.

Pure functions: text or a plain dictionary in, text out. A transcript is the
dictionary that `Transcript.to_dict()` gives; nothing here knows the class.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

FORMATS = ("txt", "json")
"""Names that `format_transcript` knows, which are also the file suffixes."""

JSON_KEYS = ("text", "language", "duration_seconds", "finish_reason", "segments", "tokens", "timings", "model")
"""What every JSON transcript carries, in this order, whatever else it may carry behind them."""

# Qwen3 writes this in front of an answer when thinking is switched off. One with thoughts in it is left standing:
# it is not what was asked for, and hiding it would hide that.
_EMPTY_THOUGHT = re.compile(r"^\s*<think>\s*</think>")


def clean(text: str) -> str:
    """Take an empty `<think></think>` block at the start and the white space at both ends off; change nothing else."""
    return _EMPTY_THOUGHT.sub("", text, count=1).strip()


def one_line(text: str) -> str:
    """Join lines with one space each, for listings of one transcript per line."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def format_transcript(transcript: Mapping[str, Any], name: str) -> str:
    r"""Write a transcript in one of `FORMATS`.

    Args:
        transcript: what `Transcript.to_dict()` gives, and whatever a caller adds to it.
        name: `txt`, the text alone, or `json`, one object on one line, in UTF-8 characters rather than `\u` escapes.

    Returns:
        The text, ending in a line break.

    Raises:
        ValueError: an unknown format; a number that JSON cannot hold (NaN or infinity); or, for JSON, a transcript
            without one of `JSON_KEYS`.
    """
    if name == "txt":
        return f"{transcript['text']}\n"
    if name == "json":
        return _to_json(transcript)
    raise ValueError(f"[format_transcript] name must be one of {', '.join(FORMATS)} but got {name!r}")


def _to_json(transcript: Mapping[str, Any]) -> str:
    missing = [key for key in JSON_KEYS if key not in transcript]
    if missing:
        raise ValueError(f"[format_transcript] a transcript must have {', '.join(JSON_KEYS)} but got no {missing[0]}")
    ordered = {key: transcript[key] for key in JSON_KEYS}
    ordered.update((key, value) for key, value in transcript.items() if key not in ordered)
    # Other code units that end a line somewhere are escaped, so that one object is one line for every reader.
    line = json.dumps(ordered, ensure_ascii=False, allow_nan=False)
    return line.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029") + "\n"
