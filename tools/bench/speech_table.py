"""What `tools/bench_transcribe.py` shows: tables, the bars that it is held against, and the record in a document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rounds import Row
from .session import Plan, Result
from .sides import OWN
from .table import percent, three_digits, times

NONE = "–"


@dataclass(frozen=True)
class Bar:
    """Something that a run is held against.

    Attributes:
        text: What it is.
        least: What it should be at least.
        value: What it was; None if it was not measured.
    """

    text: str
    least: float
    value: float | None

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.value is None:
            return "not measured"
        return "met" if self.value >= self.least else "missed"


def tokens_per_second(row: Row, side: str, tokens: int) -> float:
    """Return how many tokens a second a side decodes; the first one is the prefill's."""
    return (tokens - 1) / row.times[side]["median"]


def find(result: Result, section: str, stage: str) -> Row | None:
    """Return a row, None if it was not measured."""
    return next((row for row in result.rows.get(section, []) if row.stage == stage), None)


def bandwidth_share(result: Result, plan: Plan) -> float | None:
    """Return which part of the bytes that the machine reads in a second decoding makes it read."""
    row = find(result, "write", "decode")
    if row is None or result.ceiling is None:
        return None
    return result.decoder_bytes * tokens_per_second(row, OWN, plan.tokens) / result.ceiling


def bars(result: Result, plan: Plan) -> list[Bar]:
    """Return what the project wants of itself, with what this run says to it."""

    def against(section: str, stage: str, peer: str) -> float | None:
        row = find(result, section, stage)
        return None if row is None else row.ratios.get(peer)

    draft = next((saving for saving in result.savings if saving["errors"] == 0.05), None)
    eight = next((gain for gain in result.gains if gain["size"] == 8), None)
    return [
        Bar("encoder, times mlx-audio's speed", 1.5, against("listen", "encoder", "mlx-audio")),
        Bar("encoder, times torch's speed", 0.8, against("listen", "encoder", "torch")),
        Bar("decode, times mlx-lm's tokens per second", 1.0, against("write", "decode", "mlx-lm")),
        Bar("decode, share of the bandwidth ceiling", 0.7, bandwidth_share(result, plan)),
        Bar("draft with 5 % of its tokens wrong, times fewer passes", 3.0, draft["passes"] if draft else None),
        Bar("draft with 5 % of its tokens wrong, times as fast as plain", 2.5, draft["time"] if draft else None),
        Bar("batch of 8, times as many tokens per second", 3.0, statistics.median(eight["steps"]) if eight else None),
    ]


