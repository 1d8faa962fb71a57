"""Recipes of quantisation: which matrices of a model get how many bits, and what the model then takes.

A recipe is a list of rules for each part; of the rules that name a module the last counts. Three things are never
quantised by a named recipe, whatever its bits:

* what is no matrix: norms, biases, the front end's filters, convolutions and FSMN taps. They are a thousandth of the
  bytes, and every row passes through them.
* the CTC heads, the query frames and the encoders' first steps (``pre_encode``). A head scores a frame by itself, so an
  error there is an error in the text or in a time, with no language model behind it to mend it.
* the embedding below 8 bits, unless the recipe's name ends in ``-all``. It is the output matrix too where the head is
  tied; each row is one token's, so that an error in it is not averaged out over others.

A matrix whose rows no group divides stays as it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import ModelConfig
from ..errors import ConfigError
from ..model import SpeechModel
from ..quantization import Quantization, Scheme, quantizable
from .tensors import item_size

PARTS = {"frontend": "frontend", "audio_encoder": "encoder", "adaptor": "adaptor", "decoder": "decoder", "ctc": "ctc"}
"""Attribute of `SpeechModel` -> place in `ModelConfig`."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SMALLER = (128, 64, 32)


@dataclass(frozen=True)
class Rule:
    """What happens to some modules.

    Args:
        modules: Pattern of their paths within the part; ``*`` stands for anything: ``*.v_proj``.
        bits: Bits per element; None leaves them as they are.
        group_size: Elements that share a scale; None is the mode's own, 64 in affine mode. Where it does not divide
            a row, the next smaller one that does is taken.
        mode: See `quantization.Scheme`.
        layers: Only modules within these layers; negative ones count from the last, -1.
    """

    modules: str
    bits: int | None
    group_size: int | None = None
    mode: str = "affine"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not all(type(layer) is int for layer in self.layers):
                raise ValueError(f"[Rule] layers must be integers but got {self.layers!r}")
        if not isinstance(self.modules, str) or not self.modules:
            raise ValueError(f"[Rule] modules must be a pattern of paths but got {self.modules!r}")
        if self.bits is not None:
            self.scheme()

    def scheme(self) -> Scheme | None:
        """Return the form that the rule gives."""
        if self.bits is None:
            return None
        return Scheme.read({"bits": self.bits, "group_size": self.group_size, "mode": self.mode})

    def names(self, path: str, depth: int) -> bool:
        """Return whether the rule is about a module of a part with `depth` layers."""
        if not fnmatchcase(path, self.modules):
            return False
        if self.layers is None:
            return True
        layer = _LAYER.search(path)
        return layer is not None and int(layer[1]) in {n + depth if n < 0 else n for n in self.layers}


@dataclass(frozen=True)
class Recipe:
    """Rules by part; a part without any stays as it is.

    Args:
        name: What the provenance calls it.
        decoder: Rules for the language model.
        encoder: Rules for the audio encoder.
        adaptor: Rules for the adaptor.
    """

    name: str
    decoder: tuple[Rule, ...] = ()
    encoder: tuple[Rule, ...] = ()
    adaptor: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for part in ("decoder", "encoder", "adaptor"):
            rules = tuple(Rule(**rule) if isinstance(rule, Mapping) else rule for rule in getattr(self, part))
            object.__setattr__(self, part, rules)


_TABLE = ("model.embed_tokens", "lm_head")


def _plain(bits: int, table: int = 8) -> tuple[Rule, ...]:
    """The same bits everywhere, others for the embedding and the head."""
    return (Rule("*", bits), *(Rule(path, table) for path in _TABLE))


