"""A run of `tools/bench_transcribe.py`: which sides do what, in which order, and what comes out.

Sections: ``listen`` (encoder, CTC head, adaptor; beside the peers), ``write`` (prefill and decode; likewise),
``draft`` and ``batch`` (decoding with a draft, and side by side, against plain decoding) and ``grow`` (everything
together, by length of audio), these three of this project alone. A side holds only its section's part in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import rounds
from .rounds import Row
from .sides import OWN, Peer, Side, SideError, environment, start

# A draft's first pass and its last one cost the same whatever the length: as many tokens as half a minute has.
_DRAFT_TOKENS = 96


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        model: Name or directory; None for random weights.
        shape: Their shapes.
        dtype: Of the decoder.
        bits: Of its matrices; None leaves them as they are.
        layers: Of the decoder; None for all.
        sections: Any of ``listen``, ``write``, ``draft``, ``batch``, ``grow``.
        peers: Beside whom.
        lengths: Seconds of audio of the section ``grow``.
        seconds: Seconds of audio of the other two.
        tokens: Tokens that ``write`` decodes.
        tokens_per_second: Tokens that ``grow`` decodes for a second of audio.
        draft_errors: Shares of a draft's tokens that are wrong.
        batches: Utterances side by side.
        rounds: At most, for each stage.
        budget: Seconds after which no further round of a stage begins.
        threads: Of OpenBLAS and torch.
        preload: Give peers on MLX the same OpenBLAS.
        pythons: Interpreters that are there already, by peer.
        folder: Where the environments of the others are.
    """

    model: str | None
    shape: str
    dtype: str
    bits: int | None
    layers: int | None
    sections: tuple[str, ...]
    peers: tuple[Peer, ...]
    lengths: tuple[float, ...]
    seconds: float
    tokens: int
    tokens_per_second: float
    draft_errors: tuple[float, ...]
    batches: tuple[int, ...]
    rounds: int
    budget: float
    threads: int
    preload: bool
    pythons: Mapping[str, Path]
    folder: Path


@dataclass
class Result:
    """What came out.

    Attributes:
        facts: Side -> what it said of itself; and ``model``.
        rows: A row per stage and section.
        ceilings: Bytes per second that the machine was seen to read, in the rounds of ``write``.
        prompt_rows: Rows of the prompt of ``write``.
        decoder_bytes: Bytes of weights that a token reads.
        savings: Of drafts (`drafts.Saving`).
        gains: Of batches (`batches.Gain`).
        memory: Part -> bytes, of this project.
        missing: What could not be run, and why.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    ceilings: list[float] = field(default_factory=list)
    prompt_rows: int = 0
    decoder_bytes: int = 0
    savings: list[dict[str, Any]] = field(default_factory=list)
    gains: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def ceiling(self) -> float | None:
        """The most that the machine was seen to read, in bytes per second: others on it only ever take from that."""
        return max(self.ceilings, default=None)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def run(plan: Plan, home: Path) -> Result:
    """Do everything.

    Args:
        plan: What.
        home: A folder for the files of the run, which nobody needs afterwards.

    Raises:
        SideError: If this project's own side fails; a peer that fails is left out, and said so.
    """
    result = Result()
    model = _written(plan, home)
    result.facts["model"] = {key: model[key] for key in ("config", "device")}
    result.decoder_bytes = model["decoder_bytes"]
    result.prompt_rows = model["prompt_rows"][str(plan.seconds)]
    pythons = _interpreters(plan, model, result)
    setup = {
        "home": str(home),
        "directory": model["directory"],
        "config": model["config"],
        "dtype": plan.dtype,
        "tokens": plan.tokens,
        "whole_tokens": plan.tokens,
    }
    for section in plan.sections:
        if section != "listen" and model["config"]["decoder"] is None:
            result.missing.append(f"{section}: the model has no language model")
        elif section == "grow":
            _grow(plan, home, setup, result)
        elif section in ("draft", "batch"):
            _decoded_otherwise(plan, setup, section, result)
        else:
            _beside(plan, home, setup, section, pythons, result)
    return result


def _written(plan: Plan, home: Path) -> dict[str, Any]:
    """Have the model's files written by a process that ends, so that its memory is free afterwards."""
    _say("writing weights")
    side = start(OWN, "worker_own", sys.executable, plan.threads)
    try:
        wanted = {
            "model": plan.model,
            "shape": plan.shape,
            "dtype": plan.dtype,
            "bits": plan.bits,
            "layers": plan.layers,
            "listens": plan.sections == ("listen",),
            "peers": sorted({part for peer in plan.peers for part in peer.parts if part in plan.sections}),
        }
        side.ask("build", write=wanted, directory=str(home), seconds=[plan.seconds, *plan.lengths])
        return side.facts
    finally:
        side.close()


