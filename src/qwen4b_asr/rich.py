"""SenseVoice's rich transcription: tags for language, emotion, event and style, as fields and out of the text.

The model writes them as ``<|zh|><|NEUTRAL|><|Speech|><|woitn|>`` before the words, one per query frame, and may put
more between them. Source of the rules: ``rich_transcription_postprocess`` in FunASR's
``funasr/utils/postprocess_utils.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .pieces import is_unspaced

TAG = re.compile(r"<\|([^|<>]*)\|>")
UNKNOWN_EMOTION = "<|EMO_UNKNOWN|>"

NO_SPEECH = "nospeech"
_LANGUAGE = re.compile(rf"[a-z]{{2,3}}|{NO_SPEECH}")
# The neutral mood is first: the others have to be more frequent than it.
_EMOTIONS = {
    "NEUTRAL": "", "HAPPY": "😊", "SAD": "😔", "ANGRY": "😡", "FEARFUL": "😰", "DISGUSTED": "🤢", "SURPRISED": "😮",
}  # fmt: skip
_EVENTS = {
    "BGM": "🎼", "Speech": "", "Applause": "👏", "Laughter": "😀", "Cry": "😭", "Sneeze": "🤧", "Breath": "",
    "Cough": "🤧", "Sing": "", "Speech_Noise": "", "GBG": "",
}  # fmt: skip
_STYLES = {"withitn": True, "woitn": False}
_EMOTION_SIGNS = frozenset(_EMOTIONS.values()) - {""}
_EVENT_SIGNS = frozenset(_EVENTS.values()) - {""}
_NOTHING_KNOWN = "<|nospeech|><|Event_UNK|>"
# What the model likes to hear in noise; the original removes it, and so do we.
_GHOST = "The."


@dataclass(frozen=True)
class RichText:
    """A text without tags, and what the tags said.

    Args:
        text: The words.
        language: ``zh``, ``en``, ``yue``, ``ja``, ``ko``, ..., or ``nospeech``; None if there was no such tag.
        emotion: ``neutral``, ``happy``, ``sad``, ``angry``, ``fearful``, ``disgusted``, ``surprised``: the most
            frequent; None if it is unknown.
        events: ``speech``, ``bgm``, ``applause``, ``laughter``, ``cry``, ``sneeze``, ``breath``, ``cough``, ``sing``,
            ``speech_noise``, ``gbg`` (so named by the model): each once, in the order of their tags.
        itn: Whether the text was written with inverse text normalisation; None if no tag says so.
    """

    text: str
    language: str | None = None
    emotion: str | None = None
    events: tuple[str, ...] = ()
    itn: bool | None = None


def parse_rich(raw: str) -> RichText:
    """Take the tags out of a text and read them.

    The words are those of `emoji_text` without the signs. Parts that a language tag separates are joined by a space
    unless their script uses none; the original always joins them bare.

    Args:
        raw: What the symbols spell, tags included.
    """
    tags = TAG.findall(raw)
    joined = ""
    for part in (part.strip() for part in _parts(raw)):
        bare = TAG.sub("", part).strip()
        if joined and bare and not (is_unspaced(joined[-1]) or is_unspaced(bare[0])):
            joined += " "
        joined += bare
    return RichText(
        text=joined.replace(_GHOST, " ").strip(),
        language=next((tag for tag in tags if _LANGUAGE.fullmatch(tag)), None),
        emotion=_strongest(tags),
        events=tuple(dict.fromkeys(tag.lower() for tag in tags if tag in _EVENTS)),
        itn=next((_STYLES[tag] for tag in tags if tag in _STYLES), None),
    )


def emoji_text(raw: str) -> str:
    """Write events before and the emotion after the words of each part, as FunASR's examples do.

    Equals ``rich_transcription_postprocess``, but for tags that it does not know, which it leaves in the text.
    A sign that the neighbouring part has just shown is not shown again.

    Args:
        raw: What the symbols spell, tags included.
    """
    first, *others = (_with_signs(part) for part in _parts(raw.replace(_NOTHING_KNOWN, "❓")))
    shown, event = f" {first}", ""
    for part in others:
        if part[:1] == event:
            part = part[1:]
        if not part:
            continue
        event = part[0] if part[0] in _EVENT_SIGNS else ""
        if part[-1] in _EMOTION_SIGNS and part[-1] == shown[-1]:
            shown = shown[:-1]
        shown += part.strip()
    return shown.replace(_GHOST, " ").strip()


def _parts(raw: str) -> list[str]:
    """Split a text at its language tags."""
    parts, end = [], 0
    for match in TAG.finditer(raw):
        if _LANGUAGE.fullmatch(match[1]):
            parts.append(raw[end : match.start()])
            end = match.end()
    return [*parts, raw[end:]]


def _strongest(tags: list[str]) -> str | None:
    """Return the most frequent emotion; of equals the neutral one, then the first of the table."""
    counts = Counter(tag for tag in tags if tag in _EMOTIONS)
    return max((e for e in _EMOTIONS if counts[e]), key=counts.__getitem__).lower() if counts else None


def _with_signs(part: str) -> str:
    """Replace the tags of one part by its events' signs in front and its emotion's behind."""
    tags = TAG.findall(part)
    events = "".join(_EVENTS[e] for e in reversed(_EVENTS) if e in tags)
    emotion = _strongest(tags)
    text = events + TAG.sub("", part) + (_EMOTIONS[emotion.upper()] if emotion else "")
    for sign in _EVENT_SIGNS | _EMOTION_SIGNS:
        text = text.replace(f" {sign}", sign).replace(f"{sign} ", sign)
    return text.strip()
