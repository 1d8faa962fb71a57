"""``qwen4b-asr models``: list what is known by name, what of it is on this machine, its size and licence."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ._terminal import write_stdout

if TYPE_CHECKING:
    from pathlib import Path

    from ..weights.catalog import KnownModel
    from ..weights.hub import Hub

READY, CACHED, PARTLY, ABSENT = "ready", "cached", "partly", "-"

LEGEND = f"""\
{READY}: --model NAME works without a network; {CACHED}: the published files are here; {PARTLY}: some are; \
{ABSENT}: none; size: of what is here, or with ~ of what would be fetched
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``models``."""
    parser.add_argument("--json", action="store_true", help="one object per line")


def run(args: argparse.Namespace) -> int:
    """List; the network is not touched. Returns the exit status.

    Raises:
        ConfigError: If the catalog is damaged.
    """
    from ..weights.catalog import load_catalog
    from ..weights.find import is_model_directory, models_folder
    from ..weights.hub import Hub

    hub = Hub()
    catalog = load_catalog()
    rows = [_row(model, hub) for model in catalog.values()]
    folder = models_folder()
    made = sorted(path for path in folder.iterdir() if path.name not in catalog) if folder.is_dir() else []
    rows += [_own_row(path) for path in made if is_model_directory(path)]
    if args.json:
        write_stdout("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_stdout(_table(rows) + "\n" + LEGEND)
    return 0


def _row(model: KnownModel, hub: Hub) -> dict[str, Any]:
    from ..weights.find import find_local

    path = find_local(model.name, hub=hub)
    snapshots = [hub.cached(source) for source in model.parts.values()]
    partial = sum(hub.cached_bytes(source) for source in model.parts.values())
    size: int | None
    if path is not None:
        state, size = READY, _size_of(path)
    elif all(snapshot is not None for snapshot in snapshots):
        state, size = CACHED, partial
    else:
        state, size = (PARTLY, partial) if partial else (ABSENT, model.nbytes)
    return {
        "name": model.name,
        "state": state,
        "bytes": size,
        "licence": model.licence,
        "title": model.title,
        "path": None if path is None else str(path),
        "sources": {role: source.label for role, source in model.parts.items()},
        "aliases": list(model.aliases),
    }


def _own_row(path: Path) -> dict[str, Any]:
    row = {"name": str(path), "state": READY, "bytes": _size_of(path), "licence": "", "title": "made here"}
    return {**row, "path": str(path), "sources": {}, "aliases": []}


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [("name", "state", "size", "what it is", "licence")]
    cells += [(row["name"], row["state"], _size(row), row["title"], row["licence"]) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "".join(
        f"{name:{widths[0]}}  {state:{widths[1]}}  {size:>{widths[2]}}  {title:{widths[3]}}  {licence}".rstrip() + "\n"
        for name, state, size, title, licence in cells
    )


def _size(row: dict[str, Any]) -> str:
    if row["bytes"] is None:
        return "?"
    return f"{'~' if row['state'] == ABSENT else ''}{bytes_text(row['bytes'])}"


def bytes_text(count: int) -> str:
    """Write a number of bytes for a person: ``8.04 GB``, ``936 MB``, ``6.1 MB``."""
    if count >= 10**9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 10**7 else f"{count / 1e6:.1f} MB"
