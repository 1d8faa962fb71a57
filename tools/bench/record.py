"""Tables in a document, one block per device, between marks that nothing else writes between."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

AREA_BEGIN = "<!-- bench tables: written by tools/bench_kernels.py --record, nothing here by hand -->"
SPEECH_AREA_BEGIN = AREA_BEGIN.replace("bench_kernels", "bench_transcribe")
AREA_END = "<!-- end of bench tables -->"


class RecordError(Exception):
    """The document has no place for tables."""


def with_block(text: str, slug: str, block: str, begin: str = AREA_BEGIN) -> str:
    """Return `text` with the block of a device put in, in place of the one that is there.

    Everything outside the marks and the blocks of other devices stay as they are; blocks are sorted by device. Putting
    the same block in again changes nothing.

    Args:
        text: The document.
        slug: The device, as in the marks.
        block: What to put between the device's marks.
        begin: The document's own first mark.

    Raises:
        RecordError: If the document's marks are missing, doubled or out of order.
    """
    before, area, after = _split(text, begin)
    blocks = _blocks(area)
    blocks[slug] = block.strip("\n")
    inside = "".join(f"{_begin(name)}\n{blocks[name]}\n{_end(name)}\n\n" for name in sorted(blocks))
    return f"{before}{begin}\n\n{inside}{AREA_END}{after}"


def write_block(path: Path, slug: str, block: str, begin: str = AREA_BEGIN) -> None:
    """Put the block of a device into a file, whole or not at all; arguments and errors as `with_block`."""
    text = with_block(path.read_text(encoding="utf-8"), slug, block, begin)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _split(text: str, begin: str) -> tuple[str, str, str]:
    if text.count(begin) != 1 or text.count(AREA_END) != 1 or text.index(begin) > text.index(AREA_END):
        raise RecordError(f"the document needs the lines {begin!r} and {AREA_END!r}, once each and in this order")
    before, _, rest = text.partition(begin)
    area, _, after = rest.partition(AREA_END)
    return before, area, after


def _blocks(area: str) -> dict[str, str]:
    """Return the blocks of an area by device."""
    found = {}
    rest = area.strip("\n")
    while rest:
        first, _, rest = rest.partition("\n")
        slug = first.removeprefix("<!-- bench ").removesuffix(" -->")
        body, mark, rest = rest.partition(f"{_end(slug)}")
        if first != _begin(slug) or not mark or slug in found:
            raise RecordError(f"between the marks for tables, {first!r} is not where a table begins")
        found[slug] = body.strip("\n")
        rest = rest.strip("\n")
    return found


def _begin(slug: str) -> str:
    return f"<!-- bench {slug} -->"


def _end(slug: str) -> str:
    return f"<!-- end {slug} -->"
