"""Read a torch checkpoint (``.pt``, ``.pth``, ``.bin``) without torch, tensor by tensor.

Two layouts are read: the zip archive that ``torch.save`` has written since torch 1.6
(``torch/csrc/jit/serialization``, ``caffe2/serialize/inline_container``), whose storages lie
uncompressed and can be mapped in place, and the older stream of pickles that begins with a
magic number. Neither runs anything from the file: see `pickle_reader`.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .pickle_reader import (
    STORAGE_DTYPES,
    UNTYPED_STORAGE,
    Global,
    PickleRefusedError,
    StorageRef,
    TensorSpec,
    read_pickle,
)
from .tensors import TensorRef, item_size, map_file

# A state_dict of a thousand tensors pickles to about 100 kB.
_MAX_PICKLE_BYTES = 16 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "adaptor_state_dict", "adaptor")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class _Storage:
    start: int  # first byte in the file
    nbytes: int


def read_torch(path: Path) -> dict[str, TensorRef]:
    """Index a torch checkpoint; the tensors are read when asked for.

    A ``state_dict``, ``model_state_dict``, ``model`` or ``module`` entry around the tensors is
    unwrapped, and a ``module.`` or ``_orig_mod.`` before every name is taken off.

    Args:
        path: The file.

    Returns:
        The tensors by name, in the file's order.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or asks to run anything.
    """
    mapped = map_file(path)
    try:
        if mapped[:4] == b"PK\x03\x04":
            root, storages = _read_zip(path, mapped)
        elif mapped[:1] == b"\x80":
            root, storages = _read_legacy(mapped)
        else:
            raise CheckpointError(f"{path}: this is no torch checkpoint (neither a zip archive nor a pickle)")
        tensors = _strip_prefixes(_unwrap(root))
    except PickleRefusedError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {name: _locate(name, spec, storages, path, mapped) for name, spec in tensors.items()}


def _locate(name: str, spec: TensorSpec, storages: Mapping[str, _Storage], path: Path, mapped: mmap.mmap) -> TensorRef:
    """Check a tensor's claims against the bytes that are really there."""
    storage = storages.get(spec.storage.key)
    if storage is None:
        raise CheckpointError(f"{path}: tensor {name!r}: its storage {spec.storage.key!r} is not in the file")
    size = item_size(spec.dtype)
    unit = 1 if spec.storage.dtype is None else item_size(spec.storage.dtype)
    claimed = spec.storage.items * unit
    skipped = spec.storage.first * unit
    if claimed + skipped > storage.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r}: its storage {spec.storage.key!r} should hold {claimed + skipped} bytes "
            f"but holds {storage.nbytes}"
        )
    return TensorRef(
        name=name,
        shape=spec.shape,
        dtype=spec.dtype,
        file=path,
        buffer=mapped,
        start=storage.start + skipped,
        storage_items=claimed // size,
        offset=spec.offset,
        strides=spec.strides,
    )


def _persistent_load(views: bool) -> Callable[[Any], StorageRef]:
    """Return a reader of storage ids; only the legacy layout's ids may carry a view."""

    def load(identifier: Any) -> StorageRef:
        match identifier:
            case ("storage", Global() as kind, str() as key, str(), int() as items):
                view: Any = None
            case ("storage", Global() as kind, str() as key, str(), int() as items, view) if views:
                pass
            case _:
                raise PickleRefusedError("its pickle has a persistent id that does not describe a storage")
        dtype = None
        if (kind.module, kind.name) != UNTYPED_STORAGE:
            dtype = STORAGE_DTYPES.get(kind.name) if kind.module == "torch" else None
            if dtype is None:
                raise PickleRefusedError(f"its pickle has a storage of type {kind}, which is not one")
        first = 0
        match view:
            case None:
                pass
            case (str(), int() as first, int() as count) if first >= 0 and count >= 0:
                items = count
            case _:
                raise PickleRefusedError(f"its pickle has a malformed view of storage {key!r}")
        if items < 0:
            raise PickleRefusedError(f"its pickle gives storage {key!r} a size of {items}")
        return StorageRef(key, dtype, items, first)

    return load


def _read_zip(path: Path, mapped: mmap.mmap) -> tuple[Any, dict[str, _Storage]]:
    entries = _zip_entries(path, mapped)
    roots = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a torch archive has one data.pkl, this zip has {len(roots)}")
    prefix = roots[0][: -len("data.pkl")]
    order = entries.get(f"{prefix}byteorder")
    if order and mapped[order.start : order.start + min(order.nbytes, 16)].strip() != b"little":
        raise CheckpointError(f"{path}: it was saved on a big-endian machine; save it again on a little-endian one")
    program = entries[roots[0]]
    if program.nbytes > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: its pickle has {program.nbytes} bytes; at most {_MAX_PICKLE_BYTES} are read")
    stream = BytesIO(mapped[program.start : program.start + program.nbytes])
    root = read_pickle(stream, _persistent_load(views=False))
    folder = f"{prefix}data/"
    return root, {name[len(folder) :]: entry for name, entry in entries.items() if name.startswith(folder)}


