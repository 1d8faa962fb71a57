"""Read and write safetensors checkpoints, single or sharded, tensor by tensor.

The format: eight bytes of header length (little-endian), a JSON header
``{name: {dtype, shape, data_offsets: [begin, end]}}``, then the bytes of all tensors without
gaps. A sharded checkpoint adds ``model.safetensors.index.json`` with a ``weight_map`` from
tensor to file. Source: the README of huggingface/safetensors.

Reading is done here rather than by the library so that a damaged file gives a message that
names the file and the tensor, and so that types numpy lacks (bfloat16) need no detour.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from .tensors import TensorRef, item_size, map_file, to_bytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4 << 30
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """Index one safetensors file; the tensors are read when asked for.

    Raises:
        CheckpointError: If the header is damaged, or the tensors overlap, leave gaps or reach out of the file.
    """
    mapped = map_file(path)
    if len(mapped) < 8:
        raise CheckpointError(f"{path}: {len(mapped)} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", mapped[:8])
    if length > min(_MAX_HEADER_BYTES, len(mapped) - 8):
        raise CheckpointError(f"{path}: no safetensors file, or cut short (its header would have {length} bytes)")
    try:
        header = json.loads(mapped[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header must be an object, not {type(header).__name__}")
    header.pop("__metadata__", None)
    data = 8 + length
    refs: dict[str, TensorRef] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > len(mapped) - data:
            raise CheckpointError(
                f"{path}: tensor {name!r} ends at byte {data + end} of a file of {len(mapped)} bytes; is it cut short?"
            )
        items = (end - begin) // item_size(dtype)
        if prod(shape) * item_size(dtype) != end - begin:
            raise CheckpointError(f"{path}: tensor {name!r}: {dtype} {list(shape)} does not fill {end - begin} bytes")
        refs[name] = TensorRef(name, shape, dtype, path, mapped, data + begin, items)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} {what} (byte {begin} after {position})")
        position = end
    if position != len(mapped) - data:
        raise CheckpointError(f"{path}: {len(mapped) - data - position} bytes after the last tensor belong to none")
    return refs


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return type, shape and span of one header entry, checked."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    try:
        item_size(dtype)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} has the type {dtype!r}, which cannot be read") from error
    if not (counts(shape) and counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed shape or data_offsets")
    return dtype, tuple(shape), offsets[0], offsets[1]


def read_safetensors_directory(directory: Path) -> dict[str, TensorRef]:
    """Index a checkpoint directory: the shards of its index, or ``model.safetensors`` alone.

    Raises:
        CheckpointError: If neither is there, or index and shards disagree.
    """
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        single = directory / SINGLE_FILE
        if not single.is_file():
            raise CheckpointError(f"{directory}: needs {SINGLE_FILE}, or {INDEX_FILE} with the shards it names")
        return read_safetensors(single)
    weight_map = _weight_map(index_path)
    refs: dict[str, TensorRef] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file}: the shard is missing that {index_path} names")
        shard = read_safetensors(directory / file)
        for name, ref in shard.items():
            if weight_map.get(name) != file:
                where = weight_map.get(name, "no file")
                raise CheckpointError(f"{directory / file}: holds {name!r}, which {index_path.name} puts in {where}")
            refs[name] = ref
    absent = [name for name in weight_map if name not in refs]
    if absent:
        raise CheckpointError(
            f"{directory / weight_map[absent[0]]}: lacks {len(absent)} tensors that {index_path.name} puts there, "
            f"such as {absent[0]!r}"
        )
    return {name: refs[name] for name in weight_map}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map from tensors to files")
    for name, file in weight_map.items():
        # A file name only: an index must not reach outside its directory.
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path}: puts {name!r} in {file!r}, which is not the name of a file beside it")
    return weight_map


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written: what the header says, and a way to get its elements block by block.

    Args:
        name: Its name.
        shape: Its sizes.
        dtype: Its type, named as in safetensors.
        blocks: Returns its elements in row-major order as arrays of that type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterable[mx.array]]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return prod(self.shape) * item_size(self.dtype)


def plan_shards(tensors: Sequence[OutgoingTensor], shard_bytes: int) -> list[list[OutgoingTensor]]:
    """Split tensors, in order, into files of at most `shard_bytes` (a larger tensor gets a file of its own).

    Raises:
        ValueError: If `shard_bytes` is not positive.
    """
    if shard_bytes < 1:
        raise ValueError(f"[plan_shards] shard_bytes must be at least 1 but got {shard_bytes}")
    shards: list[list[OutgoingTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_safetensors(
    directory: Path,
    tensors: Sequence[OutgoingTensor],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_tensor: Callable[[str, int], None] | None = None,
) -> dict[str, str]:
    """Write a checkpoint as one file or as shards with an index, holding one block at a time.

    Args:
        directory: Where to write; it must exist.
        tensors: What to write, in order.
        shard_bytes: Largest size of a shard's tensors.
        on_tensor: Called with name and bytes after each tensor.

    Returns:
        The SHA-256 of each file written, by file name.

    Raises:
        CheckpointError: If the disk is full or not writable.
        ValueError: If a tensor's blocks do not give what its header promised.
    """
    shards = plan_shards(tensors, shard_bytes)
    single = len(shards) <= 1
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards or [[]], 1):
        file = SINGLE_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = _write_file(directory / file, shard, on_tensor)
        weight_map.update({tensor.name: file for tensor in shard})
    if not single:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        digests[INDEX_FILE] = write_durably(directory / INDEX_FILE, [text.encode("utf-8")])
    return digests


def _write_file(path: Path, tensors: list[OutgoingTensor], on_tensor: Callable[[str, int], None] | None) -> str:
    # Every tensor is aligned to its type: in the order given if that does it, or else wide types first. The order
    # given keeps the parts of a quantised matrix together, which are made together.
    ordered = tensors if _aligned(tensors) else sorted(tensors, key=lambda tensor: -item_size(tensor.dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for tensor in ordered:
        if tensor.name in header:
            raise ValueError(f"[write_safetensors] names must be unique but got {tensor.name!r} twice")
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for tensor in ordered:
            written = 0
            for block in tensor.blocks():
                data = to_bytes(block)
                written += data.nbytes
                yield data
            if written != tensor.nbytes:
                raise ValueError(
                    f"[write_safetensors] {tensor.name!r} must give {tensor.nbytes} bytes but got {written}"
                )
            if on_tensor is not None:
                on_tensor(tensor.name, tensor.nbytes)

    return write_durably(path, chunks())


def _aligned(tensors: Sequence[OutgoingTensor]) -> bool:
    position = 0
    for tensor in tensors:
        if position % item_size(tensor.dtype):
            return False
        position += tensor.nbytes
    return True


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a file, have it on the disk before returning, and return its SHA-256.

    Raises:
        CheckpointError: If the disk is full or not writable.
    """
    digest = hashlib.sha256()
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    return digest.hexdigest()
