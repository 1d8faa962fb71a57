#!/usr/bin/env python3
"""Copy a stage of qwen4b-asr into another project, and say later what has drifted.

    python tools/vendor.py encoder --to ../app/src/app/asr      copy a stage and what it imports
    python tools/vendor.py adaptor --to ../app/src/app/asr      add another to the same copy
    python tools/vendor.py --to ../app/src/app/asr              refresh what is there
    python tools/vendor.py --to ../app/src/app/asr --check      report drift; exit status 1 if there is any

A stage is any module of ``src/qwen4b_asr``: ``encoder``, ``weights.torch_zip``, ``transcribe``; a package name
(``weights``) takes every module in it. Files are copied unchanged and keep their places relative to each other. As
the package imports itself only relatively, the copy runs under whatever name its new folder has. ``VENDORED.json``
beside the copies records where they come from, their hashes and the packages they need.

Files changed by hand since the last copy are never overwritten without ``--force``. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from package_imports import ImportReadError, Source, closure

PACKAGE = "src/qwen4b_asr"
NOTE = "VENDORED.json"
SCHEMA = 1
EMPTY_INIT = b'"""Copied code: VENDORED.json says from where, and how to refresh it."""\n'
KERNEL_NAME = re.compile(r"[\w/-]+\.(metal|h)")
KERNEL_INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
# Modules that read files from the checkout's weights/ folder do it through this one.
DATA_MODULE = "weights.paths"


class VendorError(Exception):
    """The copy cannot be made, refreshed or checked; the message says why."""


# --- What a copy consists of --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a copy of some stages consists of.

    Attributes:
        stages: The stages asked for, as dotted names.
        modules: All modules copied for them.
        files: Path in the copy to contents.
        origins: Path in the copy to path in the checkout; absent for generated files.
        needs: Requirements of the copied code, such as ``mlx>=0.32``.
    """

    stages: list[str]
    modules: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)

    def add(self, root: Path, path: Path, name: str) -> None:
        """Take the checkout's file `path` along as `name`."""
        self.files[name] = path.read_bytes()
        self.origins[name] = path.relative_to(root).as_posix()


