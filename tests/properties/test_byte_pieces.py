"""Vocabularies of bytes: pieces join to the text they were cut from, wherever the cuts fall."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.byte_pieces import BytePieceTable, read_byte_pieces
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.pieces import PieceKind

CUTS = st.lists(st.integers(1, 5), max_size=40)


def cut(content: bytes, sizes: list[int]) -> list[bytes]:
    """Cut bytes into pieces of these sizes, the rest into one."""
    pieces = []
    for size in sizes:
        pieces.append(content[:size])
        content = content[size:]
    return [piece for piece in [*pieces, content] if piece]


@given(st.text(max_size=30), CUTS)
def test_pieces_join_to_the_text(text, sizes):
    pieces = cut(text.encode(), sizes)
    table = BytePieceTable.of(pieces, len(pieces) + 3)
    ids = list(range(len(pieces)))
    assert table.decode(ids) == text
    surfaces = table.surfaces(ids)
    assert len(surfaces) == len(ids)
    assert "".join(surfaces) == text
    assert "\ufffd" in text or not any("\ufffd" in surface for surface in surfaces)


@given(st.binary(max_size=30), CUTS)
def test_bytes_that_are_no_text_read_as_replacements(content, sizes):
    pieces = cut(content, sizes)
    table = BytePieceTable.of(pieces, len(pieces) + 1)
    assert table.decode(range(len(pieces))) == content.decode("utf-8", "replace")


def test_a_character_belongs_to_the_piece_with_its_last_byte():
    first, second = "房".encode()[:2], "房".encode()[2:]
    table = BytePieceTable.of([b"a ", first, second, b" b"], 6)
    assert table.surfaces([0, 1, 2, 3]) == ["a ", "", "房", " b"]
    assert table.surfaces([1, 4, 2]) == ["", "", "房"]  # a mark adds nothing and takes nothing away
    assert table.surfaces([0, 1]) == ["a ", "\ufffd"]
    assert table.surfaces([]) == []


def test_marks_and_the_blank_are_no_text():
    table = BytePieceTable.of([b"a", b"b"], 5)
    assert len(table) == 5
    assert table.kinds == (PieceKind.NORMAL,) * 2 + (PieceKind.CONTROL,) * 3
    assert table.decode([4, 0, 2, 3, 1]) == "ab"
    assert table.id_of("b") == 1
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=rf"ids must lie in 0\.\.4 but got {bad}"):
            table.decode([bad])
    with pytest.raises(ValueError, match="1 symbols have no room for 2 pieces"):
        BytePieceTable.of([b"a", b"b"], 1)


def lines(pieces: list[bytes]) -> bytes:
    """The file of these pieces."""
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=20), st.integers(0, 5), st.randoms())
def test_a_file_gives_back_its_pieces_in_the_order_of_their_ranks(tmp_path_factory, pieces, marks, random):
    path = tmp_path_factory.mktemp("t") / "multilingual.tiktoken"
    shuffled = lines(pieces).splitlines()
    random.shuffle(shuffled)
    path.write_bytes(b"\n".join(shuffled) + b"\n\n")
    table = read_byte_pieces(path, len(pieces) + marks)
    assert table.values == (*pieces, *[b""] * marks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ranks of 0 pieces"),
        (b"YQ==\n", "line 1 is not a piece in base64 and its rank"),
        (b"YQ== 0\n!! 1\n", "line 2 is not a piece"),
        (b"YQ== x\n", "line 1 is not a piece"),
        (b"YQ== 0\nYg== 0\n", "line 2 gives an empty piece or a rank that is taken"),
        (b"YQ== 0\nYg== 2\n", "must run from 0 without gaps"),
        (b"YQ== 1\n", "must run from 0 without gaps"),
        (lines([b"a", b"b", b"c"]), "has 3 pieces, but the CTC head only 2 symbols"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "multilingual.tiktoken"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_byte_pieces(path, 2)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.tiktoken: cannot be read"):
        read_byte_pieces(tmp_path / "none.tiktoken", 2)
