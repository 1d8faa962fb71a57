"""The vocabulary reader: files made by hand, damaged ones, and words."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.pieces import PieceKind, PieceTable, read_pieces, word_groups


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(pieces, *extra: bytes) -> bytes:
    """Write a ModelProto: (piece, kind) pairs, scores as fixed32 between them, further fields at the end."""
    score = varint(2 << 3 | 5) + b"\x00\x00\x80\xbf"
    entries = (field(1, field(1, text.encode()) + score + field(3, int(kind))) for text, kind in pieces)
    return b"".join(entries) + b"".join(extra)


PIECES = [
    ("<unk>", PieceKind.UNKNOWN),
    ("<s>", PieceKind.CONTROL),
    ("\u2581the", PieceKind.NORMAL),
    ("好", PieceKind.NORMAL),
]


def written(tmp_path, content: bytes, name: str = "x.model"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_a_model_file(tmp_path):
    table = read_pieces(written(tmp_path, model(PIECES)))
    assert table == PieceTable(tuple(p for p, _ in PIECES), tuple(k for _, k in PIECES))
    assert len(table) == 4
    assert table.decode([1, 2, 3, 2, 0]) == "the好 the \u2047 "
    assert table.surfaces([1, 2, 3, 2, 0]) == ["", "the", "好", " the", " \u2047 "]
    assert (table.id_of("好"), table.id_of("坏")) == (3, None)


def test_flags_and_unknown_fields(tmp_path):
    extra = (
        field(2, field(44, b"?") + field(3, 7)),
        field(3, field(1, b"nmt_nfkc") + field(3, 0) + field(4, 0)),
        field(5, field(1, b"identity") + field(2, b"")),
        varint(9 << 3 | 1) + bytes(8),
        field(300, b"later"),
    )
    table = read_pieces(written(tmp_path, model(PIECES, *extra)))
    assert (table.unknown_surface, table.dummy_prefix, table.single_spaces) == ("?", False, False)
    assert table.decode([2, 0]) == " the?"


def test_pieces_without_a_kind_are_normal(tmp_path):
    table = read_pieces(written(tmp_path, field(1, field(1, b"a"))))
    assert table.kinds == (PieceKind.NORMAL,)


def test_a_repeated_piece_keeps_its_first_id():
    assert PieceTable(("a", "b", "a"), (PieceKind.NORMAL,) * 3).id_of("a") == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there must be pieces"),
        (model(PIECES)[:-1], "cut short"),
        (model(PIECES) + b"\x80", "ends within a number"),
        (field(1, field(1, b"abcd"))[:-1], "longer than what is left"),
        (b"\xff" * 11, "more than 64 bits"),
        (b"\x0b", "wire type 3"),
        (field(1, 5), "a number stands where"),
        (field(1, field(3, b"x")), "text stands where"),
        (field(1, field(1, b"\xff")), "utf-8"),
        (field(1, field(3, 9)), "9 is not a valid PieceKind"),
        (model([("x", PieceKind.BYTE)]), "a byte piece must read <0xNN>"),
        (model(PIECES, field(5, field(2, b"map"))), "denormalizer_spec"),
        (b"PK\x03\x04 not a vocabulary", "not a vocabulary"),
    ],
)
def test_damaged_models_are_named(tmp_path, content, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        read_pieces(written(tmp_path, content))
    assert "x.model" in str(caught.value)


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"[", b"[]", b"\xff"])
def test_damaged_lists_are_named(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"tokens\.json: not a vocabulary"):
        read_pieces(written(tmp_path, content, "tokens.json"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.model: cannot be read"):
        read_pieces(tmp_path / "none.model")


def test_a_huge_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen4b_asr.pieces._MAX_BYTES", 10)
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        read_pieces(written(tmp_path, model(PIECES)))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.model"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert len(read_pieces(path)) > 0


def test_kinds_of_a_list_are_known_by_name(tmp_path):
    names = ["<unk>", "<s>", "</s>", "<pad>", "<0xE4>", "<|zh|>", "a"]
    table = read_pieces(written(tmp_path, json.dumps(names).encode(), "tokens.json"))
    kinds = PieceKind
    assert table.kinds == (
        kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.CONTROL, kinds.BYTE, kinds.NORMAL, kinds.NORMAL
    )  # fmt: skip


def bytes_table() -> PieceTable:
    """Ids 0..255 are the bytes, 256 is a letter."""
    return PieceTable((*(f"<0x{i:02X}>" for i in range(256)), "a"), (PieceKind.BYTE,) * 256 + (PieceKind.NORMAL,))


@given(st.text(max_size=20))
def test_bytes_spell_every_text(text):
    surfaces = bytes_table().surfaces(text.encode())
    assert "".join(surfaces) == text
    assert len(surfaces) == len(text.encode())
    assert [s for s in surfaces if s] == list(text)


def test_broken_bytes_are_replaced_one_by_one():
    assert bytes_table().decode([0xE4, 0xBD, 256, 0xA0, 0x41]) == "\ufffd\ufffda\ufffdA"


@pytest.mark.parametrize("index", [-1, 4])
def test_ids_outside_the_table_are_refused(index):
    table = PieceTable(tuple(p for p, _ in PIECES), tuple(k for _, k in PIECES))
    with pytest.raises(ValueError, match=rf"ids must lie in 0\.\.3 but got {index}"):
        table.decode([2, index])


@pytest.mark.parametrize(
    ("surfaces", "words"),
    [
        ([], []),
        (["he", "llo", " the", "re"], ["hello", "there"]),
        (["don", "'", "t", " stop", "."], ["don't", "stop", "."]),
        (["我", "想问", "，", "ok", "ay", "好"], ["我", "想问", "，", "okay", "好"]),
        (["안녕", "하세요", " 세계"], ["안녕하세요", "세계"]),
        (["1", "2", " ", "3", "", "4"], ["12", "3", "4"]),
        ([" ", "a", " b ", "c"], ["a", "b", "c"]),
        (["こん", "にちは"], ["こん", "にちは"]),
    ],
)
def test_words(surfaces, words):
    groups = word_groups(surfaces)
    assert ["".join(surfaces[i] for i in group).strip() for group in groups] == words
