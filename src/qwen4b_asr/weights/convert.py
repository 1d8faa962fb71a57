"""Make a model directory: from the 4B system's three parts, or from one published checkpoint.

Only one block of one tensor is in memory at a time, whatever the size of the files. The output
appears by one rename, so a conversion that is killed leaves nothing under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import FILE_NAME as CONFIG_FILE
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..model import SpeechModel
from ..version import __version__
from .checkpoint import files_of
from .conversion import Conversion, Tensors
from .directory import (
    PROVENANCE_FILE,
    copy_durably,
    file_sha256,
    staged_directory,
    write_checksums,
    write_json,
)
from .families import plan_checkpoint
from .keymap import Assignment
from .load import check_decoder_dtype, parameter_shapes
from .parts import check_files, plan_parts
from .quantize import quantize_conversion, quantized_tensors
from .quantized import packed_types, type_problem
from .recipes import Recipe
from .safetensors_file import DEFAULT_SHARD_BYTES, OutgoingTensor, write_safetensors
from .tensors import mlx_dtype

DTYPES = ("float32", "bfloat16")
_DECODER = "decoder."
_CODES = frozenset({"U32", "U8"})  # of quantised weights and scales, stored as they are

Progress = Callable[[str, int, int], None]


def convert(
    *,
    encoder: str | Path,
    adaptor: str | Path,
    llm: str | Path,
    output: str | Path,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    encoder_heads: int | None = None,
    adaptor_heads: int | None = None,
    recipe: Recipe | None = None,
    on_progress: Progress | None = None,
    on_done: Callable[[Conversion], None] | None = None,
) -> ModelConfig:
    """Convert the published parts into one self-contained model directory.

    Args:
        encoder: Directory of SenseVoiceSmall: ``model.pt`` or ``model.safetensors``, ``am.mvn``, ``config.yaml``.
        adaptor: The adaptor's file, ``.pt`` or ``.safetensors``.
        llm: Directory of Qwen3 in Hugging Face's layout.
        output: The directory to make.
        dtype: Type to store the decoder in, ``float32`` or ``bfloat16``; by default the one that loses
            nothing, and bfloat16 beside quantised matrices. Encoder and adaptor are always stored as float32: they
            are small and sensitive.
        shard_bytes: Largest size of a file of weights.
        force: Whether an existing model directory is replaced.
        encoder_heads: Attention heads of the encoder, where its files do not tell.
        adaptor_heads: Attention heads of the adaptor; no file tells, 8 by default.
        recipe: What to quantise, and how; from `recipes.read_recipe`. Nothing by default.
        on_progress: Called with the name of what was written or hashed, the bytes done and the bytes in all.
        on_done: Called, once the directory is in its place, with what was planned before anything was quantised;
            `fidelity.compare` takes it.

    Returns:
        The configuration of the new model.

    Raises:
        CheckpointError: If a file is missing, damaged, or the parts do not fit together.
        ConfigError: If the dtype is not one that works, or the recipe does not fit.
    """
    encoder, adaptor, llm = (Path(path).expanduser() for path in (encoder, adaptor, llm))
    check_files(encoder, adaptor, llm)
    conversion = plan_parts(encoder, adaptor, llm, encoder_heads, adaptor_heads)
    return write_conversion(
        conversion,
        output,
        dtype,
        recipe=recipe,
        shard_bytes=shard_bytes,
        force=force,
        on_progress=on_progress,
        on_done=on_done,
    )


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    lora: str = "keep",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    recipe: Recipe | None = None,
    on_progress: Progress | None = None,
    on_done: Callable[[Conversion], None] | None = None,
) -> ModelConfig:
    """Convert one published checkpoint that is a whole model: SenseVoiceSmall, Fun-ASR-Nano, Canary-Qwen.

    Args:
        checkpoint: Its directory, as downloaded; which it is, its tensors tell. Or a model directory, to be stored
            anew in another type or quantised.
        output: The directory to make.
        tokenizer: Directory of the language model's ``tokenizer.json``, where the checkpoint has none.
        dtype: Type to store the decoder in; as in `convert`.
        lora: ``keep`` adapters apart, or ``merge`` them into the weights.
        shard_bytes: Largest size of a file of weights.
        force: Whether an existing model directory is replaced.
        recipe: As in `convert`.
        on_progress: As in `convert`.
        on_done: As in `convert`.

    Returns:
        The configuration of the new model.

    Raises:
        CheckpointError: If a file is missing or damaged, or this is none of the known checkpoints.
        ConfigError: If an option is not one that works.
    """
    folder = None if tokenizer is None else Path(tokenizer).expanduser()
    conversion = plan_checkpoint(Path(checkpoint).expanduser(), folder, lora=lora)
    return write_conversion(
        conversion,
        output,
        dtype,
        recipe=recipe,
        shard_bytes=shard_bytes,
        force=force,
        on_progress=on_progress,
        on_done=on_done,
    )


def write_conversion(
    conversion: Conversion,
    output: str | Path,
    dtype: str | None = None,
    *,
    recipe: Recipe | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    on_progress: Progress | None = None,
    on_done: Callable[[Conversion], None] | None = None,
) -> ModelConfig:
    """Write what was planned; arguments and errors as in `convert`."""
    if dtype is not None:
        check_decoder_dtype(dtype, DTYPES)
    if shard_bytes < 1:
        raise ConfigError(f"shard size {shard_bytes}: must be at least 1 byte")
    original = conversion
    if recipe is not None:
        conversion = quantize_conversion(conversion, recipe)
    decoder_dtype = _decoder_dtype(conversion, dtype)
    tensors = _outgoing(conversion, decoder_dtype)
    used = {fill.part: [*files_of(fill.refs), *fill.files] for fill in conversion.fills}
    total = sum(tensor.nbytes for tensor in tensors)
    total += sum(path.stat().st_size for paths in used.values() for path in paths)
    done = 0

    def report(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(name, done, total)

    with staged_directory(Path(output), force=force) as stage:
        digests = {CONFIG_FILE: write_json(stage / CONFIG_FILE, conversion.config.to_dict())}
        for name, path in conversion.copies.items():
            digests[name] = copy_durably(path, stage / name)
        digests.update(write_safetensors(stage, tensors, shard_bytes=shard_bytes, on_tensor=report))
        digests[PROVENANCE_FILE] = write_json(
            stage / PROVENANCE_FILE, _provenance(conversion, used, decoder_dtype, report)
        )
        write_checksums(stage, digests)
    if on_done is not None:
        on_done(original)
    return conversion.config


def _decoder_dtype(conversion: Conversion, dtype: str | None) -> str:
    """Return the type that the decoder's numbers are stored in, unless another is asked: the one that loses nothing.

    Once matrices are packed, that is what it no longer is; their scales take half the bytes in bfloat16.
    """
    if dtype is not None:
        return {"float32": "F32", "bfloat16": "BF16"}[dtype]
    if any(stem.startswith(_DECODER) for stem in conversion.schemes):
        return "BF16"
    kinds = {
        fill.refs[name].dtype
        for fill in conversion.fills
        for assignment in fill.plan.assignments
        if f"{fill.prefix}{assignment.target}".startswith(_DECODER)
        for name in assignment.sources
    }
    return "BF16" if kinds - _CODES == {"BF16"} else "F32"


def _outgoing(conversion: Conversion, decoder_dtype: str) -> list[OutgoingTensor]:
    """List what is to be written, in the model's order."""
    model = SpeechModel(conversion.config)
    packed = packed_types(model)
    shapes = parameter_shapes(model)
    kinds = {name: packed.get(name, decoder_dtype if name.startswith(_DECODER) else "F32") for name in shapes}
    made: dict[str, OutgoingTensor] = {}

    def add(name: str, blocks: Callable[[], Iterator[mx.array]]) -> None:
        made[name] = OutgoingTensor(name, shapes[name], kinds[name], blocks)

    for name, values in conversion.vectors.items():
        add(name, _once(values))
    for fill in conversion.fills:
        for assignment in fill.plan.assignments:
            name = f"{fill.prefix}{assignment.target}"
            stem = name.removesuffix(".weight")
            scheme = conversion.schemes.get(stem) if stem != name else None
            file = fill.refs[assignment.sources[0]].file
            for source in assignment.sources:
                if problem := type_problem(name, fill.refs[source].dtype, {} if scheme is not None else packed):
                    raise CheckpointError(f"{file}: {problem}")
            if scheme is None:
                add(name, _blocks(assignment, fill.refs, mlx_dtype(kinds[name])))
                continue
            dense = _blocks(assignment, fill.refs, mx.float32)
            rows, groups = shapes[f"{stem}.scales"]
            shape = rows, groups * scheme.group_size
            made.update(
                (tensor.name, tensor)
                for tensor in quantized_tensors(stem, shape, scheme, dense, kinds[f"{stem}.scales"], file=str(file))
            )
    return [made[name] for name in shapes]


