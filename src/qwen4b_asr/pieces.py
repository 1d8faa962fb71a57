"""Read a sentencepiece vocabulary and turn ids into text.

SenseVoiceSmall's symbols are the pieces of a sentencepiece ``.model`` file, a protocol buffer
(``sentencepiece_model.proto``). Only the way from ids to text is needed here: a list of pieces, their
kinds and three flags, read in a page of code. The sentencepiece package would bring 5 MB of compiled
tokeniser for it, so it stays with the golden tools, which hold this file against it
(``SentencePieceProcessor.Decode`` is the source of the rules).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path

from .errors import CheckpointError

PIECE_FILES = ("chn_jpn_yue_eng_ko_spectok.bpe.model", "tokens.json", "multilingual.tiktoken")
"""Files beside published weights that spell the CTC symbols, the better one first."""

SPACE = "\u2581"  # how a piece writes a space
UNKNOWN_SURFACE = " \u2047 "
_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Ideographs, kana and full-width forms: scripts without spaces between words.
_UNSPACED = re.compile("[\u2e80-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_MAX_BYTES = 64 << 20  # the largest vocabularies in use have a few MB


class PieceKind(IntEnum):
    """``ModelProto.SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class PieceTable:
    """The pieces of a vocabulary in order of their ids.

    Args:
        pieces: Text of each piece, spaces written as U+2581.
        kinds: Kind of each piece.
        unknown_surface: What the unknown piece reads as.
        dummy_prefix: The tokeniser put a space before each text, so the first one is taken off again.
        single_spaces: It also dropped spaces at both ends, so all of those at the start are taken off.
    """

    pieces: tuple[str, ...]
    kinds: tuple[PieceKind, ...]
    unknown_surface: str = UNKNOWN_SURFACE
    dummy_prefix: bool = True
    single_spaces: bool = True

    def __post_init__(self) -> None:
        if not self.pieces or len(self.pieces) != len(self.kinds):
            raise ValueError(
                f"[PieceTable] there must be pieces, and a kind for each, but got {len(self.pieces)} pieces "
                f"and {len(self.kinds)} kinds"
            )
        for index, (piece, kind) in enumerate(zip(self.pieces, self.kinds, strict=True)):
            if kind == PieceKind.BYTE and not _BYTE.fullmatch(piece):
                raise ValueError(f"[PieceTable] a byte piece must read <0xNN> but piece {index} got {piece!r}")

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: index for index, piece in reversed(list(enumerate(self.pieces)))}

    def id_of(self, piece: str) -> int | None:
        """Return the id of a piece's text, or None if there is no such piece."""
        return self._ids.get(piece)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a sequence of ids.

        Raises:
            ValueError: On an id that is not in the table.
        """
        return "".join(self.surfaces(ids))

    def surfaces(self, ids: Iterable[int]) -> list[str]:
        """Return what each id adds to the text; joined, they are `decode`.

        A character spelled in bytes belongs to the last of them. Control pieces add nothing.

        Raises:
            ValueError: On an id that is not in the table.
        """
        found: list[str] = []
        run: list[int] = []  # bytes whose characters are not complete yet
        begun, prefix_taken = False, False
        for index in ids:
            if not 0 <= index < len(self.pieces):
                raise ValueError(f"[PieceTable] ids must lie in 0..{len(self.pieces) - 1} but got {index}")
            piece, kind = self.pieces[index], self.kinds[index]
            if kind == PieceKind.BYTE:
                run.append(int(piece[3:5], 16))
                continue
            characters = _utf8(run)
            run.clear()
            begun = begun or prefix_taken or any(characters)
            found += characters
            surface, prefix_taken = self._surface(piece, kind, not begun)
            begun = begun or bool(surface)
            found.append(surface)
        return found + _utf8(run)

    def _surface(self, piece: str, kind: PieceKind, first: bool) -> tuple[str, bool]:
        """Return the text of a piece that is no byte, and whether it used up the space of the dummy prefix."""
        if kind == PieceKind.CONTROL:
            return "", False
        if kind == PieceKind.UNKNOWN:
            return self.unknown_surface, False
        taken = False
        if first and (self.dummy_prefix or self.single_spaces) and piece.startswith(SPACE):
            piece = piece[len(SPACE) :]
            taken = not self.single_spaces
        return piece.replace(SPACE, " "), taken


def _utf8(values: Sequence[int]) -> list[str]:
    """Decode bytes; returns one text per byte, a character with its last byte, U+FFFD for each byte of none."""
    found: list[str] = []
    start = 0
    while start < len(values):
        lead = values[start]
        length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        try:
            character = bytes(values[start : start + length]).decode("utf-8")
        except UnicodeDecodeError:
            length, character = 1, _REPLACEMENT
        found += [""] * (length - 1) + [character]
        start += length
    return found


def word_groups(surfaces: Sequence[str]) -> list[range]:
    """Group surfaces into words, as the places of those that make each up.

    A word begins where a surface begins with a space; letters, digits and apostrophes go on with it. Chinese
    characters and kana, which are written without spaces, and punctuation stand alone; what is only a space or
    nothing belongs to no word. funasr's ``SenseVoiceSmall.post`` agrees on Chinese and on English letters, but
    takes digits, apostrophes and Hangul for words of their own.

    Args:
        surfaces: From `PieceTable.surfaces`.
    """
    groups: list[range] = []
    open_word = False  # the last group may still go on
    for place, surface in enumerate(surfaces):
        body = surface.strip()
        if not body:
            open_word = False
            continue
        joins = all((c.isalnum() and not is_unspaced(c)) or c in "'\u2019" for c in body)
        if open_word and joins and not surface.startswith(" "):
            groups[-1] = range(groups[-1].start, place + 1)
        else:
            groups.append(range(place, place + 1))
        open_word = joins and not surface.endswith(" ")
    return groups


def is_unspaced(character: str) -> bool:
    """Tell whether a character belongs to a script that puts no spaces between words, or to its punctuation."""
    return _UNSPACED.match(character) is not None


def read_pieces(path: str | Path) -> PieceTable:
    """Read a vocabulary: a sentencepiece ``.model``, or a ``tokens.json`` with the pieces as a list.

    A ``tokens.json`` holds no kinds; ``<unk>``, ``<s>``, ``</s>``, ``<pad>`` and ``<0xNN>`` are known by their names.

    Raises:
        CheckpointError: If the file is missing, damaged, or asks for what is not supported.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) > _MAX_BYTES:
        raise CheckpointError(f"{path}: a vocabulary has a few MB, this file more than {_MAX_BYTES} bytes")
    try:
        return _from_json(content) if path.suffix == ".json" else _from_model(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a vocabulary that can be read: {error}") from error


_NAMED_KINDS = {"<unk>": PieceKind.UNKNOWN} | dict.fromkeys(("<s>", "</s>", "<pad>"), PieceKind.CONTROL)


def _from_json(content: bytes) -> PieceTable:
    pieces = json.loads(content)
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise ValueError("a JSON list of strings is needed")
    kinds = (PieceKind.BYTE if _BYTE.fullmatch(p) else _NAMED_KINDS.get(p, PieceKind.NORMAL) for p in pieces)
    return PieceTable(tuple(pieces), tuple(kinds))


# --- Protocol buffers: a message is a sequence of (field number and wire type, value) ------------------------------

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _from_model(content: bytes) -> PieceTable:
    """Read ``ModelProto``: pieces 1, trainer_spec 2, normalizer_spec 3, denormalizer_spec 5."""
    pieces: list[str] = []
    kinds: list[PieceKind] = []
    unknown_surface, dummy_prefix, single_spaces = UNKNOWN_SURFACE, True, True
    for number, value in _fields(content):
        if number == 1:
            piece, kind = "", PieceKind.NORMAL
            for part, held in _fields(_message(value)):
                if part == 1:
                    piece = _message(held).decode("utf-8")
                elif part == 3:
                    kind = PieceKind(_number(held))
            pieces.append(piece)
            kinds.append(kind)
        elif number == 2:
            for part, held in _fields(_message(value)):
                if part == 44:
                    unknown_surface = _message(held).decode("utf-8")
        elif number == 3:
            for part, held in _fields(_message(value)):
                if part == 3:
                    dummy_prefix = bool(_number(held))
                elif part == 4:
                    single_spaces = bool(_number(held))
        elif number == 5 and any(part == 2 and held for part, held in _fields(_message(value))):
            raise ValueError("it rewrites decoded text by a denormalizer_spec, which is not supported")
    return PieceTable(tuple(pieces), tuple(kinds), unknown_surface, dummy_prefix, single_spaces)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field: an int for varints, bytes for the rest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at} is none of a sentencepiece model")
        if size > len(message) - at:
            raise ValueError(f"a field at byte {at} is longer than what is left; is the file cut short?")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first; returns it and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number; is the file cut short?")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number before byte {at} has more than 64 bits")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where text or a message is needed")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text stands where a number is needed")
    return value
