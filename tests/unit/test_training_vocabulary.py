"""Words, spoken numbers and the demo's tokenizer."""

import random

import pytest

from qwen4b_asr.tokenizer import Tokenizer
from qwen4b_asr.training.numbers import english_string, mandarin_number, mandarin_string
from qwen4b_asr.training.vocabulary import (
    END_ID,
    ENGLISH,
    MANDARIN,
    SPECIALS,
    WORDS,
    ctc_symbols,
    piece,
    token_of,
    tokenizer_json,
    vocabulary,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer_json(), encoding="utf-8")
    return Tokenizer(path)


@pytest.mark.parametrize(
    "text", ["three five seven", " three five", "三五七", "nine", "零", "一百二十", " one三", "three三 five", ""]
)
def test_texts_survive_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_streamed_pieces_join_to_the_whole(tokenizer):
    ids = [token_of(i + 1) for i in random.Random(1).choices(range(len(WORDS)), k=40)]
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert all(pieces)


def test_tokens_and_symbols_name_the_same_words(tokenizer):
    symbols = ctc_symbols()
    assert symbols[0] == ""
    assert len(symbols) == len(WORDS) + 1
    for number in range(1, len(symbols)):
        assert tokenizer.decode([token_of(number)]) == symbols[number] == piece(WORDS[number - 1])
    with pytest.raises(ValueError, match=r"1\.\.24"):
        token_of(0)


def test_specials_are_single_tokens_and_never_shown(tokenizer):
    for i, special in enumerate(SPECIALS):
        assert tokenizer.encode(special) == [i]
        assert tokenizer.decode([i, token_of(1)]) == " zero"
    assert tokenizer.token_id("<|endoftext|>") == END_ID
    assert tokenizer.vocab_size == len(vocabulary())


def test_other_text_becomes_the_unknown_token(tokenizer):
    assert set(tokenizer.encode("hello!")) == {SPECIALS.index("<|unknown|>")}


def test_words_are_spaced_as_each_language_writes_them():
    assert "".join(map(piece, ["three", "five"])).strip() == "three five"
    assert "".join(map(piece, ["三", "十", "五"])) == "三十五"


@pytest.mark.parametrize(
    ("value", "spoken"),
    [
        (0, "零"), (7, "七"), (10, "十"), (12, "十二"), (20, "二十"), (101, "一百零一"), (110, "一百一十"),
        (112, "一百一十二"), (1001, "一千零一"), (1010, "一千零一十"), (10350, "一万零三百五十"), (12000, "一万二千"),
        (100000, "十万"), (100200, "十万零二百"), (110000, "十一万"), (20000005, "二千万零五"), (10000000, "一千万"),
    ],
)  # fmt: skip
def test_mandarin_numbers(value, spoken):
    assert "".join(mandarin_number(value)) == spoken


def value_of(words):
    """Read a spoken number back: the inverse of `mandarin_number`, written another way."""
    total = section = digit = 0
    for word in words:
        place = MANDARIN.index(word)
        if place < 10:
            digit = place
        elif word == "万":
            total, section, digit = (section + digit) * 10000, 0, 0
        else:
            section += (digit or 1) * 10 ** (place - 9)
            digit = 0
    return total + section + digit


def test_mandarin_numbers_read_back():
    draw = random.Random(4)
    for value in [*range(1200), *(draw.randrange(10 ** draw.randint(1, 8)) for _ in range(2000))]:
        assert value_of(mandarin_number(value)) == value


def test_mandarin_numbers_have_bounds():
    with pytest.raises(ValueError, match=r"0\.\.99999999"):
        mandarin_number(10**8)


def test_strings_hold_known_words():
    draw = random.Random(0)
    for length in range(1, 8):
        assert set(english_string(draw, length)) <= set(ENGLISH)
        words = mandarin_string(draw, length)
        assert set(words) <= set(MANDARIN)
        assert 1 <= len(words) <= length + 2