def _once(values: np.ndarray[Any, Any]) -> Callable[[], Iterator[mx.array]]:
    return lambda: iter([mx.array(values)])


def _blocks(assignment: Assignment, refs: Tensors, dtype: mx.Dtype) -> Callable[[], Iterator[mx.array]]:
    # Joining along the first axis, and moving an axis of size one, keep the row-major order of the
    # elements: a parameter is its sources' blocks one after another.
    def blocks() -> Iterator[mx.array]:
        for name in assignment.sources:
            for block in refs[name].blocks():
                yield block.astype(dtype, stream=mx.cpu)

    return blocks


def _provenance(
    conversion: Conversion, used: dict[str, list[Path]], decoder_dtype: str, report: Callable[[str, int], None]
) -> dict[str, Any]:
    def digest(path: Path) -> str:
        return file_sha256(path, lambda nbytes: report(f"checksum of {path.name}", nbytes))

    return {
        "schema": 1,
        "tool": f"qwen4b-asr {__version__}",
        "decoder_dtype": decoder_dtype,
        **({"quantization": asdict(conversion.recipe)} if conversion.recipe is not None else {}),
        **({"encoder_fingerprint": conversion.fingerprint} if conversion.fingerprint else {}),
        "sources": {part: {path.name: digest(path) for path in paths} for part, paths in used.items()},
        "dropped": {name: why for fill in conversion.fills for name, why in fill.plan.dropped.items()},
    }
