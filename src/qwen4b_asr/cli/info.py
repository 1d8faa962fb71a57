"""``qwen4b-asr info``: show what a model consists of: parameters, sizes and types per part, licence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._terminal import write_stdout
from .models import bytes_text

if TYPE_CHECKING:
    from ..weights.describe import Description, PartInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``info``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model directory, a published checkpoint (directory, .pt, .safetensors), a name that "
        "`qwen4b-asr models` lists, or owner/name of the hub; a name's parts that are not on this machine are "
        "described by their manifests",
    )
    parser.add_argument("--json", action="store_true", help="one object per line")


def run(args: argparse.Namespace) -> int:
    """Describe; the network is not touched. Returns the exit status.

    Raises:
        AsrError: If nothing is known of the model, or its files are damaged.
    """
    found = _look_up(args.model)
    for place, licence, description in found:
        write_stdout(_json(place, licence, description) if args.json else _text(place, licence, description))
    return 0


def _look_up(name: str) -> list[tuple[str, str | None, Description]]:
    """Place, licence and description of a model, or of each of its parts if it is not ready to run."""
    from ..weights.catalog import find_known, parse_repo
    from ..weights.describe import describe_manifest, describe_path
    from ..weights.find import find_local, find_model
    from ..weights.hub import Hub
    from ..weights.manifest import load_manifest

    hub = Hub()
    known, file = find_known(name), Path(name).expanduser()
    local = file if file.is_file() else find_local(name, hub=hub)
    if local is not None:
        description = describe_path(local)
        licences = [load_manifest(name).licence for name in description.manifests]
        licence = "; ".join(dict.fromkeys(licences)) or (known.licence if known is not None else None)
        return [(str(local), licence, description)]
    source = parse_repo(name)
    parts = list(known.parts.values()) if known is not None else [source] if source is not None else []
    found: list[tuple[str, str | None, Description]] = []
    for part in parts:
        snapshot = hub.cached(part)
        weights = snapshot is not None and any(file.suffix in (".safetensors", ".pt") for file in snapshot.rglob("*"))
        if snapshot is not None and weights:
            found.append((str(snapshot), part.licence, describe_path(snapshot)))
        elif part.manifest is not None:
            place = f"not on this machine; {part.label} on the hub"
            found.append((place, part.licence, describe_manifest(load_manifest(part.manifest))))
    if not found:
        find_model(name)  # says what is wrong
    return found


def _text(place: str, licence: str | None, description: Description) -> str:
    lines = [f"{description.title}\n", f"  at       {place}\n"]
    if licence:
        lines.append(f"  licence  {licence}\n")
    packed = [_packing(description.quantization)] if description.quantization else []
    packed += [f"{stage}: {_packing(own)}" for stage, own in description.stages.items()]
    packed += [f"by recipe {description.recipe}"] if description.recipe else []
    lines += [f"  {'' if number else 'packed':8} {text}\n" for number, text in enumerate(packed)]
    cells = [("part", "tensors", "parameters", "size", "types")]
    cells += [_cells(part) for part in (*description.parts, description.total)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    for name, tensors, parameters, size, types in cells:
        numbers = f"{tensors:>{widths[1]}}  {parameters:>{widths[2]}}  {size:>{widths[3]}}"
        lines.append(f"  {name:{widths[0]}}  {numbers}  {types}\n")
    return "".join(lines)


def _cells(part: PartInfo) -> tuple[str, str, str, str, str]:
    return (part.name, f"{part.tensors:,}", f"{part.parameters:,}", bytes_text(part.nbytes), ", ".join(part.dtypes))


def _packing(quantization: Any) -> str:
    whole = {key: value for key, value in quantization.items() if not isinstance(value, dict)}
    special = len(quantization) - len(whole)
    words = ", ".join(f"{key} {value}" for key, value in whole.items())
    return words + (f"; {special} tensors otherwise" if special else "")


def _json(place: str, licence: str | None, description: Description) -> str:
    value = {
        "title": description.title,
        "path": place,
        "licence": licence,
        "manifests": list(description.manifests),
        "quantization": description.quantization,
        "quantized_stages": dict(description.stages),
        "recipe": description.recipe,
        "parts": [_object(part) for part in description.parts],
        "total": _object(description.total),
    }
    return json.dumps(value, ensure_ascii=False) + "\n"


def _object(part: PartInfo) -> dict[str, Any]:
    return {
        "name": part.name,
        "tensors": part.tensors,
        "parameters": part.parameters,
        "bytes": part.nbytes,
        "dtypes": list(part.dtypes),
    }
