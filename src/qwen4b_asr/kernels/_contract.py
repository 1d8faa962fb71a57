"""The contract that heads every Metal source: parsed once, checked at every launch.

A kernel reads raw memory. A shape or a dtype that it does not expect is no exception there but a wrong answer, so
what a wrapper hands over is held against the written contract first. `kernels/README.md` shows the format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import mlx.core as mx

from ._expressions import Expression, ExpressionError

DTYPES = {
    name: getattr(mx, f"{name}_" if name == "bool" else name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32"),
    )
}
"""The element types that a kernel can have, by the name that a contract gives them."""

MAX_THREADS = 1024
"""Threads in a threadgroup, on Apple's GPUs and on NVIDIA's."""

MAX_THREADGROUP_BYTES = 32768
"""Threadgroup memory of one threadgroup on Apple's GPUs."""

Template = Sequence[tuple[str, Any]]
"""Template arguments in the contract's order: name, and an int, a bool or an `mx.Dtype`."""

_T = TypeVar("_T")

_SECTIONS = (
    *("kernel", "computes", "inputs", "outputs", "template"),
    *("grid", "threadgroup", "threadgroup_memory", "math", "vjp"),
)
_LISTS = ("inputs", "outputs", "template")
_OPTIONAL = ("template", "threadgroup_memory", "math")
_SECTION = re.compile(r"(\w+):(?:\s+(.*))?$")
_ARRAY = re.compile(r"(?P<name>[A-Za-z]\w*)\s*\((?P<shape>.*)\)\s+(?P<dtype>\w+)$")
_ARGUMENT = re.compile(r"(?P<name>[A-Za-z]\w*)\s+(?P<kind>dtype|int|bool)(?:\s+(?P<choices>\S+))?$")
_THREAD_LIMIT = re.compile(r"<=\s*(\d+)")


class ContractError(ValueError):
    """The contract of a kernel source cannot be understood; a defect of the source, not of a call."""


@dataclass(frozen=True)
class ArraySpec:
    """One input or output.

    Attributes:
        name: Its name in the kernel's body.
        shape: Length of each axis, in shape letters and numbers; empty for a 0-d array.
        dtype: Name of an element type, or of a template argument that is one.
        about: What it is; empty where the name says it.
    """

    name: str
    shape: tuple[Expression, ...]
    dtype: str
    about: str


