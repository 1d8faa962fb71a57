"""A pickle interpreter for checkpoints that has nothing to run.

A pickle is a small program; ``pickle.Unpickler`` with an allow-list in ``find_class`` still
calls whatever ends up on its stack (REDUCE, OBJ, NEWOBJ), looks up ``__setstate__`` on it
(BUILD), sizes arrays by numbers from the file (memo indexes) and hashes what the file chose
as keys. This reader keeps nothing of that: the two dozen opcodes that ``torch.save`` writes
are interpreted over plain values, a global is only its *name*, and REDUCE knows a handful of
names by heart. Every other opcode, name or argument is refused by its name, so there is no
code path from a file to a callable.

Opcodes are split by ``pickletools.genops``, which decodes and never executes. All work is
linear in the bytes read, and those are limited by the caller.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

# torch's storage classes, and the torch.dtype names that its newer rebuild function takes.
STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
UNTYPED_STORAGE = ("torch.storage", "UntypedStorage")
ALLOWED_GLOBALS = frozenset(
    [
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        UNTYPED_STORAGE,
    ]
    + [("torch", name) for name in STORAGE_DTYPES]
    + [("torch", name) for name in TORCH_DTYPES]
)
_TEXT = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES")
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_PUSHED_ARGUMENT = frozenset(_TEXT + _NUMBERS)
_PUSHED_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class PickleRefusedError(ValueError):
    """The pickle is damaged, or asks for something that a checkpoint has no business to ask for."""


@dataclass(frozen=True)
class Global:
    """The name of a class or function in the file; never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class StorageRef:
    """A run of elements kept outside the pickle: its key, its size and where a view of it begins."""

    key: str
    dtype: str | None  # None for an untyped storage, which is counted in bytes
    items: int
    first: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """What a pickle says about one tensor; not yet checked against its storage."""

    storage: StorageRef
    dtype: str
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


_MARK = object()


def read_pickle(stream: BytesIO, persistent_load: Callable[[Any], Any]) -> Any:
    """Interpret one pickle from `stream` and leave the stream after its last byte.

    Args:
        stream: The bytes; their number bounds the work and the memory.
        persistent_load: Turns a persistent id (plain values and `Global`) into a value.

    Returns:
        Plain dicts, lists, tuples and scalars with `Global`, `TensorSpec` and what
        `persistent_load` returned among them.

    Raises:
        PickleRefusedError: If the pickle is damaged or not of the kind that ``torch.save`` writes.
    """
    machine = _Machine(persistent_load)
    position: int | None = 0
    try:
        for opcode, argument, at in pickletools.genops(stream):
            position = at
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except PickleRefusedError as error:
        raise PickleRefusedError(f"{error} (at byte {position} of its pickle)") from None
    except (ValueError, OverflowError, EOFError, struct.error) as error:
        raise PickleRefusedError(f"its pickle is damaged after byte {position}: {error}") from error
    raise PickleRefusedError("its pickle has no end")  # genops itself insists on STOP