def _interpreters(plan: Plan, model: Mapping[str, Any], result: Result) -> dict[str, Path]:
    """Return the interpreter of each peer that can take part."""
    found = {}
    for peer in plan.peers:
        if not any(part in model["exported"] and part in plan.sections for part in peer.parts):
            result.missing.append(f"{peer.name}: it has nothing like what was asked for")
            continue
        try:
            found[peer.name] = plan.pythons.get(peer.name) or environment(peer, plan.folder)
        except SideError as error:
            result.missing.append(str(error))
    return found


def _beside(
    plan: Plan, home: Path, setup: dict[str, Any], part: str, pythons: Mapping[str, Path], result: Result
) -> None:
    """Time a part on this project and on every peer that has it."""
    sides = [start(OWN, "worker_own", sys.executable, plan.threads)]
    try:
        _build(sides[0], setup, [part], result)
        inputs = home / f"inputs-{part}.npz"
        sides[0].ask("make_inputs", seconds=plan.seconds, parts=[part], path=str(inputs))
        for peer in plan.peers:
            if part not in peer.parts or peer.name not in pythons:
                continue
            side = start(peer.name, peer.module, pythons[peer.name], plan.threads, preload=plan.preload and peer.mlx)
            try:
                _build(side, setup, [part], result)
                sides.append(side)
            except SideError as error:
                side.close()
                result.missing.append(str(error))
        for stage, having in rounds.stages_of(sides, inputs).items():
            if stage == "ceiling":
                continue
            _say(f"{stage}, {plan.seconds:g} s of audio: {', '.join(side.name for side in having)}")
            tokens = stage == "generate"
            check = rounds.check(having, stage, home, tokens)
            result.missing += [f"{name}, {stage}: {why}" for name, why in check.problems.items()]
            samples, readings = rounds.take(
                check.agreeing, stage, plan.rounds, plan.budget, beside="ceiling" if tokens else None
            )
            result.ceilings += [reading["bytes_per_second"] for reading in readings]
            rows = [rounds.row(name, plan.seconds, one, OWN, check.gaps) for name, one in samples.items()]
            result.rows.setdefault(part, []).extend(rows)
        result.memory[part] = sides[0].ask("peak")
    finally:
        for side in sides:
            side.close()


def _decoded_otherwise(plan: Plan, setup: dict[str, Any], section: str, result: Result) -> None:
    """Time decoding with drafts, or side by side, against plain decoding; both check that the tokens are the same."""
    side = start(OWN, "worker_own", sys.executable, plan.threads)
    try:
        _build(side, setup, ["write"], result)
        rounds_wanted = max(1, min(plan.rounds, 3))  # a round is several texts, side by side
        if section == "draft":
            _say(f"draft: {', '.join(f'{rate:.0%}' for rate in plan.draft_errors)} of its tokens wrong")
            tokens = max(_DRAFT_TOKENS, plan.tokens)
            answer = side.ask("draft", tokens=tokens, errors=list(plan.draft_errors), rounds=plan.rounds)
            result.savings = answer["savings"]
        else:
            _say(f"batch: {', '.join(map(str, plan.batches))} side by side")
            sizes = list(plan.batches)
            answer = side.ask("batch", sizes=sizes, rows=result.prompt_rows, tokens=plan.tokens, rounds=rounds_wanted)
            result.gains = answer["gains"]
    except SideError as error:
        result.missing.append(str(error))
    finally:
        side.close()


def _grow(plan: Plan, home: Path, setup: dict[str, Any], result: Result) -> None:
    """Time every stage of this project alone, by the length of the audio."""
    side = start(OWN, "worker_own", sys.executable, plan.threads)
    try:
        for seconds in plan.lengths:
            tokens = max(1, round(plan.tokens_per_second * seconds))
            _build(side, {**setup, "tokens": plan.tokens, "whole_tokens": tokens}, ["listen", "write"], result)
            inputs = home / f"inputs-{seconds:g}.npz"
            side.ask("make_inputs", seconds=seconds, parts=["listen", "write"], path=str(inputs))
            for stage in side.ask("inputs", path=str(inputs))["stages"]:
                if stage in ("ceiling", "generate"):
                    continue
                _say(f"{stage}, {seconds:g} s of audio")
                side.ask("run", stage=stage)
                if stage == "whole":
                    side.ask("peak")
                samples, _ = rounds.take([side], stage, plan.rounds, plan.budget)
                rows = [rounds.row(name, seconds, one, OWN) for name, one in samples.items()]
                result.rows.setdefault("grow", []).extend(rows)
            result.memory[f"{seconds:g} s"] = side.ask("peak")
    finally:
        side.close()


def _build(side: Side, setup: Mapping[str, Any], parts: Sequence[str], result: Result) -> None:
    side.ask("build", **setup, parts=list(parts))
    result.facts[side.name] = side.facts


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
