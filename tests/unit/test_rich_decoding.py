"""CTC scores to rich text: small vocabularies, scores that leave no doubt."""

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.pieces import PieceKind, PieceTable
from qwen4b_asr.rich import RichText
from qwen4b_asr.rich_decoding import CtcOptions, RichDecoder, TimedText

NORMAL, BYTE = PieceKind.NORMAL, PieceKind.BYTE
ENTRIES = [
    ("<unk>", PieceKind.UNKNOWN), ("<|zh|>", NORMAL), ("<|EMO_UNKNOWN|>", NORMAL), ("<|SAD|>", NORMAL),
    ("<|Speech|>", NORMAL), ("<|woitn|>", NORMAL), ("\u2581he", NORMAL), ("llo", NORMAL), ("你", NORMAL),
    ("<0xE5>", BYTE), ("<0xA5>", BYTE), ("<0xBD>", BYTE), ("\u2581", NORMAL),
]  # fmt: skip
TABLE = PieceTable(tuple(piece for piece, _ in ENTRIES), tuple(kind for _, kind in ENTRIES))
ZH, UNKNOWN, SAD, SPEECH, WOITN, HE, LLO, NI, E5, A5, BD, SPACE = range(1, len(ENTRIES))
TAGS = [ZH, SAD, SPEECH, WOITN]
METHODS = [CtcOptions(), CtcOptions(beam_size=4)]


def scores(path, second=None):
    """Return logits (R, V) whose best symbols are `path`, and whose next best are `second`."""
    logits = np.zeros((len(path), len(ENTRIES)), np.float32)
    logits[np.arange(len(path)), path] = 20.0
    if second is not None:
        logits[np.arange(len(path)), second] += 10.0
    return mx.array(logits)


@pytest.mark.parametrize("options", METHODS)
def test_tags_words_and_times(options):
    found = RichDecoder(TABLE)(scores([*TAGS, 0, HE, HE, LLO, 0, NI, 0]), options)
    assert found.raw == "<|zh|><|SAD|><|Speech|><|woitn|> hello你"
    assert found.rich == RichText("hello你", "zh", "sad", ("speech",), False)
    assert found.ids == (*TAGS, HE, LLO, NI)
    assert found.words == (TimedText("hello", 0.03, 0.21), TimedText("你", 0.27, 0.33))
    assert [piece.text for piece in found.pieces] == ["he", "llo", "你"]
    assert found.log_prob == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("options", METHODS)
def test_a_character_in_bytes_lasts_from_its_first_to_its_last(options):
    found = RichDecoder(TABLE)(scores([*TAGS, 0, E5, A5, 0, BD, 0]), options)
    assert found.rich.text == "好"
    assert found.words == (TimedText("好", 0.03, 0.27),)


@pytest.mark.parametrize("options", METHODS)
def test_an_invisible_space_lends_no_time(options):
    found = RichDecoder(TABLE)(scores([*TAGS, SPACE, 0, 0, NI, 0]), options)
    assert found.words == (TimedText("你", 0.15, 0.21),)


@pytest.mark.parametrize("options", METHODS)
def test_a_tag_among_the_words_is_no_word(options):
    found = RichDecoder(TABLE)(scores([*TAGS, NI, 0, SPEECH, NI, 0]), options)
    assert (found.rich.text, found.ids) == ("你你", (*TAGS, NI, SPEECH, NI))
    assert found.words == (TimedText("你", 0.0, 0.03), TimedText("你", 0.15, 0.21))


@pytest.mark.parametrize("options", METHODS)
def test_what_the_query_rows_say_is_never_timed(options):
    found = RichDecoder(TABLE)(scores([ZH, NI, SPEECH, WOITN, HE]), options)
    assert found.ids == (ZH, NI, SPEECH, WOITN, HE)
    assert found.words == (TimedText("he", 0.0, 0.03),)


@pytest.mark.parametrize("options", METHODS)
def test_the_first_row_counts(options):
    assert RichDecoder(TABLE)(scores([*TAGS, NI])).words == (TimedText("你", 0.0, 0.03),)


@pytest.mark.parametrize("options", METHODS)
def test_silence(options):
    found = RichDecoder(TABLE)(scores([*TAGS, 0, 0]), options)
    assert (found.rich.text, found.words, found.pieces, found.ids) == ("", (), (), tuple(TAGS))
    assert RichDecoder(TABLE)(scores(TAGS), options).ids == tuple(TAGS)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_unknown_emotion_can_be_banned(beam_size):
    path = [ZH, UNKNOWN, SPEECH, WOITN, 0, NI]
    logits = scores(path, [ZH, SAD, SPEECH, WOITN, 0, NI])
    decode = RichDecoder(TABLE)
    assert decode(logits, CtcOptions(beam_size)).rich.emotion is None
    assert decode(logits, CtcOptions(beam_size, ban_unknown_emotion=True)).rich.emotion == "sad"


def test_a_vocabulary_without_the_unknown_emotion_bans_nothing():
    table = PieceTable(("<unk>", "a"), (PieceKind.UNKNOWN, NORMAL))
    logits = mx.array([[0.0, 9.0]] * 5)
    assert RichDecoder(table)(logits, CtcOptions(ban_unknown_emotion=True)).raw == "a"


def test_both_methods_report_the_whole_probability():
    logits = mx.random.normal((7, len(ENTRIES)), key=mx.random.key(3))
    best_path = mx.max(logits - mx.logsumexp(logits, axis=1, keepdims=True), axis=1)
    assert RichDecoder(TABLE)(logits).log_prob == pytest.approx(float(mx.sum(best_path)), rel=1e-5)
    found = RichDecoder(TABLE)(logits, CtcOptions(50, len(ENTRIES)))
    assert float(mx.sum(best_path[:4])) > found.log_prob > float(mx.sum(best_path))


@pytest.mark.parametrize("options", METHODS)
def test_other_blanks_and_no_query_rows(options):
    found = RichDecoder(TABLE, blank=12, query_rows=0)(scores([HE, LLO, 12]), options)
    assert found.words == (TimedText("hello", 0.0, 0.09),)


@pytest.mark.parametrize("shape", [(4,), (1, 5, len(ENTRIES)), (5, 12)])
def test_misshapen_scores_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[RichDecoder\] logits must have the shape \(rows, 13\)"):
        RichDecoder(TABLE)(mx.zeros(shape))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"\[RichDecoder\] blank must lie in 0\.\.12 but got 13"):
        RichDecoder(TABLE, blank=13)
    with pytest.raises(ValueError, match="at least 1 but got 0 and 20"):
        CtcOptions(beam_size=0)
    with pytest.raises(ValueError, match="at least 1 but got 1 and 0"):
        CtcOptions(symbols_per_row=0)
