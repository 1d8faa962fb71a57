"""Group-wise quantised weights in MLX's own layout: which modules have them, and in which form.

A quantised matrix (R, C) is three arrays: ``weight`` (R, C * bits / 32) of uint32, with the codes packed from the low
bits up, and ``scales`` and ``biases`` (R, C / group_size). The code q of an element stands for ``scale * q + bias``.
The floating-point modes (mxfp4, mxfp8, nvfp4) keep one byte per group as scale and no biases.
Source: MLX's documentation of ``mlx.core.quantize``; the OCP microscaling formats specification, version 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Group sizes and bits that MLX has code for, the default of each first.
_FORMS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 1, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
_KEYS = ("group_size", "bits", "mode")
_PACK_BITS = 32
UNPACKED = 6 << 20
"""Numbers of a quantised matrix that `UnpackingLinear` has unpacked at once."""

_FEW_ROWS = 6  # 2560 x 9728 at 4 bits on one core: 28 ms a row, or 150 ms and 1 ms a row


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantised.

    Args:
        group_size: Elements of a row that share a scale.
        bits: Bits per element.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    """

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in _FORMS:
            raise ValueError(f"[Scheme] mode must be one of {', '.join(_FORMS)} but got {self.mode!r}")
        for name, known in zip(_KEYS, _FORMS[self.mode], strict=False):
            value = getattr(self, name)
            if type(value) is not int or value not in known:
                wanted = ", ".join(map(str, sorted(known)))
                raise ValueError(f"[Scheme] {name} of mode {self.mode} must be one of {wanted} but got {value!r}")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Scheme:
        """Build a scheme from JSON values; what they do not say is the mode's default.

        Raises:
            ValueError: On an unknown key or a form that MLX does not have.
        """
        unknown = sorted(set(values) - set(_KEYS))
        if unknown:
            raise ValueError(f"[Scheme] keys must be among {', '.join(_KEYS)} but got {unknown}")
        mode = values.get("mode") or "affine"
        if not isinstance(mode, str) or mode not in _FORMS:
            raise ValueError(f"[Scheme] mode must be one of {', '.join(_FORMS)} but got {mode!r}")
        groups, bits = _FORMS[mode]
        return cls(values.get("group_size") or groups[0], values.get("bits") or bits[0], mode)

    @classmethod
    def infer(cls, columns: int, packed: int, groups: int, has_biases: bool) -> Scheme:
        """Return the only scheme that gives arrays of these widths.

        Args:
            columns: Width of the matrix.
            packed: Width of ``weight``.
            groups: Width of ``scales``.
            has_biases: Whether there are biases.

        Raises:
            ValueError: If none does.
        """
        for mode, (group_sizes, bits) in _FORMS.items():
            if (mode == "affine") != has_biases:
                continue
            for size in group_sizes:
                for count in bits:
                    if size * groups == columns and count * columns == packed * _PACK_BITS:
                        return cls(size, count, mode)
        raise ValueError(f"[Scheme] no form of {columns} columns is {packed} words and {groups} groups wide")

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """Return the shapes of ``weight``, ``scales`` and, in affine mode, ``biases`` of a matrix (rows, columns).

        Raises:
            ValueError: If the groups do not divide a row.
        """
        if columns % self.group_size:
            raise ValueError(f"[Scheme] group_size {self.group_size} must divide the row but got {columns} columns")
        shapes = {"weight": (rows, columns * self.bits // _PACK_BITS), "scales": (rows, columns // self.group_size)}
        if self.mode == "affine":
            shapes["biases"] = shapes["scales"]
        return shapes


@dataclass(frozen=True)
class Quantization:
    """Which matrices of a model are quantised, and how.

    Args:
        default: The form of every linear layer and embedding that `overrides` does not name.
        overrides: Module path -> another form, or None for a matrix that is not quantised.
    """

    default: Scheme = field(default_factory=Scheme)
    overrides: Mapping[str, Scheme | None] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.default, Mapping):
            object.__setattr__(self, "default", Scheme.read(self.default))
        object.__setattr__(
            self,
            "overrides",
            {path: Scheme.read(s) if isinstance(s, Mapping) else s for path, s in sorted(self.overrides.items())},
        )

    @classmethod
    def from_mlx(cls, values: Mapping[str, Any]) -> Quantization:
        """Read the entry ``quantization`` of an MLX checkpoint's config.json.

        Beside ``group_size``, ``bits`` and ``mode`` it may name modules: an object for another form, false for
        none, true for the default. A module that it does not name need not be quantised either: only the
        checkpoint's tensors tell.

        Raises:
            ValueError: If it is not such an entry.
        """
        method = values.get("quant_method")
        if method is not None:
            raise ValueError(f"[Quantization] weights must be quantised by MLX but got quant_method {method!r}")
        default = Scheme.read({key: values[key] for key in _KEYS if key in values})
        overrides: dict[str, Scheme | None] = {}
        for path, value in values.items():
            if path in _KEYS or value is True:
                continue
            if value is not False and not isinstance(value, Mapping):
                raise ValueError(f"[Quantization] the entry of {path!r} must be an object or a bool but got {value!r}")
            try:
                overrides[path] = None if value is False else Scheme.read(value)
            except ValueError as error:
                raise ValueError(f"[Quantization] the entry of {path!r} is wrong: {error}") from error
        return cls(default, overrides)

    def scheme(self, path: str) -> Scheme | None:
        """Return the form of a module, None if it is not quantised."""
        return self.overrides.get(path, self.default)


def unpack(weight: mx.array, scales: mx.array, biases: mx.array, scheme: Scheme) -> mx.array:
    """Return the matrix (R, C) that affine codes stand for, as ``mlx.core.dequantize`` does.

    On a CPU that function goes code by code; a handful of operations on whole arrays takes half its time at 4 and 8
    bits, and a tenth at 6.

    Args:
        weight: Codes (R, C * bits / 32).
        scales: (R, C / group_size), floating point.
        biases: Likewise.
        scheme: The form.
    """
    rows, groups = scales.shape
    # As many bytes as a code has bits hold eight codes.
    octets = weight.view(mx.uint8).reshape(-1, scheme.bits)
    codes = []
    for position in range(0, 8 * scheme.bits, scheme.bits):
        byte, shift = divmod(position, 8)
        code = octets[:, byte] >> shift
        if shift + scheme.bits > 8:
            code = code | (octets[:, byte + 1] << (8 - shift))
        codes.append(code & ((1 << scheme.bits) - 1))
    numbers = mx.stack(codes, axis=-1).reshape(rows, groups, scheme.group_size).astype(scales.dtype)
    return (numbers * scales[..., None] + biases[..., None]).reshape(rows, groups * scheme.group_size)


class UnpackingLinear(nn.QuantizedLinear):
    """A quantised linear layer that unpacks its matrix for many rows, and multiplies codes for few.

    MLX's product of codes on a CPU costs as much for each row as for the first; unpacking costs as much as six rows,
    and the dense product little more. Its outputs depend on the number of rows by rounding, as those of any dense layer
    on a CPU do.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., C) to (..., R)."""
        if x.size <= _FEW_ROWS * x.shape[-1]:
            y: mx.array = super().__call__(x)
            return y
        y = self.multiply_unpacked(x, Scheme(self.group_size, self.bits, self.mode))
        return y + self.bias if "bias" in self else y

    def multiply_unpacked(self, x: mx.array, scheme: Scheme) -> mx.array:
        """Map (..., C) to (..., R) by the matrix that the codes stand for, without the bias.

        It is unpacked some rows at a time: all of Qwen3-8B's head would be 2.5 GB, and larger blocks are no faster.
        """
        assert self.biases is not None  # of affine mode
        step = max(1, UNPACKED // x.shape[-1])
        outputs: list[mx.array] = []
        for first in range(0, len(self.weight), step):
            codes = [array[first : first + step] for array in (self.weight, self.scales, self.biases)]
            if outputs:  # one after another, or all would be there at once
                codes = mx.depends(codes, [mx.stop_gradient(outputs[-1])])
            weight, scales, biases = codes
            outputs.append(self.multiply_block(x, unpack(weight, scales, biases, scheme)))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def multiply_block(self, x: mx.array, weight: mx.array) -> mx.array:
        """Map (..., C) by rows (N, C) of the matrix to (..., N)."""
        return x @ weight.T


def unpack_for_many_rows(model: nn.Module) -> None:
    """Have a model's quantised layers unpack for many rows, in place: those in affine mode whose scales are float32.

    It is for models on a CPU; a GPU's own products of codes are fast at any number of rows.
    """
    for module in model.modules():
        if type(module) is nn.QuantizedLinear and module.mode == "affine" and module.scales.dtype == mx.float32:
            module.__class__ = UnpackingLinear  # the arrays may be yet to be read: nothing is made anew


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and embeddings of a model by path."""
    return {path: m for path, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}


def quantize_modules(model: nn.Module, quantization: Quantization) -> None:
    """Replace linear layers and embeddings by their quantised forms, in place.

    The weights are quantised as they are; in a model that is yet to be filled nothing is computed.

    Args:
        model: The model.
        quantization: Which modules, and how.

    Raises:
        ValueError: If an override names no such module, or the groups do not divide a row.
    """
    modules = quantizable(model)
    unknown = sorted(set(quantization.overrides) - set(modules))
    if unknown:
        raise ValueError(f"[Quantization] overrides must name linear layers or embeddings but got {unknown[:4]}")
    for path, module in modules.items():
        scheme = quantization.scheme(path)
        if scheme is None:
            continue
        try:
            scheme.shapes(*module.weight.shape)
        except ValueError as error:
            raise ValueError(f"[Quantization] {path}: {error}") from error

    def arguments(path: str, module: nn.Module) -> bool | dict[str, Any]:
        scheme = quantization.scheme(path) if path in modules else None
        return False if scheme is None else {key: getattr(scheme, key) for key in _KEYS}

    nn.quantize(model, class_predicate=arguments)