@dataclass(frozen=True)
class TemplateSpec:
    """One template argument.

    Attributes:
        name: Its name in the kernel's body.
        kind: ``dtype``, ``int`` or ``bool``.
        choices: The values allowed, as written; empty if any value of the kind is.
        about: What it is; empty where the name says it.
    """

    name: str
    kind: str
    choices: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Contract:
    """What a kernel promises and asks for.

    Attributes:
        name: The operation.
        computes: What it computes, in words and formulas.
        inputs: Its inputs, in the order of the call.
        outputs: Its outputs, in the order of the call.
        template: Its template arguments.
        grid: Number of threads along each axis, for readers.
        threadgroup: Size of a threadgroup, for readers.
        max_threads: The most threads that a threadgroup may have.
        threadgroup_memory: Bytes of threadgroup memory that one threadgroup uses.
        math: ``safe``, or ``fast`` where a benchmark and a test argue for it.
        vjp: ``reference`` if gradients are those of the plain operations, else ``none: <reason>``.
    """

    name: str
    computes: str
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    template: tuple[TemplateSpec, ...]
    grid: str
    threadgroup: str
    max_threads: int
    threadgroup_memory: Expression
    math: str
    vjp: str

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the operation."""
        return self.vjp == "reference"

    def check_call(
        self,
        inputs: Sequence[mx.array],
        template: Template,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> None:
        """Hold the arguments of a launch against the contract.

        Args:
            inputs: The arrays, in the contract's order.
            template: Name and value of each template argument, in the contract's order.
            output_shapes: Shape of each output, in the contract's order.
            output_dtypes: Element type of each output.

        Raises:
            ValueError: If their number, a rank, an element type or a length is not as the contract says, or if
                one letter stands for two lengths.
        """
        values, types = self._bind_template(template)
        arrays = [*((spec, tuple(a.shape), a.dtype) for spec, a in self._pair(self.inputs, inputs, "inputs"))]
        shapes = self._pair(self.outputs, output_shapes, "output_shapes")
        dtypes = self._pair(self.outputs, output_dtypes, "output_dtypes")
        arrays += [(spec, tuple(shape), dtype) for (spec, shape), (_, dtype) in zip(shapes, dtypes, strict=True)]
        for spec, shape, dtype in arrays:
            expected = types[spec.dtype] if spec.dtype in types else DTYPES[spec.dtype]
            if dtype != expected:
                self._refuse(f"{spec.name} must be {_dtype_name(expected)}", _dtype_name(dtype))
            if len(shape) != len(spec.shape):
                self._refuse(f"{spec.name} must have {len(spec.shape)} axes", f"shape {shape}")
            for axis, length in zip(spec.shape, shape, strict=True):
                if axis.is_name and values.setdefault(axis.text, length) != length:
                    rule = f"{spec.name} must have {axis.text} = {values[axis.text]} as elsewhere"
                    self._refuse(rule, f"{length} in shape {shape}")
        for spec, shape, _ in arrays:  # only now every letter has its length
            for axis, length in zip(spec.shape, shape, strict=True):
                if not axis.is_name and axis.evaluate(values) != length:
                    rule = f"{spec.name} must have {axis.text} = {axis.evaluate(values)}"
                    self._refuse(rule, f"{length} in shape {shape}")
        sizes = {name: dtype.size for name, dtype in {**DTYPES, **types}.items()}
        used = self.threadgroup_memory.evaluate(values, sizes | {"float": 4, "int": 4, "uint": 4})
        if used > MAX_THREADGROUP_BYTES:
            self._refuse(f"threadgroup_memory must be at most {MAX_THREADGROUP_BYTES} bytes", used)

    def check_launch(self, grid: Sequence[int], threadgroup: Sequence[int]) -> None:
        """Hold the launch's size against the contract and what GPUs can do.

        Args:
            grid: Threads along each of three axes.
            threadgroup: Threads of one threadgroup along each axis.

        Raises:
            ValueError: If either is not three positive numbers, or the threadgroup is too large.
        """
        for what, size in (("grid", grid), ("threadgroup", threadgroup)):
            if len(size) != 3 or any(length < 1 for length in size):
                self._refuse(f"{what} must be three positive numbers", tuple(size))
        threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
        if threads > self.max_threads:
            self._refuse(f"threadgroup must have at most {self.max_threads} threads", tuple(threadgroup))

    def _bind_template(self, template: Template) -> tuple[dict[str, int], dict[str, mx.Dtype]]:
        """Numbers and element types that the template arguments stand for, by name."""
        names = [name for name, _ in template]
        if names != [spec.name for spec in self.template]:
            self._refuse(f"template must be {[spec.name for spec in self.template]}", names)
        values: dict[str, int] = {}
        types: dict[str, mx.Dtype] = {}
        for spec, (_, value) in zip(self.template, template, strict=True):
            if isinstance(value, mx.Dtype):
                kind, written = "dtype", _dtype_name(value)
                types[spec.name] = value
            else:
                kind = "bool" if isinstance(value, bool) else "int"
                written = str(value).lower()
                values[spec.name] = int(value)
            if kind != spec.kind:
                self._refuse(f"template argument {spec.name} must be {spec.kind}", repr(value))
            if spec.choices and written not in spec.choices:
                self._refuse(f"template argument {spec.name} must be one of {'|'.join(spec.choices)}", written)
        return values, types

    def _pair(self, specs: Sequence[ArraySpec], given: Sequence[_T], what: str) -> list[tuple[ArraySpec, _T]]:
        if len(given) != len(specs):
            self._refuse(f"{what} must be {len(specs)}: {', '.join(spec.name for spec in specs)}", len(given))
        return list(zip(specs, given, strict=True))

    def _refuse(self, rule: str, value: object) -> NoReturn:
        raise ValueError(f"[{self.name}] {rule} but got {value}")


def parse_contract(text: str) -> Contract:
    """Read the contract at the head of a kernel source.

    Args:
        text: The source, or as much of it as has the leading ``//`` lines.

    Returns:
        The contract.

    Raises:
        ContractError: If a section is missing, unknown, given twice or malformed, or if a letter or a type is used
            that nothing defines.
    """
    sections = _split(_comment_lines(text))
    for name in _SECTIONS:
        if name not in sections and name not in _OPTIONAL:
            raise ContractError(f"[contract] must have a line `// {name}:` but got {', '.join(sections) or 'none'}")
    name = _words(sections, "kernel")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ContractError(f"[contract] kernel must be a name in small letters but got {name!r}")
    math = _words(sections, "math") or "safe"
    if math.split()[0].rstrip(":") not in ("safe", "fast") or (math.startswith("fast") and len(math.split()) < 2):
        raise ContractError(f"[{name}] math must be `safe`, or `fast` and a reason, but got {math!r}")
    vjp = _words(sections, "vjp")
    if vjp != "reference" and not re.match(r"none: \S", vjp):
        raise ContractError(f"[{name}] vjp must be `reference` or `none: <reason>` but got {vjp!r}")
    threadgroup = _words(sections, "threadgroup")
    limit = _THREAD_LIMIT.search(threadgroup)
    max_threads = int(limit.group(1)) if limit else MAX_THREADS
    if not 1 <= max_threads <= MAX_THREADS:
        raise ContractError(f"[{name}] threadgroup must be at most {MAX_THREADS} threads but got {max_threads}")
    memory = _words(sections, "threadgroup_memory") or "0"
    contract = Contract(
        name=name,
        computes="\n".join(line for line in sections["computes"] if line),
        inputs=tuple(_array(name, line) for line in _lines(sections, "inputs")),
        outputs=tuple(_array(name, line) for line in _lines(sections, "outputs")),
        template=tuple(_argument(name, line) for line in _lines(sections, "template")),
        grid=_words(sections, "grid"),
        threadgroup=threadgroup,
        max_threads=max_threads,
        threadgroup_memory=_expression(name, re.sub(r"\s*(\bbytes\b.*|\(<=.*)$", "", memory)),
        math=math.split()[0].rstrip(":"),
        vjp=vjp,
    )
    _check_names(contract)
    return contract


def _comment_lines(text: str) -> list[str]:
    """The leading ``//`` lines without their slashes, up to the first marker or line of code."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("//") or line.startswith("// ---"):
            break
        lines.append(line.removeprefix("//").removeprefix(" ").rstrip())
    return lines


