"""Lengths as a contract writes them: ``L``, ``3*D``, ``ceil(T/n)``, ``4*(BQ + BK)*sizeof(T)``."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_FUNCTIONS = {"ceil": 1, "sizeof": 1, "min": 2, "max": 2}


class ExpressionError(ValueError):
    """The text is no length, or has no value."""


@dataclass(frozen=True)
class Expression:
    """A whole number in terms of named ones.

    Knows ``+ - * / % ( )``, ``min(a, b)``, ``max(a, b)``, ``sizeof(T)`` and ``ceil(a/b)``; any other ``/`` rounds down,
    as integers do in a kernel.

    Args:
        text: The expression.

    Raises:
        ExpressionError: If it is none.
    """

    text: str

    def __post_init__(self) -> None:
        for _ in self._walk(self._tree()):
            pass

    @property
    def is_name(self) -> bool:
        """Whether it is a single letter or word."""
        return self.text.isidentifier()

    @property
    def names(self) -> frozenset[str]:
        """The numbers that it is made from."""
        return frozenset(name for kind, name in self._walk(self._tree()) if kind == "number")

    @property
    def types(self) -> frozenset[str]:
        """The types whose size it asks for."""
        return frozenset(name for kind, name in self._walk(self._tree()) if kind == "type")

    def evaluate(self, values: Mapping[str, int], sizes: Mapping[str, int] | None = None) -> int:
        """Compute it.

        Args:
            values: Value of every name.
            sizes: Bytes of every type that is asked for.

        Raises:
            ExpressionError: If a name has no value or a divisor is zero.
        """
        try:
            return _value(self._tree(), values, sizes or {})
        except KeyError as error:
            raise ExpressionError(f"{self.text}: {error.args[0]} has no value") from error
        except ZeroDivisionError as error:
            raise ExpressionError(f"{self.text}: division by zero") from error

    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ExpressionError(f"{self.text!r} is no expression") from error

    def _walk(self, node: ast.expr) -> Iterator[tuple[str, str]]:
        """Yield each name with what it stands for, ``number`` or ``type``; refuse what is not understood."""
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                pass
            case ast.Name(id=name):
                yield "number", name
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Mod(), right=right):
                yield from self._walk(left)
                yield from self._walk(right)
            case ast.Call(func=ast.Name(id="sizeof"), args=[ast.Name(id=name)], keywords=[]):
                yield "type", name
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name != "sizeof" and _FUNCTIONS.get(
                name
            ) == len(arguments):
                for argument in arguments:
                    yield from self._walk(argument)
            case _:
                raise ExpressionError(f"{self.text!r} has {ast.unparse(node)!r}, which is not understood")


def _value(node: ast.expr, values: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.Call(func=ast.Name(id="sizeof"), args=[ast.Name(id=name)]):
            return sizes[name]
        case ast.Call(func=ast.Name(id="ceil"), args=[ast.BinOp(left=left, op=ast.Div(), right=right)]):
            return -(-_value(left, values, sizes) // _value(right, values, sizes))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            numbers = [_value(argument, values, sizes) for argument in arguments]
            return max(numbers) if name == "max" else min(numbers)  # ceil of a whole number is the number
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _value(left, values, sizes), _value(right, values, sizes)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Mod():
                    return a % b
                case _:
                    return a // b
    raise ExpressionError(f"{ast.unparse(node)} is not understood")