def beside(rows: Sequence[Row]) -> list[str]:
    """Return the table of a section with peers, as Markdown lines."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.times) if name != OWN]
    head = ["stage", "ms", "CPU ms"]
    for name in names:
        head += [f"{name}, ms", "times", "CPU times"]
    lines = [_line(head), _rule(len(head))]
    for row in rows:
        cells = [row.stage, milliseconds(row, OWN), milliseconds(row, OWN, "cpu")]
        for name in names:
            cells += [milliseconds(row, name), times(row.ratios.get(name)), times(row.cpu_ratios.get(name))]
        lines.append(_line(cells))
    return lines


def grown(rows: Sequence[Row], plan: Plan, memory: Mapping[str, Mapping[str, int | None]]) -> list[str]:
    """Return the table of growth with the length of the audio, as Markdown lines."""
    lengths = list(dict.fromkeys(row.seconds for row in rows))
    stages = list(dict.fromkeys(row.stage for row in rows))
    found = {(row.stage, row.seconds): row for row in rows}
    head = ["audio, s", *(f"{stage}, ms" for stage in stages), "tokens", "real-time factor", "MLX peak, MB"]
    lines = [_line(head), _rule(len(head), texts=0)]
    for seconds in lengths:
        cells = [f"{seconds:g}"]
        cells += [milliseconds(found[s, seconds], OWN) if (s, seconds) in found else NONE for s in stages]
        whole = found.get(("whole", seconds))
        cells.append(str(max(1, round(plan.tokens_per_second * seconds))))
        cells.append(three_digits(whole.times[OWN]["median"] / seconds) if whole else NONE)
        held = memory.get(f"{seconds:g} s", {}).get("framework_bytes")
        cells.append(f"{held / 1e6:.0f}" if held else NONE)
        lines.append(_line(cells))
    return lines


def drafted(result: Result) -> list[str]:
    """Return what drafts save, as Markdown lines."""
    head = ["tokens wrong", "tokens", "drafted", "accepted", "times fewer passes", "times as fast", "by CPU time"]
    lines = [_line(head), _rule(len(head), texts=0)]
    for one in result.savings:
        cells = [percent(one["errors"]), *(str(one[key]) for key in ("tokens", "drafted", "accepted"))]
        lines.append(_line([*cells, *(times(one[key]) for key in ("passes", "time", "processor"))]))
    return lines


def side_by_side(result: Result) -> list[str]:
    """Return what batches give, as Markdown lines."""
    head = ["batch", "tokens per second", "alone", "times as many", "with the prompts"]
    lines = [_line(head), _rule(len(head), texts=0)]
    for one in result.gains:
        batch, single, steps, whole = (statistics.median(one[key]) for key in ("batch", "single", "steps", "whole"))
        lines.append(_line([str(one["size"]), three_digits(batch), three_digits(single), times(steps), times(whole)]))
    return lines


def block(result: Result, plan: Plan, run: Mapping[str, Any], title: str) -> str:
    """Return everything that a run says, as Markdown.

    Args:
        result: What came out.
        plan: What was asked for.
        run: Date, command, versions and machine (`facts.about`).
        title: Heading.
    """
    lines = [f"### {title}", "", header(run), "", "```sh", run["command"], "```", "", weights(plan), ""]
    for section, heading in (("listen", "Listening"), ("write", "Writing")):
        rows = result.rows.get(section)
        if not rows:
            continue
        lines += [f"{heading}, {plan.seconds:g} s of audio.", "", *beside(rows), ""]
        if section == "write":
            lines += [*writing(result, plan), ""]
    if result.savings:
        lines += ["Decoding with a draft, against plain decoding of the same text.", "", *drafted(result), ""]
    if result.gains:
        lines += ["Decoding side by side, against one after the other.", "", *side_by_side(result), ""]
    if rows := result.rows.get("grow"):
        lines += [
            f"By the length of the audio, {plan.tokens_per_second:g} tokens for each second of it.",
            "",
            *grown(rows, plan, result.memory),
            "",
        ]
    measured = [bar for bar in bars(result, plan) if bar.value is not None]
    if measured and plan.model is None:  # they are meant for full size
        lines += [_line(["bar", "wanted", "measured", ""]), "|---|--:|--:|---|"]
        lines += [_line([bar.text, f"{bar.least:g}", f"{bar.value:.2f}", bar.verdict]) for bar in measured]
        lines.append("")
    lines += [*sides(result), *agreement(result), *(f"* {note}." for note in result.missing)]
    return "\n".join(lines).rstrip("\n")


def header(run: Mapping[str, Any]) -> str:
    """Return date, machine and versions in a line."""
    load = run.get("load_average")
    busy = "" if load is None else f" · load average {load} before, {run.get('load_average_after')} after"
    revision = run["revision"] or "an unknown revision"
    return (
        f"{run['date'][:10]} · {run['os']} · {run['device']['name']}, {run['device']['cores']} cores · "
        f"MLX {run['mlx']}, Python {run['python']} · qwen4b-asr {run['project']} at {revision}{busy}"
    )


def weights(plan: Plan) -> str:
    """Return what was computed with, as a sentence."""
    form = f"{plan.bits} bits" if plan.bits else plan.dtype
    if plan.model is not None:
        return f"Weights: {plan.model}; the decoder in {form}."
    cut = f", only {plan.layers} of its layers" if plan.layers else ""
    return f"Weights: random, of the true shapes of {plan.shape}; the decoder in {form}{cut}. They cost the same time."


def writing(result: Result, plan: Plan) -> list[str]:
    """Return tokens per second of every side and the share of the ceiling, as lines."""
    decode, prefill = find(result, "write", "decode"), find(result, "write", "prefill")
    if decode is None or prefill is None:
        return []
    said = []
    for name in decode.times:
        rate = tokens_per_second(decode, name, plan.tokens)
        filled = result.prompt_rows / prefill.times[name]["median"]
        said.append(f"{name} {three_digits(rate)} (prefill {three_digits(filled)})")
    lines = [f"Tokens per second, prompt of {result.prompt_rows} rows, {plan.tokens} tokens: {'; '.join(said)}."]
    if result.ceiling is not None:
        lines.append(
            f"A token reads {result.decoder_bytes / 1e9:.3f} GB of weights; the machine read at most "
            f"{result.ceiling / 1e9:.1f} GB/s in the same rounds: {percent(bandwidth_share(result, plan))} of it."
        )
    return lines


def sides(result: Result) -> list[str]:
    """Return what each side ran on, as lines."""
    lines = []
    for name, facts in result.facts.items():
        if "versions" not in facts:
            continue
        versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
        blas = f", {facts['blas']}" if facts.get("blas") else ""
        lines.append(f"* {name}: {versions}{blas}, {facts['threads']} threads.")
    return lines


def agreement(result: Result) -> list[str]:
    """Return how far the sides were from one another before they were timed, as lines."""
    gaps = {
        (row.stage, name): gap
        for rows in result.rows.values()
        for row in rows
        for name, gap in row.differences.items()
        if name in row.times
    }
    numbers = [gap for gap in gaps.values() if isinstance(gap, float)]
    lines = []
    if numbers:
        lines.append(f"* Before the rounds, rows agreed within {max(numbers):.1e} (relative L2).")
    if any(gap is None for gap in gaps.values()):
        lines.append("* Before the rounds, the token ids of all sides were equal.")
    return lines


def milliseconds(row: Row, side: str, key: str = "median") -> str:
    """Return a side's time."""
    return three_digits(1e3 * row.times[side][key]) if side in row.times else NONE


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int, texts: int = 1) -> str:
    return "|" + "---|" * texts + "--:|" * (columns - texts)
