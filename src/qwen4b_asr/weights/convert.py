"""Make a model directory from the published parts: encoder, adaptor and language model.

Only one block of one tensor is in memory at a time, whatever the size of the files. The output
appears by one rename, so a conversion that is killed leaves nothing under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import FILE_NAME as CONFIG_FILE
from ..config import ModelConfig
from ..errors import ConfigError
from ..model import SpeechModel
from ..version import __version__
from .checkpoint import files_of
from .directory import (
    PROVENANCE_FILE,
    TOKENIZER_FILE,
    copy_durably,
    file_sha256,
    staged_directory,
    write_checksums,
    write_json,
)
from .keymap import Assignment
from .load import check_decoder_dtype, parameter_shapes
from .parts import MVN_FILE, Sources, Tensors, check_files, plan_parts
from .safetensors_file import DEFAULT_SHARD_BYTES, OutgoingTensor, write_safetensors
from .tensors import mlx_dtype

DTYPES = ("float32", "bfloat16")
# Kept beside the weights when the encoder's directory has them: the text of the CTC symbols.
CTC_FILES = ("tokens.json", "chn_jpn_yue_eng_ko_spectok.bpe.model")

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
    on_progress: Progress | None = None,
) -> ModelConfig:
    """Convert the published parts into one self-contained model directory.

    Args:
        encoder: Directory of SenseVoiceSmall: ``model.pt`` or ``model.safetensors``, ``am.mvn``, ``config.yaml``.
        adaptor: The adaptor's file, ``.pt`` or ``.safetensors``.
        llm: Directory of Qwen3 in Hugging Face's layout.
        output: The directory to make.
        dtype: Type to store the decoder in, ``float32`` or ``bfloat16``; by default the one that loses
            nothing. Encoder and adaptor are always stored as float32: they are small and sensitive.
        shard_bytes: Largest size of a file of weights.
        force: Whether an existing model directory is replaced.
        encoder_heads: Attention heads of the encoder, where its files do not tell.
        adaptor_heads: Attention heads of the adaptor; no file tells, 8 by default.
        on_progress: Called with the name of what was written or hashed, the bytes done and the bytes in all.

    Returns:
        The configuration of the new model.

    Raises:
        CheckpointError: If a file is missing, damaged, or the parts do not fit together.
        ConfigError: If the dtype is not one that works.
    """
    if dtype is not None:
        check_decoder_dtype(dtype, DTYPES)
    if shard_bytes < 1:
        raise ConfigError(f"shard size {shard_bytes}: must be at least 1 byte")
    encoder, adaptor, llm = (Path(path).expanduser() for path in (encoder, adaptor, llm))
    check_files(encoder, adaptor, llm)
    config, sources = plan_parts(encoder, adaptor, llm, encoder_heads, adaptor_heads)
    kinds = {ref.dtype for ref in sources.decoder.values()}
    decoder_dtype = {"float32": "F32", "bfloat16": "BF16", None: "BF16" if kinds == {"BF16"} else "F32"}[dtype]
    tensors = _outgoing(config, sources, decoder_dtype)
    used = {
        "encoder": [*files_of(sources.encoder), encoder / MVN_FILE],
        "adaptor": files_of(sources.adaptor),
        "llm": [*files_of(sources.decoder), llm / CONFIG_FILE, llm / TOKENIZER_FILE],
    }
    total = sum(tensor.nbytes for tensor in tensors)
    total += sum(path.stat().st_size for paths in used.values() for path in paths)
    done = 0

    def report(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(name, done, total)

    with staged_directory(Path(output), force=force) as stage:
        digests = {
            CONFIG_FILE: write_json(stage / CONFIG_FILE, config.to_dict()),
            TOKENIZER_FILE: copy_durably(llm / TOKENIZER_FILE, stage / TOKENIZER_FILE),
        }
        for name in CTC_FILES:
            if (encoder / name).is_file():
                digests[name] = copy_durably(encoder / name, stage / name)
        digests.update(write_safetensors(stage, tensors, shard_bytes=shard_bytes, on_tensor=report))
        digests[PROVENANCE_FILE] = write_json(
            stage / PROVENANCE_FILE, _provenance(used, sources, decoder_dtype, report)
        )
        write_checksums(stage, digests)
    return config


def _outgoing(config: ModelConfig, sources: Sources, decoder_dtype: str) -> list[OutgoingTensor]:
    """List what is to be written, in the model's order."""
    shapes = parameter_shapes(SpeechModel(config))
    vectors = {"frontend.cmvn_shift": sources.mvn.shift, "frontend.cmvn_scale": sources.mvn.scale}
    made: dict[str, Callable[[], Iterator[mx.array]]] = {}
    for name, values in vectors.items():
        made[name] = _once(values)
    for part, refs in (("audio_encoder", sources.encoder), ("adaptor", sources.adaptor), ("decoder", sources.decoder)):
        dtype = mlx_dtype(decoder_dtype if part == "decoder" else "F32")
        for assignment in sources.plans[part].assignments:
            made[f"{part}.{assignment.target}"] = _blocks(assignment, refs, dtype)
    return [
        OutgoingTensor(name, shape, decoder_dtype if name.startswith("decoder.") else "F32", made[name])
        for name, shape in shapes.items()
    ]


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
    used: dict[str, list[Path]], sources: Sources, decoder_dtype: str, report: Callable[[str, int], None]
) -> dict[str, Any]:
    def digest(path: Path) -> str:
        return file_sha256(path, lambda nbytes: report(f"checksum of {path.name}", nbytes))

    return {
        "schema": 1,
        "tool": f"qwen4b-asr {__version__}",
        "decoder_dtype": decoder_dtype,
        "sources": {part: {path.name: digest(path) for path in paths} for part, paths in used.items()},
        "dropped": {name: why for plan in sources.plans.values() for name, why in plan.dropped.items()},
    }