def make_plan(root: Path, stages: Sequence[str]) -> Plan:
    """Work out what a copy of `stages` consists of.

    Args:
        root: A checkout of the project.
        stages: Names of modules or packages.

    Returns:
        The plan, contents included.

    Raises:
        VendorError: If a stage or a kernel does not exist.
        ImportReadError: If a relative import leads nowhere.
    """
    source = Source.scan(root / PACKAGE)
    if not source.modules:
        raise VendorError(f"{root} is not a checkout of this project: it has no {PACKAGE}")
    wanted = [stage.removesuffix(".py").replace("/", ".") for stage in stages]
    names: list[str] = []
    for name in wanted:
        inside = [m for m in source.modules if m == name or m.startswith(f"{name}.")] if name else []
        if not inside:
            known = ", ".join(sorted(m for m in source.modules if m and not m.startswith("_")))
            raise VendorError(f"no stage is called {name!r}; there are {known}")
        names += inside
    plan = Plan(sorted(set(wanted)), closure(source, names))
    packages = {""}
    for name in plan.modules:
        path = source.modules[name]
        plan.add(root, path, path.relative_to(source.folder).as_posix())
        packages |= {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
    for package in packages:
        plan.files.setdefault(f"{package.replace('.', '/')}/__init__.py".lstrip("/"), EMPTY_INIT)
    for name in ("py.typed", "LICENSE"):
        plan.add(root, (source.folder if name == "py.typed" else root) / name, name)
    _add_kernels(root, source, plan)
    if DATA_MODULE in plan.modules:
        for path in sorted((root / "weights").rglob("*")):
            inside_weights = path.relative_to(root / "weights")
            # The demo's recordings and checkpoint have another licence, and nobody's stage needs them.
            if path.is_file() and inside_weights.parts[0] != "demo":
                plan.add(root, path, f"weights/data/{inside_weights.as_posix()}")
    plan.needs = _requirements(root, source, plan.modules)
    return plan


def _add_kernels(root: Path, source: Source, plan: Plan) -> None:
    """Add the kernel sources that the planned modules name, as ``kernels/metal/...``."""
    folder = root / "kernels"
    waiting = []
    for name in plan.modules:
        same_stem = f"{name.rpartition('.')[2]}.metal"
        if name.startswith("kernels.") and (folder / same_stem).is_file():
            waiting.append(same_stem)
        for node in ast.walk(ast.parse(source.modules[name].read_bytes())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and KERNEL_NAME.fullmatch(node.value):
                waiting.append(node.value)
    while waiting:
        name = waiting.pop()
        if f"kernels/metal/{name}" in plan.files:
            continue
        if not (folder / name).is_file():
            raise VendorError(f"the copied modules name the kernel {name}, and kernels/ has no such file")
        plan.add(root, folder / name, f"kernels/metal/{name}")
        waiting += [match.decode() for match in KERNEL_INCLUDE.findall((folder / name).read_bytes())]


def _requirements(root: Path, source: Source, modules: Iterable[str]) -> list[str]:
    """What the modules import from outside, in pyproject's terms where it has them."""
    tops = {
        found.target.partition(".")[0]
        for name in modules
        for found in source.imports(name)
        if not found.relative and not found.typing_only
    }
    declared: dict[str, str] = {}
    # A regular expression, as Python 3.10 has no TOML reader.
    for name, version in re.findall(r'^\s*"([\w.-]+)(?:\[\w+\])?([<>=!~][^";]*)?[";]', _pyproject(root), re.MULTILINE):
        declared.setdefault(name.replace("-", "_").lower(), (name + version).strip())
    return sorted(declared.get(top.lower(), top) for top in tops if top not in sys.stdlib_module_names)


def _pyproject(root: Path) -> str:
    return (root / "pyproject.toml").read_text(encoding="utf-8")


def _setting(root: Path, key: str) -> str:
    """The first ``key = "value"`` of pyproject.toml."""
    found = re.search(rf'^{key}\s*=\s*"([^"]*)"', _pyproject(root), re.MULTILINE)
    return found.group(1) if found else "unknown"


def _commit(root: Path, paths: Iterable[str]) -> str | None:
    """The checkout's commit, with ``+changes`` where `paths` differ from it; None outside git."""
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *paths])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0].strip() + ("+changes" if run[1].strip() else "")


