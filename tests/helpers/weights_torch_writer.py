"""Write torch's zip archives, well formed or not, from pickle opcodes put together by hand."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}


def opglobal(module: str, name: str) -> bytes:
    """GLOBAL."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def optext(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def opint(value: int) -> bytes:
    """BININT, or LONG1 where it does not fit."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def optuple(*items: bytes) -> bytes:
    """MARK, the items, TUPLE."""
    return b"(" + b"".join(items) + b"t"


def opdict(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """EMPTY_DICT, MARK, keys and values, SETITEMS."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def oplist(*items: bytes) -> bytes:
    """EMPTY_LIST, MARK, the items, APPENDS."""
    return b"](" + b"".join(items) + b"e"


def opstorage(key: str, dtype: str, items: int, view: bool | tuple[int, int] = False) -> bytes:
    """The persistent id of a storage; old files have a place for a view (first element, count) in it."""
    parts = [optext("storage"), opglobal("torch", STORAGES[dtype]), optext(key), optext("cpu"), opint(items)]
    if view is not False:
        parts.append(b"N" if view is True else optuple(optext("v"), opint(view[0]), opint(view[1])))
    return optuple(*parts) + b"Q"


def optensor(storage: bytes, offset: int, shape: Iterable[int], strides: Iterable[int]) -> bytes:
    """A call of ``_rebuild_tensor_v2``."""
    hooks = opglobal("collections", "OrderedDict") + b")R"
    sizes, steps = (optuple(*map(opint, values)) for values in (shape, strides))
    arguments = optuple(storage, opint(offset), sizes, steps, b"\x89", hooks)
    return opglobal("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def program(body: bytes) -> bytes:
    """PROTO 2, the body, STOP."""
    return b"\x80\x02" + body + b"."


@dataclass(frozen=True)
class View:
    """A tensor as a view of a storage: its key, type, the storage's size, and where the view lies."""

    key: str
    dtype: str
    items: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def write_archive(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes],
    *,
    root: str = "archive",
    compression: int = zipfile.ZIP_STORED,
    byteorder: str = "little",
) -> Path:
    """Write an archive with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", "3\n")
    return path


def write_legacy(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes | int],
    *,
    magic: int = 0x1950A86A20F9469CFC6C,
    protocol: int = 1001,
    little_endian: bytes = b"\x88",
    keys: bytes | None = None,
    counts: Mapping[str, int] | None = None,
) -> Path:
    """Write torch's old layout of float32 storages; an int stands for that many zeros, as a hole in the file."""
    names = oplist(*map(optext, storages)) if keys is None else keys
    system = opdict([(optext("protocol_version"), opint(1001)), (optext("little_endian"), little_endian)])
    with path.open("wb") as file:
        for body in (opint(magic), opint(protocol), system):
            file.write(program(body))
        file.write(pickle + program(names))
        for key, data in storages.items():
            items = data if isinstance(data, int) else len(data) // 4
            file.write(struct.pack("<q", (counts or {}).get(key, items)))
            if isinstance(data, int):
                file.truncate(file.tell() + items * 4)
                file.seek(0, 2)
            else:
                file.write(data)
    return path


def write_views(
    path: Path, views: Mapping[str, View], storages: Mapping[str, bytes], wrap: tuple[str, ...] = ()
) -> Path:
    """Write a state_dict of views, inside as many dicts as `wrap` has keys."""
    body = opdict(
        (optext(name), optensor(opstorage(v.key, v.dtype, v.items), v.offset, v.shape, v.strides))
        for name, v in views.items()
    )
    for key in reversed(wrap):
        body = opdict([(optext(key), body)])
    return write_archive(path, program(body), storages)


def write_dense(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], wrap: tuple[str, ...] = ()
) -> Path:
    """Write name -> (type, shape, bytes), each tensor with a storage of its own."""
    views: dict[str, View] = {}
    for number, (name, (dtype, shape, _)) in enumerate(tensors.items()):
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        views[name] = View(str(number), dtype, step, 0, shape, tuple(reversed(strides)))
    return write_views(path, views, {views[n].key: data for n, (_, _, data) in tensors.items()}, wrap)