def _mixed(bits: int, more: int) -> tuple[Rule, ...]:
    """More bits where errors weigh most: what is added to the residual, and the layers at both ends."""
    return (
        Rule("*", bits),
        Rule("*.v_proj", more),
        Rule("*.down_proj", more),
        Rule("*", more, layers=(0, 1, -2, -1)),
        *(Rule(path, 8) for path in _TABLE),
    )


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("8", _plain(8)),
        Recipe("6", _plain(6)),
        Recipe("5", _plain(5)),
        Recipe("4", _plain(4)),
        Recipe("6-all", _plain(6, 6)),
        Recipe("4-all", _plain(4, 4)),
        Recipe("mixed-4-6", _mixed(4, 6)),
        Recipe("mixed-4-8", _mixed(4, 8)),
        Recipe("mixed-3-6", _mixed(3, 6)),
        Recipe("mxfp8", (Rule("*", 8, mode="mxfp8"), *(Rule(path, 8) for path in _TABLE))),
        Recipe("mxfp4", (Rule("*", 4, mode="mxfp4"), *(Rule(path, 8) for path in _TABLE))),
    )
}
"""Recipes by name, for the language model alone."""


def encoder_rules(bits: int) -> tuple[Rule, ...]:
    """Rules for an audio encoder of any family: its layers' matrices, and nothing at either end."""
    kept = ("*ctc_lo", "embed", "pre_encode.*")
    return (Rule("*", bits), *(Rule(path, None) for path in kept))


def adaptor_rules(bits: int) -> tuple[Rule, ...]:
    """Rules for an adaptor of any family: all its linear layers (query, key and value of the 4B's are none)."""
    return (Rule("*", bits),)


def read_recipe(
    name: str | None, *, group_size: int | None = None, encoder: int | None = None, adaptor: int | None = None
) -> Recipe:
    """Look a recipe up, or read one of your own.

    Args:
        name: A key of `RECIPES`, or a JSON file ``{"decoder": [{"modules": "*", "bits": 4}, ...], "encoder": ...}``
            with the fields of `Rule`; None for no rules for the language model.
        group_size: Elements that share a scale, for every affine rule.
        encoder: Bits for the audio encoder, in place of the recipe's rules for it.
        adaptor: Bits for the adaptor, likewise.

    Raises:
        ConfigError: If there is no such recipe, or a rule is none.
    """
    recipe = Recipe("") if name is None else RECIPES.get(name)
    try:
        if recipe is None:
            assert name is not None
            recipe = _read_file(Path(name).expanduser())
        more: Any = {
            part: rules(bits)
            for part, rules, bits in (("encoder", encoder_rules, encoder), ("adaptor", adaptor_rules, adaptor))
            if bits is not None
        }
        words = [recipe.name] if recipe.name else []
        words += [] if group_size is None else [f"g{group_size}"]
        words += [f"{part}{bits}" for part, bits in (("encoder", encoder), ("adaptor", adaptor)) if bits is not None]
        recipe = replace(recipe, name="-".join(words), **more)
        if group_size is not None:
            sized: Any = {part: _sized(getattr(recipe, part), group_size) for part in ("decoder", "encoder", "adaptor")}
            recipe = replace(recipe, **sized)
    except ValueError as error:
        raise ConfigError(f"quantisation {name or ''}: {error}") from error
    return recipe


def _sized(rules: Sequence[Rule], group_size: int) -> tuple[Rule, ...]:
    return tuple(replace(rule, group_size=group_size) if rule.mode == "affine" else rule for rule in rules)


def _read_file(path: Path) -> Recipe:
    known = ", ".join(RECIPES)
    if path.suffix != ".json":
        raise ConfigError(f"quantisation {str(path)!r}: choose one of {known}, or give a recipe's .json file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe ({error})") from error
    try:
        names = {f.name for f in fields(Recipe)}
        if not isinstance(values, dict) or not values.keys() <= names:
            raise ValueError(f"[Recipe] must be an object with some of {', '.join(sorted(names))}")
        return Recipe(**{"name": path.stem, **values})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def quantized_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """Return the configuration of a model that a recipe has been applied to.

    Raises:
        ConfigError: If the model lacks a part that the recipe has rules for, the part is quantised already, a rule
            names no module, or nothing of a part can be quantised.
    """
    dense = SpeechModel(config)
    forms: dict[str, Quantization] = {}
    for attribute, part in PARTS.items():
        rules: tuple[Rule, ...] = getattr(recipe, part, ())
        if not rules:
            continue
        if attribute not in dense:
            raise ConfigError(f"{config.name}: has no {part} to quantise")
        if config.quantization(part) is not None:
            raise ConfigError(
                f"{config.name}: its {part} is quantised already; quantise the original instead: errors of two "
                "roundings add up"
            )
        forms[part] = _apply(rules, _dense_modules(config, dense, attribute), f"{config.name}: {part}")
    return config.with_quantization(forms)