def _zip_entries(path: Path, mapped: mmap.mmap) -> dict[str, _Storage]:
    """Return where each entry's bytes lie, refusing what cannot be mapped in place."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, EOFError, struct.error) as why:
        raise CheckpointError(f"{path}: the zip archive is damaged or cut short ({why}); copy it again") from why
    entries: dict[str, _Storage] = {}
    for info in infos:
        name, header = info.filename, info.header_offset
        if name in entries:
            raise CheckpointError(f"{path}: the entry {name!r} occurs twice")
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"{path}: the entry {name!r} is compressed or encrypted, which torch never does")
        if header < 0 or header + 30 > len(mapped) or mapped[header : header + 4] != b"PK\x03\x04":
            raise CheckpointError(f"{path}: the entry {name!r} does not lie where the archive says")
        # The local header's own name and extra field decide where the data begin.
        name_length, extra_length = struct.unpack("<HH", mapped[header + 26 : header + 30])
        start = header + 30 + name_length + extra_length
        if start + info.file_size > len(mapped):
            raise CheckpointError(f"{path}: the entry {name!r} reaches past the end of the file; is it truncated?")
        entries[name] = _Storage(start, info.file_size)
    in_order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes))
    for (first, a), (second, b) in pairwise(in_order):
        if a.start + a.nbytes > b.start:
            raise CheckpointError(f"{path}: the entries {first!r} and {second!r} overlap")
    return entries


def _read_legacy(mapped: mmap.mmap) -> tuple[Any, dict[str, _Storage]]:
    """Read the layout of torch before 1.6: magic, protocol, system, objects, keys, then raw storages."""
    stream = BytesIO(mapped[:_MAX_PICKLE_BYTES])
    load = _persistent_load(views=True)

    def no_storages(identifier: Any) -> Any:
        raise PickleRefusedError("its pickle has a persistent id where none belongs")

    sizes: dict[str, tuple[str | None, int]] = {}

    def load_and_note(identifier: Any) -> StorageRef:
        storage = load(identifier)
        sizes[storage.key] = (storage.dtype, max(identifier[4], sizes.get(storage.key, (None, 0))[1]))
        return storage

    if read_pickle(stream, no_storages) != _LEGACY_MAGIC:
        raise PickleRefusedError("this is a pickle, but no torch checkpoint; save the state_dict with torch.save")
    if read_pickle(stream, no_storages) != _LEGACY_PROTOCOL:
        raise PickleRefusedError("it has an unknown version of torch's old format")
    system = read_pickle(stream, no_storages)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise PickleRefusedError("it was not saved on a little-endian machine")
    root = read_pickle(stream, load_and_note)
    keys = read_pickle(stream, no_storages)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise PickleRefusedError("its list of storages is malformed")
    storages: dict[str, _Storage] = {}
    position = stream.tell()
    for key in keys:
        dtype, items = sizes.get(key, (None, -1))
        if items < 0 or key in storages:
            raise PickleRefusedError(f"its list of storages has {key!r}, which is repeated or never used")
        header = mapped[position : position + 8]
        nbytes = items * (1 if dtype is None else item_size(dtype))
        if len(header) < 8 or struct.unpack("<q", header)[0] != items:
            raise PickleRefusedError(f"storage {key!r} is missing or does not hold its {items} elements")
        storages[key] = _Storage(position + 8, nbytes)
        position += 8 + nbytes
        if position > len(mapped):
            raise PickleRefusedError(f"storage {key!r} reaches past the end of the file; is it truncated?")
    return root, storages


def _unwrap(root: Any) -> dict[str, TensorSpec]:
    """Return the tensors of a state_dict, however it was wrapped."""
    for _ in range(5):
        if type(root) is not dict:
            raise PickleRefusedError(f"it holds a {type(root).__name__} where a dict of tensors should be")
        tensors = {key: value for key, value in root.items() if isinstance(value, TensorSpec)}
        if tensors:
            if not all(type(key) is str for key in tensors):
                raise PickleRefusedError("its tensors are not named by text")
            return tensors
        inner = next((key for key in _WRAPPERS if type(root.get(key)) is dict and root[key]), None)
        if inner is None:
            break
        root = root[inner]
    keys = ", ".join(repr(key) for key in list(root)[:8]) if type(root) is dict else ""
    raise PickleRefusedError(f"it holds no tensors where they are looked for ({', '.join(_WRAPPERS)}); it has: {keys}")


def _strip_prefixes(tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: spec for name, spec in tensors.items()}
    return tensors
