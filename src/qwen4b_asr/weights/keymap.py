"""Key maps: which tensor of a checkpoint fills which parameter, and how.

A key map is a JSON file in the ``weights`` folder with rules, tried in order; the first whose
pattern matches decides. In a pattern ``{i}`` stands for a number, ``{path}`` for any text,
``{kind:weight|bias}`` for one of the words, and ``(a|b|)`` for one of the texts that is not
kept. A rule has

* ``to`` with the names it caught filled in, and optionally ``transform``: ``conv1d`` turns
  torch's depthwise layout (D, 1, K) into MLX's (D, K, 1), ``conv2d`` (D, 1, H, W) into
  (D, H, W, 1), and ``pointwise`` a convolution of one tap (O, I, 1, ...) into a matrix (O, I);
* or ``to`` with ``part`` [n, of]: the tensor is the n-th of several joined along the first axis;
* or ``drop`` with the reason why the tensor is not needed; with ``unless`` only where the model
  has no parameter of that name.

`KeyMap.plan` makes sure that every tensor is used exactly once or dropped with a reason, and
every parameter is filled exactly once with its shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .manifest import read_schema
from .paths import weights_data

Shape = tuple[int, ...]
_KEYS = {"schema": int, "kind": str, "name": str, "target": str, "rules": list}
_TOKEN = re.compile(r"\{(?P<field>\w+)(?::(?P<words>[^{}]+))?\}|\((?P<either>[^()]*)\)")
_TRANSFORMS = ("identity", "conv1d", "conv2d", "pointwise")


@dataclass(frozen=True)
class Assignment:
    """How one parameter is filled.

    Args:
        target: The parameter.
        sources: The tensors joined along their first axis, usually one.
        transform: What it does to the shape; all keep the elements in their row-major order.
    """

    target: str
    sources: tuple[str, ...]
    transform: str


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor of a checkpoint: an assignment or a reason to drop it."""

    assignments: tuple[Assignment, ...]
    dropped: Mapping[str, str]


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    to: str | None
    transform: str
    part: tuple[int, int]
    drop: str | None
    unless: str | None


@dataclass(frozen=True)
class KeyMap:
    """The rules for one kind of checkpoint; ``target`` is the model's module that it fills, or ``model`` for all."""

    name: str
    target: str
    rules: tuple[_Rule, ...]

    def plan(self, sources: Mapping[str, Shape], parameters: Mapping[str, Shape], *, file: str) -> Plan:
        """Assign every tensor.

        Args:
            sources: Name -> shape of the checkpoint's tensors.
            parameters: Name -> shape of the parameters under ``target``, without its name.
            file: The checkpoint, for messages.

        Raises:
            CheckpointError: Naming the tensors that no rule knows, that would fill no parameter or
                fill one twice or with the wrong shape, and the parameters that nothing fills.
        """
        problems: list[str] = []
        dropped: dict[str, str] = {}
        parts: dict[str, dict[int, tuple[str, _Rule]]] = {}
        for name in sources:
            rule, target = self._match(name, parameters)
            if rule is None:
                problems.append(f"tensor {name!r} is not known")
            elif rule.drop is not None:
                dropped[name] = rule.drop
            elif target not in parameters:
                problems.append(f"tensor {name!r} would fill {target!r}, which this model does not have")
            else:
                taken = parts.setdefault(target, {})
                if rule.part[0] in taken or any(other.part[1] != rule.part[1] for _, other in taken.values()):
                    others = ", ".join(repr(source) for source, _ in taken.values())
                    problems.append(f"tensor {name!r} and {others} both fill {target!r}")
                else:
                    taken[rule.part[0]] = (name, rule)
        assignments = []
        for target, shape in parameters.items():
            taken = parts.get(target, {})
            count = next((rule.part[1] for _, rule in taken.values()), 1)
            if len(taken) != count:
                have = f" (of its {count} parts only {len(taken)} are there)" if taken else ""
                problems.append(f"nothing fills {target!r} {list(shape)}{have}")
                continue
            used = [taken[n] for n in range(count)]
            names = tuple(name for name, _ in used)
            problem = _shape_problem([sources[name] for name in names], shape, used[0][1].transform)
            if problem:
                problems.append(f"tensor {' + '.join(map(repr, names))} for {target!r}: {problem}")
            assignments.append(Assignment(target, names, used[0][1].transform))
        if problems:
            more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise CheckpointError(f"{file}: does not fit the {self.name} key map: {'; '.join(problems[:6])}{more}")
        return Plan(tuple(assignments), dropped)

    def rename(
        self, sources: Mapping[str, Shape], parameters: Mapping[str, Shape] | None = None
    ) -> dict[str, list[str]]:
        """Return target -> sources without any check, to read a checkpoint's sizes under known names.

        Rules that hold only for some models go by `parameters`, where they are given.
        """
        renamed: dict[str, list[str]] = {}
        for name in sources:
            rule, target = self._match(name, parameters or {})
            if rule is not None and target is not None:
                renamed.setdefault(target, []).append(name)
        return renamed

    def _match(self, name: str, parameters: Mapping[str, Shape]) -> tuple[_Rule, str] | tuple[None, str]:
        for rule in self.rules:
            match = rule.pattern.fullmatch(name)
            if match and not (rule.unless is not None and rule.unless in parameters):
                return rule, "" if rule.to is None else rule.to.format_map(match.groupdict())
        return None, ""


