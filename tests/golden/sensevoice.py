"""What SenseVoiceSmall must recognise; shared by its tests and by the planted defects that must fail them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen4b_asr import ctc, encoder, pieces, rich, rich_decoding

from . import checks
from .support import GoldenMismatch, compare_ids, fill, golden

VOCABULARIES = ("tags", "controls", "bytes", "bytes_bare", "speech")
SINGLES = range(5)
BATCHES = ("auto/0", "en/1", "yue/0")
ALIGNMENTS = range(5)


def require_equal(found: object, wanted: object, what: str) -> None:
    """Compare texts, fields or times.

    Raises:
        GoldenMismatch: If they differ.
    """
    if found != wanted:
        raise GoldenMismatch(f"{what}: {found!r} instead of {wanted!r}")


def read_table(content: bytes, suffix: str = ".model") -> pieces.PieceTable:
    """Read a vocabulary from a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"vocabulary{suffix}"
        path.write_bytes(content)
        return pieces.read_pieces(path)


def table(name: str) -> pieces.PieceTable:
    """Return one of the golden vocabularies."""
    return read_table(golden("sensevoice")[f"vocabulary/{name}"].tobytes())


def check_pieces(name: str) -> None:
    """Texts that sentencepiece gives for ids."""
    read = table(name)
    for ids, text in golden("sensevoice").fact("decoded")[name]:
        require_equal(read.decode(ids), text, f"{[read.pieces[i] for i in ids]} of {name}")


def check_rich() -> None:
    """Texts full of tags after the original's post-processing."""
    for raw, text in golden("sensevoice").fact("rich"):
        require_equal(rich.emoji_text(raw), text, repr(raw))


def check_alignment(place: int) -> None:
    """The path of a forced alignment."""
    data = golden("sensevoice")
    wanted, ids = data[f"align/{place}/path"], data[f"align/{place}/ids"].tolist()
    found = np.zeros_like(wanted)
    tokens = ctc.align(mx.array(data[f"align/{place}/log_probs"]), ids)
    for token in tokens:
        found[token.start : token.end] = token.id
    compare_ids(found.tolist(), wanted.tolist(), f"path of alignment {place}")
    compare_ids([token.id for token in tokens], ids, f"text of alignment {place}")


@cache
def build_encoder() -> encoder.SenseVoiceEncoder:
    """Return the golden encoder with its CTC head."""
    data = golden("sensevoice")
    return fill(encoder.SenseVoiceEncoder(encoder.EncoderConfig(**data.fact("config"))), data.weights())


def ctc_logits(items: Sequence[int], language: str, use_itn: bool) -> list[mx.array]:
    """Score utterances as one padded batch; returns the real rows of each, the query rows first."""
    data, model = golden("sensevoice"), build_encoder()
    features = [data[f"speech/{item}/features"] for item in items]
    lengths = [len(rows) for rows in features]
    padded = np.full((len(items), max(lengths), features[0].shape[1]), 7.0, np.float32)
    for place, rows in enumerate(features):
        padded[place, : len(rows)] = rows
    mask = mx.array(np.arange(max(lengths))[None] < np.array(lengths)[:, None])
    states, mask = model(mx.array(padded), mask, language=language, use_itn=use_itn)
    logits = model.ctc_logits(states)
    return [logits[place, :rows] for place, rows in enumerate(mx.sum(mask, axis=1).tolist())]


def recognise(item: int, **options: Any) -> tuple[rich_decoding.RichRecognition, dict[str, Any]]:
    """Recognise one utterance; returns it and what the original said."""
    wanted = golden("sensevoice").fact("singles")[item]
    (logits,) = ctc_logits([item], wanted["language"], wanted["use_itn"])
    decoder = rich_decoding.RichDecoder(table("speech"))
    return decoder(logits, rich_decoding.CtcOptions(**options)), wanted


def check_text(item: int) -> None:
    """Ids, text and text without tags."""
    found, wanted = recognise(item)
    compare_ids(list(found.ids), wanted["ids"], f"utterance {item}")
    require_equal(found.raw, wanted["text"], f"text of utterance {item}")
    require_equal(rich.emoji_text(found.raw), wanted["post"], f"text with signs of utterance {item}")


def require_times(found: rich_decoding.RichRecognition, wanted: dict[str, Any], what: str) -> None:
    """Compare words and times; the original truncates its float milliseconds, so they may be one less."""
    words, times = wanted["words"] or [], wanted["times_ms"] or []
    require_equal([w.text for w in found.words], [w.removeprefix("\u2581") for w in words], f"words of {what}")
    off = [
        abs(round(1000 * ours) - theirs)
        for word, span in zip(found.words, times, strict=True)
        for ours, theirs in zip((word.start, word.end), span, strict=True)
    ]
    if max(off, default=0) > 1:
        raise GoldenMismatch(f"times of {what}: off by {off} ms")


def check_words(item: int) -> None:
    """Words and their times."""
    found, wanted = recognise(item)
    require_times(found, wanted, f"utterance {item}")


def check_sound() -> None:
    """Ids and word times of a recording, from its samples."""
    checks.require_one_set("sensevoice", ("encoder",))
    wanted, head = golden("sensevoice").fact("sound"), golden("sensevoice").weights("sound/")
    config = encoder.EncoderConfig(**wanted["config"])
    model = fill(encoder.SenseVoiceEncoder(config), golden("encoder").weights() | head)
    states, _ = model(checks.build_frontend()(checks.waveform("speech"))[None])
    found = rich_decoding.RichDecoder(table("speech"))(model.ctc_logits(states)[0])
    compare_ids(list(found.ids), wanted["ids"], "recording")
    require_equal(found.raw, wanted["text"], "text of the recording")
    require_times(found, wanted, "the recording")


def check_banned(item: int) -> None:
    """Ids where the unknown emotion may not be said."""
    found, wanted = recognise(item, ban_unknown_emotion=True)
    compare_ids(list(found.ids), wanted["banned"], f"utterance {item} without unknown emotion")


def check_batch(name: str) -> None:
    """Ids of every utterance of a padded batch."""
    language, use_itn = name.split("/")
    wanted = golden("sensevoice").fact("batch")[name]
    items = [int(item) for item in wanted]
    decoder = rich_decoding.RichDecoder(table("speech"))
    for item, logits in zip(items, ctc_logits(items, language, use_itn == "1"), strict=True):
        compare_ids(list(decoder(logits).ids), wanted[str(item)], f"utterance {item} of batch {name}")


def check_beam(item: int) -> None:
    """A beam search says what the features were taught to say, at the same times."""
    found, wanted = recognise(item, beam_size=5)
    compare_ids(list(found.ids), wanted["ids"], f"beam search on utterance {item}")
    require_equal(found.words, recognise(item)[0].words, f"words of beam search on utterance {item}")


CHECKS: dict[str, tuple[Callable[[Any], None], Sequence[Any]]] = {
    "pieces": (check_pieces, VOCABULARIES),
    "alignment": (check_alignment, ALIGNMENTS),
    "text": (check_text, SINGLES),
    "words": (check_words, SINGLES),
    "banned": (check_banned, SINGLES),
    "batch": (check_batch, BATCHES),
    "beam": (check_beam, SINGLES),
}


def check_all(name: str) -> None:
    """Run one kind of check on all of its cases."""
    check, cases = CHECKS[name]
    for case in cases:
        check(case)
