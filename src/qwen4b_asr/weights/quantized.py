"""Quantised source checkpoints: what their tensors say about each module, and in which types they are stored.

MLX's ``config.json`` gives one form for all modules and others for those that it names; whether a module is
quantised at all, only the presence of its scales tells. The result names every exception, so that a model
can be built from it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..decoder import DecoderConfig, Qwen3
from ..errors import CheckpointError
from ..quantization import Quantization, Scheme, quantizable
from .keymap import KeyMap, Shape
from .tensors import FLOAT_DTYPES, TensorRef, dtype_name

_CODES = ("weight", "scales", "biases")
_DECODER = "decoder."


def decoder_quantization(
    config: DecoderConfig, sources: Mapping[str, Shape], *, keymap: KeyMap, file: str, prefix: str = ""
) -> DecoderConfig:
    """Settle which modules of a decoder are quantised, and how.

    Args:
        config: The decoder as ``config.json`` describes it.
        sources: Name -> shape of the checkpoint's tensors.
        keymap: Which parameter each fills.
        file: The checkpoint, for messages.
        prefix: What the key map writes before the decoder's own names.

    Returns:
        The configuration with every exception named; unchanged where config.json speaks of no quantisation.

    Raises:
        CheckpointError: If tensors are quantised and config.json does not say how, or says it wrongly.
    """
    dense = Qwen3(replace(config, quantization=None, lora=None))
    parameters: Any = tree_flatten(dense.parameters())
    renamed = keymap.rename(sources, {prefix + name: tuple(array.shape) for name, array in parameters})
    # A layer that has an adapter beside it is called its base layer.
    shapes = {
        target.removeprefix(prefix).replace(".base_layer.", "."): sources[names[0]]
        for target, names in renamed.items()
        if target.startswith(prefix)
    }
    scaled = sorted(name for name in shapes if name.endswith(".scales"))
    declared = config.quantization
    if declared is None:
        if scaled:
            raise CheckpointError(f"{file}: {scaled[0]!r} is there, but config.json has no 'quantization'")
        return config
    modules = quantizable(dense)
    unknown = sorted(set(declared.overrides) - set(modules) - {"lm_head"})  # a tied head has no module of its own
    if unknown:
        raise CheckpointError(
            f"{file}: config.json's 'quantization' names {unknown[0]!r}, which this model does not have"
        )
    found = {path: _scheme(path, module, shapes, declared, file) for path, module in modules.items()}
    if not any(found.values()):
        raise CheckpointError(
            f"{file}: config.json says that the weights are quantised, but no tensor is named '*.scales'"
        )
    exceptions = {path: scheme for path, scheme in found.items() if scheme != declared.default}
    return replace(config, quantization=Quantization(declared.default, exceptions))


def settled_decoder(
    config: DecoderConfig, refs: Mapping[str, TensorRef], settings: Mapping[str, Any], *, keymap: KeyMap, file: str
) -> DecoderConfig:
    """Settle how the language model within a whole checkpoint is quantised; the other parts must not be.

    Args:
        config: The decoder, in which the settings beside the language model may have said it already.
        refs: The checkpoint's tensors.
        settings: The checkpoint's own ``config.json``, whose ``quantization`` names modules by their whole paths.
        keymap: Which parameter of the whole model each tensor fills.
        file: The checkpoint, for messages.

    Returns:
        The configuration with every exception named.

    Raises:
        CheckpointError: If another part is quantised, or the settings are wrong.
    """
    shapes = {name: ref.shape for name, ref in refs.items()}
    renamed = keymap.rename(shapes)
    others = {name for target, names in renamed.items() if target and not target.startswith(_DECODER) for name in names}
    for name in sorted(others):
        if refs[name].dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{refs[name].file}: tensor {name!r} is {refs[name].dtype}, but all weights but the language model's "
                "are floating point"
            )
    entry = settings.get("quantization") or settings.get("quantization_config")
    if config.quantization is None and entry:
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{file}: config.json's 'quantization' must be an object but is {entry!r}")
        try:
            declared = Quantization.from_mlx(entry)
        except ValueError as error:
            raise CheckpointError(f"{file}: config.json's 'quantization': {error}") from error
        config = replace(config, quantization=_within_decoder(declared, keymap))
    return decoder_quantization(config, shapes, keymap=keymap, file=file, prefix=_DECODER)


def _within_decoder(declared: Quantization, keymap: KeyMap) -> Quantization:
    """Give overrides the decoder's own paths, and leave out those of other parts and of a head that is tied."""
    overrides = {}
    for path, scheme in declared.overrides.items():
        (target,) = keymap.rename({f"{path}.weight": ()}) or ("",)
        if target.startswith(_DECODER):
            inside = target.removeprefix(_DECODER).removesuffix(".weight")
            overrides[inside.removesuffix(".base_layer")] = scheme
    return replace(declared, overrides=overrides)


def _scheme(
    path: str, module: nn.Module, shapes: Mapping[str, Shape], declared: Quantization, file: str
) -> Scheme | None:
    """Return the form of one module, None if it is not quantised."""
    have = {part: shapes[f"{path}.{part}"] for part in _CODES if f"{path}.{part}" in shapes}
    named = path in declared.overrides
    scheme = declared.scheme(path)
    if "scales" not in have:
        if named and scheme is not None:
            raise CheckpointError(
                f"{file}: config.json says that {path!r} is quantised, but there is no '{path}.scales'"
            )
        return None
    if named and scheme is None:
        raise CheckpointError(f"{file}: config.json says that {path!r} is not quantised, but there is '{path}.scales'")
    rows, columns = module.weight.shape
    if scheme is not None and _fits(scheme, rows, columns, have):
        return scheme
    shown = ", ".join(f"{part} {list(shape)}" for part, shape in have.items())
    problem = f"{file}: the tensors of {path!r}, a matrix {[rows, columns]}, do not fit {scheme}: {shown}"
    if named or not {"weight", "scales"} <= have.keys() or len(have["weight"]) != 2 or len(have["scales"]) != 2:
        raise CheckpointError(problem)
    try:  # mixed recipes of some versions are not spelled out in config.json
        scheme = Scheme.infer(columns, have["weight"][1], have["scales"][1], "biases" in have)
    except ValueError as error:
        raise CheckpointError(problem) from error
    if not _fits(scheme, rows, columns, have):
        raise CheckpointError(problem)
    return scheme


def _fits(scheme: Scheme, rows: int, columns: int, have: Mapping[str, Shape]) -> bool:
    return columns % scheme.group_size == 0 and scheme.shapes(rows, columns) == have


def packed_types(model: nn.Module) -> dict[str, str]:
    """Return the parameters that hold codes rather than numbers, each with the type it must be stored in.

    Types are named as in safetensors: ``U32`` for quantised weights, ``U8`` for scales of one byte. Such a tensor
    is never cast. Every other parameter is floating point.
    """
    flat: Any = tree_flatten(model.parameters())
    return {name: dtype_name(array.dtype) for name, array in flat if not mx.issubdtype(array.dtype, mx.floating)}


def type_problem(name: str, dtype: str, packed: Mapping[str, str]) -> str | None:
    """Return what is wrong with the type that a tensor is stored in, if anything.

    Args:
        name: The parameter that it fills.
        dtype: Its type, named as in safetensors.
        packed: From `packed_types`.
    """
    wanted = packed.get(name)
    if wanted is not None:
        return None if dtype == wanted else f"tensor {name!r} is stored as {dtype}, but its codes are {wanted}"
    return None if dtype in FLOAT_DTYPES else f"tensor {name!r} is stored as {dtype}, but weights are floating point"