def _split(lines: Iterable[str]) -> dict[str, list[str]]:
    """Each section's lines by its name: what stands beside the colon first, then the indented ones."""
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        if current is not None and (not line or line.startswith(" ")):
            current.append(line.strip())
            continue
        found = _SECTION.match(line)
        if not found or found.group(1) not in _SECTIONS:
            known = ", ".join(_SECTIONS)
            raise ContractError(f"[contract] a line must be indented or start one of {known} but got {line!r}")
        name = found.group(1)
        if name in sections:
            raise ContractError(f"[contract] must have one `{name}:` but got another")
        current = sections[name] = [(found.group(2) or "").strip()]
    return sections


def _words(sections: Mapping[str, Sequence[str]], name: str) -> str:
    """A section as one line; a ``--`` comment behind it is for readers, except in prose."""
    return " ".join(line for line in sections.get(name, ()) if line).partition(" -- ")[0].strip()


def _lines(sections: Mapping[str, Sequence[str]], name: str) -> list[str]:
    return [line for line in sections.get(name, ()) if line]


def _array(kernel: str, line: str) -> ArraySpec:
    """Read ``qkv (B, L, S) T -- what it is``."""
    definition, _, about = (part.strip() for part in line.partition("--"))
    found = _ARRAY.match(definition)
    if not found:
        raise ContractError(f"[{kernel}] an array must be written `name (shape) dtype -- what it is` but got {line!r}")
    axes = _axes(found["shape"])
    return ArraySpec(found["name"], tuple(_expression(kernel, axis) for axis in axes), found["dtype"], about)


def _axes(shape: str) -> list[str]:
    """Split at the commas outside parentheses; a comma behind the last one is allowed."""
    axes, depth = [""], 0
    for character in shape:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            axes.append("")
        else:
            axes[-1] += character
    return [axis.strip() for axis in (axes if axes[-1].strip() else axes[:-1])]


def _argument(kernel: str, line: str) -> TemplateSpec:
    """Read ``T dtype float32|float16 -- what it is``."""
    definition, _, about = (part.strip() for part in line.partition("--"))
    found = _ARGUMENT.match(definition)
    if not found:
        rule = "a template argument must be written `name dtype|int|bool [choices] -- what it is`"
        raise ContractError(f"[{kernel}] {rule} but got {line!r}")
    choices = tuple(found["choices"].split("|")) if found["choices"] else ()
    if found["kind"] == "dtype" and not (choices and set(choices) <= set(DTYPES)):
        raise ContractError(f"[{kernel}] {found['name']} must name its element types, as float32|float16, in {line!r}")
    return TemplateSpec(found["name"], found["kind"], choices, about)


def _expression(kernel: str, text: str) -> Expression:
    try:
        return Expression(text)
    except ExpressionError as error:
        raise ContractError(f"[{kernel}] a length must be an expression in shape letters but got {error}") from error


def _check_names(contract: Contract) -> None:
    """Refuse names that stand for two things, and letters and types that nothing defines."""
    arrays = [*contract.inputs, *contract.outputs]
    names = [spec.name for spec in arrays] + [spec.name for spec in contract.template]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ContractError(f"[{contract.name}] each name must stand for one thing but got {doubles} twice")
    if not contract.outputs:
        raise ContractError(f"[{contract.name}] outputs must be at least one but got none")
    numbers = {spec.name for spec in contract.template if spec.kind != "dtype"}
    types = {spec.name for spec in contract.template if spec.kind == "dtype"}
    letters = numbers | {axis.text for spec in arrays for axis in spec.shape if axis.is_name}
    lengths = [axis for spec in arrays for axis in spec.shape]
    for expression in lengths:
        if missing := sorted((expression.names - letters) | expression.types):
            raise ContractError(f"[{contract.name}] {expression.text} must be made of axes but got {missing}")
    memory = contract.threadgroup_memory
    if missing := sorted((memory.names - letters) | (memory.types - types - set(DTYPES) - {"float", "int", "uint"})):
        raise ContractError(f"[{contract.name}] threadgroup_memory must be made of known names but got {missing}")
    for spec in arrays:
        if spec.dtype not in types | set(DTYPES):
            raise ContractError(f"[{contract.name}] {spec.name} must have a known element type but got {spec.dtype}")


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
