"""Open a checkpoint of any kind that users have: torch file, safetensors file, or a directory of shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .safetensors_file import read_safetensors, read_safetensors_directory
from .tensors import TensorRef
from .torch_zip import read_torch

_GIT_LFS = b"version https://git-lfs"


def open_checkpoint(path: Path) -> dict[str, TensorRef]:
    """Index the tensors of a file or a directory; what the bytes say counts, not the suffix.

    Args:
        path: A ``.pt`` or ``.safetensors`` file, or a directory with ``model.safetensors`` or an index.

    Raises:
        CheckpointError: If nothing readable is there.
    """
    if path.is_dir():
        return read_safetensors_directory(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    if head.startswith(_GIT_LFS):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)")
    if head[:4] == b"PK\x03\x04":
        return read_torch(path)
    if head[8:9] == b"{":
        return read_safetensors(path)
    if head[:1] == b"\x80":
        return read_torch(path)
    raise CheckpointError(f"{path}: neither a torch checkpoint nor a safetensors file")


def files_of(refs: Mapping[str, TensorRef]) -> list[Path]:
    """Return the files that hold the tensors, each once."""
    return list(dict.fromkeys(ref.file for ref in refs.values()))
