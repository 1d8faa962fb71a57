"""Read from source text what each module of a package imports, without importing it.

`vendor.py` copies by it, and the tests under tests/structure/ hold the package's layering against it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


class ImportReadError(Exception):
    """A relative import leads nowhere; the message names file and line."""


@dataclass(frozen=True)
class Import:
    """One imported thing.

    Attributes:
        target: Dotted name; relative to the package for a relative import (``""`` is the package itself), absolute
            otherwise.
        relative: Whether the statement had leading dots.
        line: Line number of the statement.
        typing_only: Whether it stands under ``if TYPE_CHECKING:``.
    """

    target: str
    relative: bool
    line: int
    typing_only: bool = False


@dataclass(frozen=True)
class Source:
    """The modules of one package folder, by dotted name relative to it.

    Attributes:
        folder: The package folder.
        modules: Dotted name to file; a package is named without ``__init__``, the root package is ``""``.
    """

    folder: Path
    modules: dict[str, Path]

    @classmethod
    def scan(cls, folder: Path) -> Source:
        """List the modules under `folder`.

        Args:
            folder: A package folder.

        Returns:
            The modules found; folders without ``__init__.py`` count as packages without code.
        """
        modules = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return cls(folder, modules)

    def is_package(self, name: str) -> bool:
        """Whether `name` is a package, with or without an ``__init__.py``."""
        return (self.folder / name.replace(".", "/")).is_dir() if name else True

    def imports(self, name: str) -> list[Import]:
        """Everything that module `name` imports, wherever in its text the statement stands.

        Args:
            name: A key of `modules`.

        Returns:
            The imports in order; ``from .a import b`` gives ``a.b`` if that is a module and ``a`` if not.

        Raises:
            ImportReadError: If a relative import leaves the package or names nothing in it.
        """
        path = self.modules[name]
        package = name.split(".") if name else []
        if path.name != "__init__.py":
            package = package[:-1]
        found = []
        for node, typing_only in _import_nodes(ast.parse(path.read_bytes(), str(path))):
            if isinstance(node, ast.Import):
                found += [Import(alias.name, False, node.lineno, typing_only) for alias in node.names]
            elif node.level == 0:
                found.append(Import(node.module or "", False, node.lineno, typing_only))
            else:
                if node.level - 1 > len(package):
                    raise ImportReadError(f"{path}:{node.lineno}: a relative import that leaves the package")
                base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    target = ".".join([*base, alias.name])
                    if target not in self.modules and not (self.is_package(target) and target):
                        target = ".".join(base)
                    if target not in self.modules and not self.is_package(target):
                        raise ImportReadError(f"{path}:{node.lineno}: imports .{target}, which does not exist")
                    found.append(Import(target, True, node.lineno, typing_only))
        return found


def _import_nodes(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Walk `tree` and yield its import statements, with whether ``TYPE_CHECKING`` guards them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, typing_only
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from _import_nodes(ast.Module([child], []), True)
            for child in node.orelse:
                yield from _import_nodes(ast.Module([child], []), typing_only)
        else:
            yield from _import_nodes(node, typing_only)


def closure(source: Source, names: Iterable[str]) -> list[str]:
    """The modules in `names` and all that they import from the package, directly or not.

    Args:
        source: The package to look in.
        names: Dotted names relative to the package.

    Returns:
        Dotted names, sorted. A package's own ``__init__`` is among them only where something in it is used.
    """
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in source.modules:
            continue
        seen.add(name)
        waiting += [found.target for found in source.imports(name) if found.relative]
    return sorted(seen)
