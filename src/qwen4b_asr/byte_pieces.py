"""Read a vocabulary of bytes (``.tiktoken``), which spells the CTC symbols of Fun-ASR-Nano.

The file has a line for each piece, its bytes in base64 and its rank. The symbols above the last rank are marks that
FunASR's tokenizer adds (languages, events, times) and the CTC blank; none of them is text.
Source: FunASR's ``funasr/models/sense_voice/whisper_lib/tokenizer.py`` (``get_encoding``).
"""

from __future__ import annotations

import base64
import binascii
import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .pieces import PieceKind, PieceTable


@dataclass(frozen=True)
class BytePieceTable(PieceTable):
    """Pieces that are bytes: one may hold several characters, or a part of one.

    Args:
        values: The bytes of each piece; empty for what is no text.
    """

    values: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, values: Iterable[bytes], size: int) -> BytePieceTable:
        """Return the table of `size` symbols whose first are `values`.

        Raises:
            ValueError: If there are more pieces than symbols.
        """
        known = tuple(values)
        if len(known) > size:
            raise ValueError(f"[BytePieceTable] {size} symbols have no room for {len(known)} pieces")
        marks = size - len(known)
        return cls(
            pieces=tuple(value.decode("utf-8", "replace") for value in known) + ("",) * marks,
            kinds=(PieceKind.NORMAL,) * len(known) + (PieceKind.CONTROL,) * marks,
            dummy_prefix=False,
            single_spaces=False,
            values=known + (b"",) * marks,
        )

    def surfaces(self, ids: Iterable[int]) -> list[str]:
        """Return what each id adds to the text; joined, they are `decode`.

        A character belongs to the piece with its last byte; bytes that are no character read U+FFFD.

        Raises:
            ValueError: On an id that is not in the table.
        """
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        found: list[str] = []
        for index in ids:
            if not 0 <= index < len(self.values):
                raise ValueError(f"[BytePieceTable] ids must lie in 0..{len(self.values) - 1} but got {index}")
            found.append(reader.decode(self.values[index]))
        if found:
            found[-1] += reader.decode(b"", final=True)
        return found


def read_byte_pieces(path: str | Path, size: int) -> BytePieceTable:
    """Read a ``.tiktoken`` file.

    Args:
        path: The file.
        size: Symbols of the CTC head, marks and blank included.

    Raises:
        CheckpointError: If the file is missing or damaged, or has more pieces than the head has symbols.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    ranked: dict[int, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            value, place = base64.b64decode(piece, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}: line {number} is not a piece in base64 and its rank") from error
        if not value or place in ranked:
            raise CheckpointError(f"{path}: line {number} gives an empty piece or a rank that is taken")
        ranked[place] = value
    if not ranked or set(ranked) != set(range(len(ranked))):
        raise CheckpointError(f"{path}: the ranks of {len(ranked)} pieces must run from 0 without gaps")
    if len(ranked) > size:
        raise CheckpointError(f"{path}: has {len(ranked)} pieces, but the CTC head only {size} symbols")
    return BytePieceTable.of((ranked[place] for place in range(len(ranked))), size)