class _Machine:
    """The stack and memo of one pickle program."""

    def __init__(self, persistent_load: Callable[[Any], Any]) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._persistent_load = persistent_load

    def result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise PickleRefusedError(f"its pickle ends with {len(self._stack)} values on the stack instead of one")
        return self._stack[0]

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleRefusedError("its pickle takes a value from an empty stack")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise PickleRefusedError("its pickle closes a group that was never opened")

    def _top(self, kind: type, opcode: str) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            found = type(self._stack[-1]).__name__ if self._stack else "nothing"
            raise PickleRefusedError(f"its pickle applies {opcode} to {found} instead of a {kind.__name__}")
        return self._stack[-1]

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode, or refuse it."""
        push = self._stack.append
        if opcode in _PUSHED_ARGUMENT:
            push(argument)
        elif opcode in _PUSHED_CONSTANT:
            push(_PUSHED_CONSTANT[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            value = self._pop()
            push(value)
            self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = value
        elif opcode in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise PickleRefusedError(f"its pickle recalls memo entry {argument}, which was never stored")
            push(self._memo[argument])
        elif opcode == "MARK":
            push(_MARK)
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST"):
            push({} if opcode == "EMPTY_DICT" else [])
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [self._pop() for _ in range(int(opcode[-1]))]
            push(tuple(reversed(items)))
        elif opcode == "TUPLE":
            push(tuple(self._pop_to_mark()))
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop_to_mark() if opcode == "SETITEMS" else [self._pop(), self._pop()][::-1]
            self._set_items(self._top(dict, opcode), items)
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop_to_mark() if opcode == "APPENDS" else [self._pop()]
            self._top(list, opcode).extend(items)
        elif opcode == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            push(_allowed(module, name))
        elif opcode == "STACK_GLOBAL":
            name, module = self._pop(), self._pop()
            if not (type(name) is str and type(module) is str):
                raise PickleRefusedError("its pickle names a global by something that is not text")
            push(_allowed(module, name))
        elif opcode == "REDUCE":
            arguments, function = self._pop(), self._pop()
            push(_reduce(function, arguments))
        elif opcode == "BUILD":
            # torch hangs `_metadata` on a state_dict's OrderedDict; it carries version numbers only.
            if type(self._pop()) is not dict:
                raise PickleRefusedError("its pickle sets the state of an object (BUILD), which is refused")
            self._top(dict, "BUILD")
        elif opcode == "BINPERSID":
            push(self._persistent_load(self._pop()))
        elif opcode == "PROTO":
            if argument > 5:
                raise PickleRefusedError(f"its pickle has protocol {argument}, which is not known")
        elif opcode == "FRAME":
            pass
        elif opcode in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            what = f" {argument}" if argument is not None else ""
            raise PickleRefusedError(f"its pickle builds an object ({opcode}{what}), which is refused; nothing was run")
        else:
            raise PickleRefusedError(f"its pickle uses {opcode}, which no checkpoint needs")

    @staticmethod
    def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise PickleRefusedError("its pickle gives a dict a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple key may be nested so that hashing it takes forever.
            if type(key) not in (str, int):
                raise PickleRefusedError(f"its pickle has a dict key of type {type(key).__name__}")
            target[key] = value


def _allowed(module: str, name: str) -> Global:
    if (module, name) not in ALLOWED_GLOBALS:
        raise PickleRefusedError(
            f"its pickle asks for {f'{module}.{name}'[:200]!r}, which is not on the list of what a checkpoint "
            "may name; nothing was run. Save the bare state_dict (tensors only) and try again"
        )
    return Global(module, name)


def _reduce(function: Any, arguments: Any) -> Any:
    """Carry out the handful of calls that ``torch.save`` writes, on plain values."""
    if not isinstance(function, Global):
        raise PickleRefusedError(f"its pickle calls a {type(function).__name__}, which is refused; nothing was run")
    match str(function), arguments:
        case "collections.OrderedDict", ():
            return {}
        case "collections.OrderedDict", (list() as pairs,):
            result: dict[Any, Any] = {}
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise PickleRefusedError("its pickle makes an OrderedDict of something that is not pairs")
                _Machine._set_items(result, list(pair))
            return result
        case "torch.Size", ((list() | tuple()) as sizes,):
            return tuple(sizes)
        case "torch._utils._rebuild_parameter", (TensorSpec() as tensor, *_):
            return tensor
        case (
            "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
            (StorageRef(dtype=str() as dtype) as storage, offset, tuple() as shape, tuple() as strides, *_),
        ):
            return TensorSpec(storage, dtype, offset, shape, strides)
        case (
            "torch._utils._rebuild_tensor_v3",
            (
                StorageRef(dtype=None) as storage,
                offset,
                tuple() as shape,
                tuple() as strides,
                _,
                _,
                Global() as kind,
                *_,
            ),
        ) if kind.module == "torch" and kind.name in TORCH_DTYPES:
            return TensorSpec(storage, TORCH_DTYPES[kind.name], offset, shape, strides)
    raise PickleRefusedError(f"its pickle calls {function} with arguments that do not fit it; nothing was run")
