"""The tokenizer: streamed pieces join to the whole, whatever the bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.tokenizer import Tokenizer
from tests.helpers.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return Tokenizer(path)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@given(text=st.text(max_size=30))
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text


@given(text=st.text(max_size=30))
def test_streamed_pieces_join_to_the_text(tokenizer, text):
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))


@given(ids=st.lists(st.integers(0, 258), max_size=40))
def test_streamed_pieces_join_to_the_text_of_any_bytes(tokenizer, ids):
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_appears_when_it_is_whole(tokenizer):
    assert streamed(tokenizer, tokenizer.encode("a字b")) == ["a", "", "", "字", "b", ""]


def test_specials_are_recognised_and_skipped(tokenizer):
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert ids == [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("a"), tokenizer.token_id("<|im_end|>")]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.vocab_size == 259
    assert tokenizer.token_id("nothing") is None


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="the tokenizer is missing"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
