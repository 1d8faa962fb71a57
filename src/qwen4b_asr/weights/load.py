"""Fill a model from a converted directory: strictly by name and shape, lazily, in explicit types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..fastconformer import FastConformerEncoder
from ..model import SpeechModel
from ..quantization import unpack_for_many_rows
from .checkpoint import files_of
from .quantized import packed_types, type_problem
from .safetensors_file import read_safetensors_directory
from .tensors import FLOAT_DTYPES

DTYPES = ("auto", "float32", "bfloat16")
_DECODER = "decoder."


def load_model(directory: str | Path, *, dtype: str = "auto") -> tuple[SpeechModel, ModelConfig]:
    """Build the model that a directory describes and fill it with its weights.

    Nothing is read but headers: each tensor is an MLX array that reads its bytes from the file when it
    is first evaluated, so a stage that is never run costs no memory, and no tensor is ever held twice.
    (MLX reads into its own memory rather than mapping the file.)

    Args:
        directory: A directory that ``qwen4b-asr convert`` wrote.
        dtype: The decoder's type. ``auto`` is float32 on a CPU, where MLX computes it fastest, and
            bfloat16 on Metal and CUDA; or ``float32``, ``bfloat16``. Front end, encoder and adaptor
            are always float32.

    Returns:
        The model and its configuration.

    Raises:
        CheckpointError: If a tensor is missing, unknown, of the wrong shape, or a file is damaged.
        ConfigError: If config.json is missing or wrong, or the dtype is not one that works.
    """
    directory = Path(directory)
    decoder_dtype = resolve_dtype(dtype)
    config = ModelConfig.load(directory)
    model = SpeechModel(config)
    refs = read_safetensors_directory(directory)
    check_names_and_shapes(
        {name: ref.shape for name, ref in refs.items()}, parameter_shapes(model), source=str(directory)
    )
    packed = packed_types(model)
    for ref in refs.values():
        problem = storage_problem(ref.name, ref.dtype, packed)
        if problem:
            raise CheckpointError(f"{ref.file}: {problem}")
    weights: list[tuple[str, mx.array]] = []
    for file in files_of(refs):
        arrays = mx.load(str(file))
        if not isinstance(arrays, dict):
            raise CheckpointError(f"{file}: MLX finds no named tensors in it")
        for name, array in arrays.items():
            wanted = decoder_dtype if name.startswith(_DECODER) else mx.float32
            kept = name in packed or array.dtype == wanted
            weights.append((name, array if kept else array.astype(wanted)))
    model.update(tree_unflatten(weights))
    model.eval()
    if mx.default_device().type == mx.DeviceType.cpu:
        unpack_for_many_rows(model)
    if isinstance(model.audio_encoder, FastConformerEncoder):
        model.audio_encoder.fold_batch_norms()
    return model, config


def check_decoder_dtype(dtype: str, allowed: tuple[str, ...]) -> None:
    """Refuse a decoder type that is not among `allowed`.

    Raises:
        ConfigError: With the reason, where there is one.
    """
    if dtype == "float16":
        raise ConfigError(
            "dtype float16: Qwen3's activations exceed float16's range (65504) and the text becomes '!!!!!'; "
            "use bfloat16 or float32"
        )
    if dtype not in allowed:
        raise ConfigError(f"dtype {dtype!r}: choose one of {', '.join(allowed)}")


def resolve_dtype(dtype: str) -> mx.Dtype:
    """Return the decoder's type on the default device.

    Raises:
        ConfigError: If the type is not one that works, with the reason.
    """
    check_decoder_dtype(dtype, DTYPES)
    if dtype == "auto":
        dtype = "bfloat16" if mx.default_device().type == mx.DeviceType.gpu else "float32"
    return mx.bfloat16 if dtype == "bfloat16" else mx.float32


def parameter_shapes(model: SpeechModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name; none is evaluated, so a full-size model costs nothing."""
    flat: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in flat}


def check_names_and_shapes(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], *, source: str
) -> None:
    """Compare tensors with parameters; `nn.Module.update` alone would take wrong shapes silently.

    Raises:
        CheckpointError: Naming the first tensors that are missing, unknown or misshapen.
    """
    problems = name_and_shape_problems(found, wanted)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: the tensors do not fit config.json: {'; '.join(problems[:8])}{more}")


def name_and_shape_problems(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """Return one line for every tensor that is missing, unknown or misshapen."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(shape)} instead of {list(wanted[name])}"
        for name, shape in found.items()
        if name in wanted and shape != wanted[name]
    ]
    return problems


def storage_problem(name: str, dtype: str, packed: Mapping[str, str]) -> str | None:
    """Return what is wrong with the type that a tensor is stored in, if anything.

    Args:
        name: The parameter that it fills.
        dtype: Its type, named as in safetensors.
        packed: From `packed_types`.
    """
    if name in packed:
        return type_problem(name, dtype, packed)
    if dtype not in FLOAT_DTYPES - {"F64"}:
        return f"tensor {name!r} is stored as {dtype}, but weights are F32, BF16 or F16"
    if dtype == "F16" and name.startswith(_DECODER):
        return f"tensor {name!r} is stored as F16, whose range Qwen3 exceeds; convert it again to bfloat16 or float32"
    return None
