"""The model directory: which files it has, and how it comes to be whole or not at all.

A directory is written under a temporary name beside its place and moved there by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import FILE_NAME as CONFIG_FILE
from ..config import ModelConfig
from ..errors import CheckpointError
from ..model import SpeechModel
from .safetensors_file import DEFAULT_SHARD_BYTES, OutgoingTensor, write_durably, write_safetensors
from .tensors import dtype_name

TOKENIZER_FILE = "tokenizer.json"
CHECKSUMS_FILE = "checksums.json"
PROVENANCE_FILE = "provenance.json"
SCHEMA = 1


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file, read in pieces.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write a JSON file durably and return its SHA-256."""
    return write_durably(path, [(json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")])


def write_checksums(directory: Path, digests: dict[str, str]) -> None:
    """Write ``checksums.json``: the SHA-256 of every other file of the directory."""
    files = {name: digests[name] for name in sorted(digests)}
    write_json(directory / CHECKSUMS_FILE, {"schema": SCHEMA, "algorithm": "sha256", "files": files})


def save_model(
    output: Path,
    model: SpeechModel,
    config: ModelConfig,
    tokenizer: Path,
    *,
    provenance: dict[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write a model that is in memory, such as a trained one, as a model directory.

    Args:
        output: The directory to make.
        model: The model; its parameters are stored in the types they have.
        config: Its configuration.
        tokenizer: The ``tokenizer.json`` to copy.
        provenance: What to write into ``provenance.json``, if anything.
        force: Whether an existing model directory is replaced.

    Raises:
        CheckpointError: If `output` exists and may not be replaced, or the disk is full.
    """
    flat: Any = tree_flatten(model.parameters())

    def blocks_of(array: mx.array) -> Callable[[], list[mx.array]]:
        return lambda: [array]

    tensors = [
        OutgoingTensor(name, tuple(array.shape), dtype_name(array.dtype), blocks_of(array)) for name, array in flat
    ]
    with staged_directory(output, force=force) as stage:
        digests = {CONFIG_FILE: write_json(stage / CONFIG_FILE, config.to_dict())}
        digests[TOKENIZER_FILE] = copy_durably(tokenizer, stage / TOKENIZER_FILE)
        digests.update(write_safetensors(stage, tensors, shard_bytes=DEFAULT_SHARD_BYTES))
        if provenance is not None:
            digests[PROVENANCE_FILE] = write_json(stage / PROVENANCE_FILE, provenance)
        write_checksums(stage, digests)


def copy_durably(source: Path, target: Path) -> str:
    """Copy a file in pieces, have it on the disk, and return its SHA-256.

    Raises:
        CheckpointError: If either end fails.
    """

    def pieces() -> Iterator[bytes]:
        with source.open("rb") as file:
            while piece := file.read(1 << 22):
                yield piece

    try:
        return write_durably(target, pieces())
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror or error})") from error


@contextmanager
def staged_directory(output: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary directory beside `output` that becomes `output` if the block ends well.

    Left-overs of killed runs on this machine are cleared away first. With `force` the old directory
    is moved aside, the new one moved in, and the old one deleted; a run killed between the two moves
    leaves the old one under its temporary name, and the next run puts it back.

    Args:
        output: The directory to make.
        force: Whether an existing model directory is replaced; any other directory never is.

    Raises:
        CheckpointError: If `output` exists and may not be replaced, or cannot be made.
    """
    output = Path(os.path.abspath(output.expanduser()))
    mine = f"{socket.gethostname()}-{os.getpid()}"
    stage = output.parent / f".{output.name}.partial-{mine}"
    aside = output.parent / f".{output.name}.replaced-{mine}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_left_overs(output)
        _check_free(output, force)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be made ({error.strerror or error})") from error
    try:
        yield stage
        _sync_directory(stage)
        try:
            _check_free(output, force)  # an hour may have passed
            if output.exists():
                output.rename(aside)
            try:
                stage.rename(output)
            except OSError:
                if aside.exists():
                    aside.rename(output)
                raise
            _sync_directory(output.parent)
        except OSError as error:
            raise CheckpointError(f"{output}: cannot be put in place ({error.strerror or error})") from error
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_free(output: Path, force: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not output.is_symlink():
        if not any(output.iterdir()):
            output.rmdir()
            return
        if force and (output / CONFIG_FILE).is_file() and (output / CHECKSUMS_FILE).is_file():
            return
        if force:
            raise CheckpointError(f"{output}: is not a model directory (no {CHECKSUMS_FILE}), so it is not replaced")
    raise CheckpointError(f"{output}: exists already; choose another place, or --force to replace a model directory")


def _clear_left_overs(output: Path) -> None:
    """Remove what runs on this machine that are no longer alive left beside `output`."""
    host = socket.gethostname()
    for kind in ("replaced", "partial"):
        start = f".{output.name}.{kind}-{host}-"
        for path in sorted(output.parent.iterdir()):
            number = path.name[len(start) :]
            if not path.name.startswith(start) or not number.isdecimal() or _alive(int(number)):
                continue
            if kind == "replaced" and not output.exists():
                path.rename(output)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # this run has made nothing yet: an earlier process had the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync_directory(path: Path) -> None:
    """Have a directory's entries on the disk; systems that cannot open a directory have no need to."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