# --- Copying and comparing ----------------------------------------------------------------------------------------


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_note(target: Path) -> tuple[list[str], dict[str, str]]:
    """What an earlier copy recorded.

    Args:
        target: The folder of the copy.

    Returns:
        The stages and, by path, the sha256 of each file; both empty without a note.

    Raises:
        VendorError: If there is a note that cannot be understood.
    """
    path = target / NOTE
    if not path.exists():
        return [], {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["schema"] != SCHEMA:
            raise VendorError(f"{path} has schema {note['schema']}, and this program knows {SCHEMA}")
        hashes = {str(name): str(entry["sha256"]) for name, entry in note["files"].items()}
        stages = [str(stage) for stage in note["stages"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VendorError(f"{path} is damaged ({error!r}); delete it and copy again with --force") from error
    for name in hashes:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise VendorError(f"{path} names {name}, which is outside the copy")
    return stages, hashes


def _local_files(target: Path) -> dict[str, str]:
    """Path to sha256 of what lies in the copy, the note and byte code left out."""
    return {
        path.relative_to(target).as_posix(): _digest(path.read_bytes())
        for path in sorted(target.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(target).as_posix() != NOTE
    }


def check(root: Path, target: Path, stages: Sequence[str] = ()) -> list[str]:
    """Compare a copy with the checkout.

    Args:
        root: The checkout.
        target: The folder of the copy.
        stages: Stages that should be there besides the recorded ones.

    Returns:
        One line for each difference, such as ``changed here: encoder.py``; empty if there is none.

    Raises:
        VendorError: If `target` is not a copy, or the plan cannot be made.
    """
    old_stages, recorded = read_note(target)
    if not old_stages:
        raise VendorError(f"{target} has no {NOTE}: it is not a copy made by this program")
    current = {name: _digest(data) for name, data in make_plan(root, [*old_stages, *stages]).files.items()}
    local = _local_files(target)
    lines = []
    for name in sorted({*current, *recorded, *local}):
        if name not in recorded:
            kind = "new upstream" if name in current else "extra"
        elif name not in local:
            kind = "missing"
        elif name not in current:
            kind = "gone upstream"
        elif local[name] == current[name]:
            continue
        else:
            sides = [("here", local[name] != recorded[name]), ("upstream", current[name] != recorded[name])]
            kind = "changed " + " and ".join(side for side, changed in sides if changed)
        lines.append(f"{kind}: {name}")
    return lines


def vendor(root: Path, target: Path, stages: Sequence[str] = (), *, force: bool = False) -> Plan:
    """Copy stages, or refresh a copy.

    Args:
        root: The checkout to copy from.
        target: The folder to copy into: new, empty, or an earlier copy.
        stages: Stages to copy besides those an earlier copy recorded.
        force: Overwrite files that were changed by hand or that this program did not write.

    Returns:
        What was copied.

    Raises:
        VendorError: If nothing is to be copied, a name is unknown, or files would be overwritten.
    """
    old_stages, recorded = read_note(target)
    if not stages and not old_stages:
        raise VendorError("name a stage to copy, such as: encoder")
    plan = make_plan(root, [*old_stages, *stages])
    local = _local_files(target) if target.exists() else {}
    if local and not old_stages and not force:
        raise VendorError(f"{target} has files and no {NOTE}: choose a new folder, or add --force")
    gone = [name for name in recorded if name in local and name not in plan.files]
    threatened = [name for name in [*plan.files, *gone] if name in local and local[name] != recorded.get(name)]
    threatened = [name for name in threatened if name in gone or local[name] != _digest(plan.files[name])]
    if threatened and not force:
        raise VendorError("changed by hand, not overwritten without --force: " + ", ".join(sorted(threatened)))
    for name in gone:
        (target / name).unlink()
    for name, data in plan.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    note = {
        "schema": SCHEMA,
        "project": _setting(root, "name"),
        "version": _setting(root, "version"),
        "commit": _commit(root, plan.origins.values()),
        "licence": _setting(root, "license"),
        "stages": plan.stages,
        "needs": plan.needs,
        "refresh": "python tools/vendor.py --to THIS_FOLDER   (in a checkout of the project; --check to compare only)",
        "files": {
            name: {"source": plan.origins.get(name), "sha256": _digest(data)}
            for name, data in sorted(plan.files.items())
        },
    }
    (target / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; those of the process by default.

    Returns:
        Exit status: 0 done or no drift, 1 drift, 2 refused.
    """
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="tools/vendor.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="*", help="a module or package of src/qwen4b_asr; none refreshes the copy")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the copy")
    parser.add_argument("--check", action="store_true", help="change nothing, report what differs")
    parser.add_argument("--force", action="store_true", help="overwrite files changed by hand")
    parser.add_argument(
        "--source", type=Path, metavar="DIR", default=Path(__file__).resolve().parents[1], help="checkout to copy from"
    )
    options = parser.parse_args(arguments)
    try:
        if options.check:
            lines = check(options.source, options.to, options.stage)
            print("\n".join(lines) if lines else "no drift")
            return 1 if lines else 0
        plan = vendor(options.source, options.to, options.stage, force=options.force)
    except (VendorError, ImportReadError, OSError, SyntaxError) as error:
        print(f"tools/vendor.py: {error}", file=sys.stderr)
        return 2
    needs = ", ".join(plan.needs) or "nothing else"
    print(f"copied {len(plan.files)} files for {', '.join(plan.stages)} to {options.to}; needs {needs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
