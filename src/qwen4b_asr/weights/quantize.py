"""Quantise matrices on their way into a file: some rows at a time, each row once.

A group never leaves its row, so that rows can be taken in blocks of any number and the codes are the same. The scales
are those of ``mlx.core.quantize``. It rounds codes against scales in float32 and the scales to the model's type only
then, which at 8 bits adds half as much error again as the codes have; here the codes of scales that are stored in
bfloat16 are rounded against the scales as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..model import SpeechModel
from ..quantization import Scheme
from .conversion import Conversion
from .load import parameter_shapes
from .recipes import PARTS, Recipe, quantized_config
from .safetensors_file import OutgoingTensor
from .tensors import mlx_dtype

_WORD_BITS = 32

Blocks = Callable[[], Iterable[mx.array]]
Arrays = Mapping[str, mx.array]


def quantize_conversion(conversion: Conversion, recipe: Recipe) -> Conversion:
    """Return a conversion that writes what a recipe says, planned from one that writes dense weights.

    Raises:
        ConfigError: If the recipe does not fit the model; see `recipes.quantized_config`.
    """
    config = quantized_config(conversion.config, recipe)
    before, after = (parameter_shapes(SpeechModel(c)) for c in (conversion.config, config))
    schemes: dict[str, Scheme] = {}
    for name in after.keys() - before.keys():
        stem, _, last = name.rpartition(".")
        if last == "scales":
            attribute, _, path = stem.partition(".")
            form = config.quantization(PARTS[attribute])
            # A layer with an adapter beside it has its own weight one name further down.
            scheme = None if form is None else form.scheme(path.removesuffix(".base_layer"))
            assert scheme is not None  # the model was built from this very form
            schemes[stem] = scheme
    return replace(conversion, config=config, schemes=schemes, recipe=recipe)


def quantize_rows(matrix: mx.array, scheme: Scheme, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Quantise rows (R, C).

    Args:
        matrix: Floating point, finite.
        scheme: The form.
        dtype: Type of scales and biases in affine mode.

    Returns:
        ``weight``, ``scales`` and, in affine mode, ``biases``.
    """
    matrix = matrix.astype(mx.float32, stream=mx.cpu)
    sizes: Any = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(matrix, **sizes, stream=mx.cpu), strict=False))
    if scheme.mode == "affine" and dtype != mx.float32:
        with mx.stream(mx.cpu):
            stored = {name: parts[name].astype(dtype) for name in ("scales", "biases")}
            scales, biases = (array.astype(mx.float32)[..., None] for array in stored.values())
            groups = matrix.reshape(*scales.shape[:-1], scheme.group_size)
            codes = mx.clip(mx.round((groups - biases) / scales), 0, (1 << scheme.bits) - 1)
            parts = {"weight": _pack(codes.astype(mx.uint32).reshape(matrix.shape), scheme.bits), **stored}
    mx.eval(parts)
    return parts


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (R, C), from the low bits up, into words (R, C * bits / 32); C is a multiple of 32."""
    rows, columns = codes.shape
    words: list[mx.array | None] = [None] * bits  # 32 codes fill as many words as they have bits
    for number, code in enumerate(mx.contiguous(codes.reshape(-1, _WORD_BITS).T)):
        word, shift = divmod(number * bits, _WORD_BITS)
        pieces = [(word, code << shift)]
        if shift + bits > _WORD_BITS:
            pieces.append((word + 1, code >> (_WORD_BITS - shift)))
        for place, piece in pieces:
            held = words[place]
            words[place] = piece if held is None else held | piece
    return mx.stack([word for word in words if word is not None], axis=1).reshape(rows, columns * bits // _WORD_BITS)


def quantized_tensors(
    stem: str, shape: tuple[int, int], scheme: Scheme, blocks: Blocks, dtype: str, *, file: str
) -> list[OutgoingTensor]:
    """List the tensors that a matrix (R, C) becomes.

    Args:
        stem: The module's path; the tensors are named ``STEM.weight``, ``STEM.scales``, ``STEM.biases``.
        shape: The matrix's.
        scheme: The form.
        blocks: Gives its elements in row-major order as flat arrays of any sizes.
        dtype: Type of the scales, named as in safetensors.
        file: Where it comes from, for messages.
    """
    rows, columns = shape
    matrix = _Matrix(stem, columns, scheme, blocks, mlx_dtype(dtype), file)
    return [
        OutgoingTensor(f"{stem}.{name}", size, "U32" if name == "weight" else dtype, matrix.giver(name))
        for name, size in scheme.shapes(rows, columns).items()
    ]


class _Matrix:
    """One matrix being quantised; asked for its parts one after another, as a file is written, it is read once."""

    def __init__(self, stem: str, columns: int, scheme: Scheme, blocks: Blocks, dtype: mx.Dtype, file: str) -> None:
        self.stem, self.columns, self.scheme = stem, columns, scheme
        self.blocks, self.dtype, self.file = blocks, dtype, file
        self._kept: dict[str, list[mx.array]] = {}

    def giver(self, name: str) -> Blocks:
        return lambda: self._give(name)

    def _give(self, name: str) -> Iterator[mx.array]:
        if name in self._kept:
            yield from self._kept.pop(name)
            return
        kept: dict[str, list[mx.array]] = {}
        for rows in whole_rows(self.blocks(), self.columns):
            if not bool(mx.all(mx.isfinite(rows, stream=mx.cpu), stream=mx.cpu)):
                raise CheckpointError(f"{self.file}: {self.stem}.weight has values that are not finite")
            parts = quantize_rows(rows, self.scheme, self.dtype)
            for other in parts.keys() - {name}:
                kept.setdefault(other, []).append(parts[other])
            yield parts[name].reshape(-1)
        # The codes are not kept: they are asked for first, and are most of the bytes.
        kept.pop("weight", None)
        self._kept = kept


def whole_rows(blocks: Iterable[mx.array], columns: int) -> Iterator[mx.array]:
    """Regroup flat arrays of any sizes, together (R, C) in row-major order, into blocks of whole rows."""
    rest: mx.array | None = None
    for block in blocks:
        flat = block.reshape(-1)
        if rest is not None:
            flat = mx.concatenate([rest, flat], stream=mx.cpu)
        whole = flat.size // columns * columns
        if whole:
            yield flat[:whole].reshape(-1, columns)
        rest = flat[whole:] if whole < flat.size else None
    if rest is not None:
        raise ValueError(f"[whole_rows] elements must fill rows of {columns} but got {rest.size} left over")