def _dense_modules(config: ModelConfig, model: SpeechModel, attribute: str) -> dict[str, nn.Module]:
    if attribute == "decoder" and config.decoder is not None and config.decoder.lora is not None:
        # Adapters are small and stay as they are; without them the layers have their plain paths.
        return quantizable(SpeechModel(replace(config, decoder=replace(config.decoder, lora=None))).decoder)
    return quantizable(model[attribute])


def _apply(rules: Sequence[Rule], modules: Mapping[str, nn.Module], what: str) -> Quantization:
    depth = max((int(layer[1]) + 1 for path in modules if (layer := _LAYER.search(path))), default=0)
    found: dict[str, Scheme | None] = {}
    for path, module in modules.items():
        rule = next((rule for rule in reversed(rules) if rule.names(path, depth)), None)
        scheme = None if rule is None else rule.scheme()
        found[path] = None if scheme is None else _fitting(scheme, module.weight.shape[1])
    counts = Counter(scheme for scheme in found.values() if scheme is not None)
    if not counts:
        raise ConfigError(
            f"{what}: the recipe quantises none of its {len(modules)} matrices: no rule names one, or no group divides "
            "its rows"
        )
    default = counts.most_common(1)[0][0]
    return Quantization(default, {path: scheme for path, scheme in found.items() if scheme != default})


def _fitting(scheme: Scheme, columns: int) -> Scheme | None:
    """Return the scheme with the largest groups, at most as large as asked, that divide a row; None if none do."""
    if columns % scheme.group_size == 0:
        return scheme
    sizes = [size for size in _SMALLER if scheme.mode == "affine" and size < scheme.group_size and columns % size == 0]
    return replace(scheme, group_size=sizes[0]) if sizes else None


def stored_bytes(
    config: ModelConfig, quantization: Quantization | None = None, decoder_dtype: str = "BF16"
) -> dict[str, int]:
    """Return the bytes that a model's weights take, by part, from its configuration alone.

    The same numbers hold in memory, where the decoder is loaded in `decoder_dtype`.

    Args:
        config: The model's; `quantized_config` applies a recipe to it.
        quantization: A form of the decoder to take in place of the configuration's own.
        decoder_dtype: Type of the decoder's numbers that are not packed, scales included: ``BF16`` or ``F32``, also as
            ``bfloat16`` and ``float32``. Every other part is float32.

    Returns:
        Place in `ModelConfig` (``frontend``, ``encoder``, ``adaptor``, ``decoder``, ``ctc``) -> bytes; only parts that
        the model has.
    """
    if quantization is not None:
        config = config.with_quantization({"decoder": quantization})
    width = item_size({"bfloat16": "BF16", "float32": "F32"}.get(decoder_dtype, decoder_dtype))
    flat: Any = tree_flatten(SpeechModel(config).parameters())  # lazy arrays: nothing is computed
    sizes: dict[str, int] = {}
    for name, array in flat:
        attribute = name.partition(".")[0]
        number = mx.issubdtype(array.dtype, mx.floating)
        each = array.itemsize if not number else width if attribute == "decoder" else 4
        part = PARTS[attribute]
        sizes[part] = sizes.get(part, 0) + prod(array.shape) * each
    return sizes


def decoder_bytes(config: ModelConfig, recipe: Recipe | str | None = None, decoder_dtype: str = "BF16") -> int:
    """Return the bytes of a model's decoder under a recipe, 0 if it has none; without a recipe, as it is."""
    if recipe is not None:
        recipe = read_recipe(recipe) if isinstance(recipe, str) else recipe
        config = quantized_config(config, replace(recipe, encoder=(), adaptor=()))
    return stored_bytes(config, decoder_dtype=decoder_dtype).get("decoder", 0)
