"""``qwen4b-asr plan``: tell what memory a model needs, part by part, and what quantisation saves; nothing is loaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ._terminal import write_stdout
from .convert import byte_count

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..machine import Machine
    from ..memory import Plan

APPLE_GIB = (8, 16, 24, 32)
"""Memory of the machines that the table asks about."""

EPILOG = """\
at work: keys and values of the window, the largest stage's workspace, buffers kept for reuse, and the program
fits: Macs of so many GB, whose GPU should not use more than two thirds; + there is room, - there is not
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", metavar="MODEL", help="a model directory, or a name that `qwen4b-asr models` lists, here or not"
    )
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="length of a window (default: 30)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows worked on at once (default: 1)")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="budget per window (default: grows with its length)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the language model (default: auto, float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--memory-limit", type=byte_count, metavar="SIZE", help="fail if the model takes more, such as 12G or 500M"
    )
    parser.add_argument("--json", action="store_true", help="one object")


def run(args: argparse.Namespace) -> int:
    """Plan; the network is not touched. Returns the exit status.

    Raises:
        AsrError: If nothing is known of the model, or it exceeds the limit.
    """
    import mlx.core as mx

    from ..errors import ConfigError
    from ..machine import KEPT_ON_GPU, kept_buffers, this_machine
    from ..memory import Work, dense, plan_memory, require_room, smaller_forms
    from ..weights.load import resolve_dtype

    config, place = _find(args.model)
    try:
        work = Work(args.seconds, args.batch, args.max_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    dtype = "bfloat16" if resolve_dtype(args.dtype) == mx.bfloat16 else "float32"
    kept = kept_buffers()
    own = plan_memory(config, dtype, work, reserve=kept)
    # The Macs' rows are for their GPUs, whatever this machine has.
    base = dense(config)
    forms = [("as published" if base.decoder is None else "bfloat16", base), *smaller_forms(base)]
    others = [(name, plan_memory(form, "bfloat16", work, reserve=KEPT_ON_GPU)) for name, form in forms]
    machine = this_machine()
    if args.json:
        write_stdout(json.dumps(_object(own, others, machine, place), ensure_ascii=False) + "\n")
    else:
        write_stdout(_text(own, others, machine, place))
    warning = require_room(config, own, machine, args.memory_limit, work=work, model=args.model)
    if warning:
        from ._terminal import complain

        complain(f"warning: {warning}")
    return 0


def _find(name: str) -> tuple[ModelConfig, str | None]:
    """Return a model's configuration and where it is; one of the catalog's need not be here."""
    from ..config import ModelConfig
    from ..weights.catalog import find_known
    from ..weights.expected import expected_config
    from ..weights.find import find_local, find_model

    local = find_local(name)
    if local is not None:
        return ModelConfig.load(local), str(local)
    known = find_known(name)
    return (ModelConfig.load(find_model(name)), name) if known is None else (expected_config(known), None)


def _fits(plan: Plan, gib: int) -> bool:
    from ..machine import apple_working_set

    return plan.total <= apple_working_set(gib << 30)


def _text(own: Plan, others: list[tuple[str, Plan]], machine: Machine, place: str | None) -> str:
    from ..memory import size_text

    lines = [
        f"{own.name}, decoder in {own.dtype}: {size_text(own.total)}\n",
        f"  at  {place or 'not on this machine'}\n",
    ]
    rows = [*own.weights.items(), ("weights", own.weight_bytes)]
    if own.cache:
        rows.append(("key and value cache", own.cache))
    rows += [(f"workspace, {stage}", size) for stage, size in own.workspace.items()]
    rows += [("peak of arrays", own.peak), ("with buffers kept and the program", own.total)]
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:{width}}  {size_text(size):>9}\n" for name, size in rows]
    if machine.total is not None:
        usable = "" if machine.usable is None else f", {size_text(machine.usable)} for a model"
        lines.append(f"this machine: {size_text(machine.total)} of memory{usable}\n")
    cells = [("on a Mac's GPU", "weights", "at work", "total", *(f"{gib} GB" for gib in APPLE_GIB))]
    for name, plan in others:
        sizes = (plan.weight_bytes, plan.total - plan.weight_bytes, plan.total)
        cells.append((name, *map(size_text, sizes), *("+" if _fits(plan, gib) else "-" for gib in APPLE_GIB)))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for name, *values in cells:
        numbers = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"  {name:{widths[0]}}  {numbers}\n")
    return "".join(lines)


def _object(own: Plan, others: list[tuple[str, Plan]], machine: Machine, place: str | None) -> dict[str, Any]:
    return {
        "path": place,
        **_values(own),
        "machine": {"total": machine.total, "usable": machine.usable},
        "forms": [
            {"form": name, **_values(plan), "fits": {str(gib): _fits(plan, gib) for gib in APPLE_GIB}}
            for name, plan in others
        ],
    }


def _values(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "dtype": plan.dtype,
        "weights": dict(plan.weights),
        "cache": plan.cache,
        "workspace": dict(plan.workspace),
        "reserve": plan.reserve,
        "peak": plan.peak,
        "total": plan.total,
    }
