"""SenseVoiceSmall as a recogniser against funasr and sentencepiece, and mistakes that must not go unnoticed."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr import ctc, encoder, features, pieces, rich, rich_decoding
from qwen4b_asr.rich import RichText

from . import sensevoice
from .planting import Defects, Patch, override

CASES = [(name, case) for name, (_, cases) in sensevoice.CHECKS.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_as_the_original(name: str, case: Any) -> None:
    check, _ = sensevoice.CHECKS[name]
    check(case)


def test_tagged_texts() -> None:
    sensevoice.check_rich()


def test_from_sound() -> None:
    sensevoice.check_sound()


def test_fields() -> None:
    found = [sensevoice.recognise(item)[0].rich for item in sensevoice.SINGLES]
    assert found == [
        RichText("我想问我在滨海新区有房", "zh", "neutral", ("speech",), False),
        RichText("hello there, the cat sat.", "en", "happy", ("bgm",), True),
        RichText("こんにちは", "ja", None, ("laughter",), False),
        RichText("好好好，谢谢你！", "zh", "sad", ("speech",), True),
        RichText("", "nospeech", None, (), False),
    ]


def test_tokens_json_reads_the_same() -> None:
    model = sensevoice.table("speech")
    listed = sensevoice.read_table(json.dumps(model.pieces).encode(), ".json")
    assert listed.pieces == model.pieces
    for wanted in sensevoice.golden("sensevoice").fact("singles"):
        assert listed.decode(wanted["ids"]) == wanted["text"]


def test_pieces_join_to_the_text() -> None:
    for item in sensevoice.SINGLES:
        found, _ = sensevoice.recognise(item)
        assert "".join(piece.text for piece in found.pieces).strip() == found.rich.text


DEFECTS = Defects()
TEXT, WORDS = partial(sensevoice.check_all, "text"), partial(sensevoice.check_all, "words")
PIECES, ALIGNMENT = partial(sensevoice.check_all, "pieces"), partial(sensevoice.check_all, "alignment")
BEAM, BANNED = partial(sensevoice.check_all, "beam"), partial(sensevoice.check_all, "banned")


@DEFECTS.noticed_by(TEXT)
def repeats_kept(patch: Patch) -> None:
    patch.setattr(ctc, "collapse", lambda path, blank=0: [
        ctc.CtcToken(s, r, r + 1) for r, s in enumerate(path) if s != blank
    ])  # fmt: skip


@DEFECTS.noticed_by(TEXT)
def blanks_dropped_before_repeats(patch: Patch) -> None:
    original = ctc.collapse
    patch.setattr(ctc, "collapse", lambda path, blank=0: original([s for s in path if s != blank], blank=blank))


@DEFECTS.noticed_by(TEXT)
def query_rows_left_out(patch: Patch) -> None:
    original = ctc.greedy
    patch.setattr(rich_decoding, "greedy", lambda scores, blank=0: original(scores[4:], blank=blank))


@DEFECTS.noticed_by(TEXT)
def another_language_asked_for(patch: Patch) -> None:
    patch.setitem(encoder.LANGUAGE_QUERIES, "en", 12)


@DEFECTS.noticed_by(TEXT)
def style_queries_swapped(patch: Patch) -> None:
    patch.setattr(encoder, "WITH_ITN_QUERY", 15)
    patch.setattr(encoder, "WITHOUT_ITN_QUERY", 14)


@DEFECTS.noticed_by(sensevoice.check_sound)
def samples_in_the_unit_range(patch: Patch) -> None:
    override(patch, features.FrontendConfig, input_scale=1.0)


@DEFECTS.noticed_by(partial(sensevoice.check_all, "batch"))
def padding_rows_decoded(patch: Patch) -> None:
    original = encoder.SenseVoiceEncoder.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        states, mask = original(self, *args, **kwargs)
        return states, mx.ones_like(mask)

    patch.setattr(encoder.SenseVoiceEncoder, "__call__", call)


@DEFECTS.noticed_by(BANNED)
def unknown_emotion_allowed(patch: Patch) -> None:
    original = ctc.ctc_log_probs
    patch.setattr(rich_decoding, "ctc_log_probs", lambda logits, banned=(): original(logits))


@DEFECTS.noticed_by(WORDS)
def times_without_the_lead(patch: Patch) -> None:
    original = ctc.row_times_ms
    patch.setattr(rich_decoding, "row_times_ms", partial(original, lead_ms=0))


@DEFECTS.noticed_by(WORDS)
def query_rows_counted_as_time(patch: Patch) -> None:
    original = ctc.row_times_ms
    patch.setattr(rich_decoding, "row_times_ms", lambda token: original(
        ctc.CtcToken(token.id, token.start + 4, token.end + 4)
    ))  # fmt: skip


@DEFECTS.noticed_by(WORDS)
def every_piece_a_word(patch: Patch) -> None:
    patch.setattr(
        rich_decoding, "word_groups", lambda texts: [range(i, i + 1) for i, t in enumerate(texts) if t.strip()]
    )


@DEFECTS.noticed_by(WORDS)
def tags_among_the_words(patch: Patch) -> None:
    original = rich_decoding.RichDecoder.__init__

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **(kwargs | {"query_rows": 0}))

    patch.setattr(rich_decoding.RichDecoder, "__init__", build)
    patch.setattr(rich_decoding, "TAG", re.compile("(?!)"))


@DEFECTS.noticed_by(PIECES)
def first_space_kept(patch: Patch) -> None:
    original = pieces.PieceTable._surface
    patch.setattr(pieces.PieceTable, "_surface", lambda self, piece, kind, first: original(self, piece, kind, False))


@DEFECTS.noticed_by(PIECES)
def one_space_taken_where_all_go(patch: Patch) -> None:
    original = pieces.PieceTable._surface
    patch.setattr(
        pieces.PieceTable, "_surface", lambda self, *args: (original(self, *args)[0], args[0].startswith(pieces.SPACE))
    )


@DEFECTS.noticed_by(PIECES)
def broken_bytes_replaced_in_runs(patch: Patch) -> None:
    patch.setattr(pieces, "_utf8", lambda values: [bytes(values).decode("utf-8", "replace")])


@DEFECTS.noticed_by(PIECES)
def control_pieces_shown(patch: Patch) -> None:
    original = pieces.PieceTable._surface
    patch.setattr(pieces.PieceTable, "_surface", lambda self, piece, kind, first: original(
        self, piece, pieces.PieceKind.NORMAL if kind == pieces.PieceKind.CONTROL else kind, first
    ))  # fmt: skip


@DEFECTS.noticed_by(PIECES)
def unknown_surface_of_the_default(patch: Patch) -> None:
    original = pieces.PieceTable.__init__

    def build(self: Any, *args: Any) -> None:
        original(self, *args[:2], pieces.UNKNOWN_SURFACE, *args[3:])

    patch.setattr(pieces.PieceTable, "__init__", build)


@DEFECTS.noticed_by(ALIGNMENT)
def doubled_symbols_without_a_blank(patch: Patch) -> None:
    original = np.where
    patch.setattr(ctc.np, "where", lambda test, a, b: original(np.ones_like(test), a, b))


@DEFECTS.noticed_by(BEAM)
def the_worst_of_the_beam(patch: Patch) -> None:
    original = ctc.prefix_beam_search
    patch.setattr(rich_decoding, "prefix_beam_search", lambda *args, **kw: original(*args, **kw)[::-1])


@DEFECTS.noticed_by(sensevoice.check_rich)
def neutral_wins_nothing(patch: Patch) -> None:
    patch.setattr(rich, "_EMOTIONS", dict(reversed(rich._EMOTIONS.items())))


@DEFECTS.noticed_by(sensevoice.check_rich)
def events_in_the_order_of_the_table(patch: Patch) -> None:
    patch.setattr(rich, "_EVENTS", dict(reversed(rich._EVENTS.items())))


@DEFECTS.noticed_by(sensevoice.check_rich)
def signs_repeated(patch: Patch) -> None:
    patch.setattr(rich, "_EVENT_SIGNS", frozenset())


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
