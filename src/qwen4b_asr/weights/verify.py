"""Check a model directory: checksums, names, shapes, types, values, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import FILE_NAME as CONFIG_FILE
from ..config import ModelConfig
from ..errors import AsrError, CheckpointError, ConfigError
from ..model import SpeechModel
from ..pieces import PIECE_FILES
from ..tokenizer import Tokenizer
from .describe import describe_path
from .directory import CHECKSUMS_FILE, SCHEMA, TOKENIZER_FILE, file_sha256
from .load import name_and_shape_problems, parameter_shapes, storage_problem
from .quantized import packed_types
from .safetensors_file import INDEX_FILE, read_safetensors_directory
from .tensors import TensorRef

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyReport:
    """What a check of a model directory found.

    Args:
        directory: The directory.
        files: Files whose checksums were compared.
        tensors: Tensors read.
        parameters: Values that they stand for; of packed ones those that they were made from. 0 if there are problems.
        nbytes: Their bytes.
        problems: One line for everything that is wrong; empty if nothing is.
    """

    directory: Path
    files: int
    tensors: int
    parameters: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raise what was found.

        Raises:
            CheckpointError: If anything is wrong.
        """
        if self.problems:
            raise CheckpointError(f"{self.directory}: {'; '.join(self.problems)}")


def verify(directory: str | Path, *, on_progress: Progress | None = None) -> VerifyReport:
    """Check everything about a model directory that can be checked without running it.

    Every byte is read twice, once for the checksums and once for the values, a block at a time.

    Args:
        directory: The model directory.
        on_progress: Called with what is being checked, the bytes done and the bytes in all.

    Returns:
        The report; problems are collected, so that one run shows them all.

    Raises:
        CheckpointError: If there is no such directory.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    problems: list[str] = []
    listed = _listed_files(directory, problems)
    refs: dict[str, TensorRef] = {}
    try:
        refs = read_safetensors_directory(directory)
    except CheckpointError as error:
        problems.append(str(error))
    nbytes = sum(ref.nbytes for ref in refs.values())
    total = nbytes + sum((directory / n).stat().st_size for n in listed if (directory / n).is_file())
    done = 0

    def report(what: str, count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(what, done, total)

    problems += _checksum_problems(directory, listed, {ref.file.name for ref in refs.values()}, report)
    problems += _model_problems(directory, refs, listed)
    for ref in refs.values():
        bad = sum(int(np.count_nonzero(~np.isfinite(np.array(block)))) for block in _float_blocks(ref))
        if bad:
            problems.append(f"{ref.file.name}: tensor {ref.name!r} has {bad} values that are not finite")
        report(ref.name, ref.nbytes)
    # Packed ones are counted by the configuration, which a damaged directory may not have.
    parameters = sum(p.parameters for p in describe_path(directory).parts) if not problems else 0
    return VerifyReport(directory, len(listed), len(refs), parameters, nbytes, tuple(problems))


def _float_blocks(ref: TensorRef) -> Iterator[mx.array]:
    if ref.dtype in ("F32", "BF16", "F16"):
        yield from (block.astype(mx.float32, stream=mx.cpu) for block in ref.blocks())


def _listed_files(directory: Path, problems: list[str]) -> dict[str, str]:
    """Return file -> SHA-256 as ``checksums.json`` says."""
    path = directory / CHECKSUMS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        files = values["files"]
        if values["schema"] != SCHEMA or values["algorithm"] != "sha256":
            raise ValueError(f"schema {SCHEMA} with sha256 is needed")
        for name, digest in files.items():
            if Path(name).name != name or name == ".." or not isinstance(digest, str):
                raise ValueError(f"{name!r} is not the name of a file beside it")
    except FileNotFoundError:
        problems.append(f"{CHECKSUMS_FILE} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{CHECKSUMS_FILE} cannot be read: {error!r}")
    else:
        return dict(files)
    return {}


def _checksum_problems(
    directory: Path, listed: dict[str, str], weight_files: set[str], report: Callable[[str, int], None]
) -> list[str]:
    problems = []
    for name, digest in listed.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(path, lambda nbytes: report("checksums", nbytes)) != digest:
            problems.append(f"{name} does not have the checksum that {CHECKSUMS_FILE} gives: it was changed or damaged")
    needed = {CONFIG_FILE, *weight_files}
    if (directory / INDEX_FILE).is_file():
        needed.add(INDEX_FILE)
    if listed:
        problems += [f"{name} is not listed in {CHECKSUMS_FILE}" for name in sorted(needed - listed.keys())]
    return problems


def _model_problems(directory: Path, refs: dict[str, TensorRef], listed: dict[str, str]) -> list[str]:
    try:
        config = ModelConfig.load(directory)
    except ConfigError as error:
        return [str(error)]
    problems = []
    if refs:
        model = SpeechModel(config)
        wanted, packed = parameter_shapes(model), packed_types(model)
        problems += name_and_shape_problems({name: ref.shape for name, ref in refs.items()}, wanted)
        problems += [p for ref in refs.values() if (p := storage_problem(ref.name, ref.dtype, packed)) is not None]
    if config.decoder is None:
        if config.ctc_symbols is None and not any((directory / name).is_file() for name in PIECE_FILES):
            problems.append(f"{' or '.join(PIECE_FILES)} is missing: it says what the CTC symbols read as")
        return problems
    if listed and TOKENIZER_FILE not in listed:
        problems.append(f"{TOKENIZER_FILE} is not listed in {CHECKSUMS_FILE}")
    try:
        size = Tokenizer(directory / TOKENIZER_FILE).vocab_size
    except AsrError as error:
        problems.append(str(error))
    else:
        if not 0 < size <= config.decoder.vocab_size:
            problems.append(f"{TOKENIZER_FILE} has {size} tokens, the decoder {config.decoder.vocab_size}")
    return problems