def _shape_problem(shapes: list[Shape], wanted: Shape, transform: str) -> str | None:
    if len(shapes) == 1:
        joined = shapes[0]
    elif any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        return f"shapes {', '.join(str(list(s)) for s in shapes)} cannot be joined"
    else:
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if transform == "conv1d":
        if len(joined) != 3 or joined[1] != 1:
            return f"shape {list(joined)} is not that of a depthwise convolution [D, 1, K]"
        joined = (joined[0], joined[2], 1)
    elif transform == "conv2d":
        if len(joined) != 4 or joined[1] != 1:
            return f"shape {list(joined)} is not that of a convolution of one input channel [D, 1, H, W]"
        joined = (joined[0], *joined[2:], 1)
    elif transform == "pointwise":
        if len(joined) < 3 or any(size != 1 for size in joined[2:]):
            return f"shape {list(joined)} is not that of a pointwise convolution [O, I, 1, ...]"
        joined = joined[:2]
    return None if joined == wanted else f"shape {list(joined)} instead of {list(wanted)}"


def load_keymap(name: str, folder: Path | None = None) -> KeyMap:
    """Read and check a key map of the package.

    Args:
        name: Its name, such as ``sensevoice``; the file is ``keymap-<name>.json``.
        folder: Where to look; the package's own data by default.

    Raises:
        ConfigError: If it is missing or breaks its schema.
    """
    path = (folder or weights_data()) / f"keymap-{name}.json"
    values = read_schema(path, "keymap", _KEYS)
    if values["name"] != name:
        raise ConfigError(f"{path}: name must be {name!r}")
    return KeyMap(name, values["target"], tuple(_rule(path, rule) for rule in values["rules"]))


def _rule(path: Path, values: Any) -> _Rule:
    def bad(why: str) -> ConfigError:
        return ConfigError(f"{path}: rule {values!r}: {why}")

    if not isinstance(values, dict) or not isinstance(values.get("from"), str):
        raise bad("must be an object with 'from'")
    if not values.keys() <= {"from", "to", "transform", "part", "drop", "unless"}:
        raise bad("has an unknown key")
    to, drop, unless = values.get("to"), values.get("drop"), values.get("unless")
    if (to is None) == (drop is None) or not all(
        value is None or isinstance(value, str) for value in (to, drop, unless)
    ):
        raise bad("must have either 'to' or 'drop', as text")
    transform = values.get("transform", "identity")
    if transform not in _TRANSFORMS:
        raise bad(f"transform must be one of {', '.join(_TRANSFORMS)}")
    part = values.get("part", [0, 1])
    if not (isinstance(part, list) and len(part) == 2 and all(type(n) is int for n in part) and 0 <= part[0] < part[1]):
        raise bad("part must be [n, of] with n below of")
    pattern = _compile(values["from"])
    if to is not None and set(re.findall(r"\{(\w+)\}", to)) - set(pattern.groupindex):
        raise bad("'to' names a field that 'from' does not have")
    return _Rule(pattern, to, transform, (part[0], part[1]), drop, unless)


def _compile(pattern: str) -> re.Pattern[str]:
    """Turn a rule's pattern into a regular expression."""
    result, position = "", 0
    for token in _TOKEN.finditer(pattern):
        result += re.escape(pattern[position : token.start()])
        position = token.end()
        if token["either"] is not None:
            result += f"(?:{'|'.join(re.escape(word) for word in token['either'].split('|'))})"
        elif token["words"] is not None:
            result += f"(?P<{token['field']}>{'|'.join(re.escape(word) for word in token['words'].split('|'))})"
        elif token["field"] == "path":
            result += "(?P<path>.+)"
        else:
            result += f"(?P<{token['field']}>0|[1-9][0-9]*)"
    return re.compile(result + re.escape(pattern[position:]), re.DOTALL)
