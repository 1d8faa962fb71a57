"""The worker's end of `bench.sides`: one JSON request a line in, one JSON answer a line out.

Each side of `tools/bench_transcribe.py` is a process of its own interpreter that runs one module ``peer_worker_*`` (or
``worker_own``). It loads its model once and then answers, so that rounds can interleave between loaded processes.
Nothing but the standard library and NumPy is imported here: this runs in every peer's environment.

Requests, by ``do``: ``build`` (setup) → facts; ``inputs`` (path of an .npz) → names of the stages; ``run`` (stage) →
seconds, and token ids where there are some; ``save`` (stage, path) → the result's shape; ``peak`` → bytes since
the last time it was asked. An answer with ``error`` says why there is no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Stage = Callable[[], Any]
"""Computes, waits for the result and returns it; or a `Timed`, if it took its own times."""


@dataclass
class Timed:
    """A stage that timed its own parts.

    Attributes:
        seconds: Wall time by the name of the part.
        tokens: Token ids, if it wrote some.
        more: Further values for the answer.
    """

    seconds: dict[str, float]
    tokens: list[int] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Worker:
    """What a side can do once it has loaded its model.

    Attributes:
        facts: What it says of itself: versions, threads, device.
        stages: From a set of inputs by name, the stages that it can run on them.
        to_numpy: Turns a result into a NumPy array.
        peak: Bytes that its framework held at most since the last call; None where it does not count.
        verbs: Further requests that it answers.
    """

    facts: dict[str, Any]
    stages: Callable[[Mapping[str, np.ndarray]], dict[str, Stage]]
    to_numpy: Callable[[Any], np.ndarray]
    peak: Callable[[], int | None] = lambda: None
    verbs: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)


def serve(build: Callable[[dict[str, Any]], Worker]) -> None:
    """Answer requests on standard input until it ends.

    Args:
        build: Makes the worker from the setup of the ``build`` request.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print must not look like an answer
    state = _State(build)
    for line in sys.stdin:
        try:
            answer = state.answer(json.loads(line))
        except Exception as error:  # the parent decides what a side that cannot means
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class _State:
    def __init__(self, build: Callable[[dict[str, Any]], Worker]) -> None:
        self._build = build
        self._worker: Worker | None = None
        self._stages: dict[str, Stage] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = request["do"]
        if verb == "build":
            self._stages, self._worker = {}, None  # the old model goes before the new one comes
            self._worker = self._build(request)
            return {"facts": self._worker.facts}
        if self._worker is None:
            raise RuntimeError(f"{verb} before build")
        if verb == "inputs":
            with np.load(request["path"]) as file:
                self._stages = self._worker.stages(dict(file))
            return {"stages": list(self._stages)}
        if verb == "run":
            return timed(self._stages[request["stage"]], request["stage"])
        if verb == "save":
            array = self._worker.to_numpy(self._stages[request["stage"]]())
            np.save(request["path"], array)
            return {"shape": list(array.shape)}
        if verb == "peak":
            return {"framework_bytes": self._worker.peak(), "process_bytes": process_peak()}
        return self._worker.verbs[verb](request)


def stamped(tokens: Iterator[int], start: float) -> Timed:
    """Take token ids as they come: ``prefill`` is until the first, ``decode`` from there to the last.

    What a loop still computes behind the last token is not counted, for loops differ in that.

    Args:
        tokens: Ids, at least one.
        start: When the prompt was handed over.
    """
    written: list[int] = []
    first = last = start
    for token in tokens:
        last = time.perf_counter()
        first = first if written else last
        written.append(token)
    return Timed({"prefill": first - start, "decode": last - first}, written)


def timed(stage: Stage, name: str) -> dict[str, Any]:
    """Run a stage and return the answer that holds its seconds: of wall time by part, of the processor in all."""
    wall, busy = time.perf_counter(), time.process_time()
    result = stage()
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    if isinstance(result, Timed):
        return {"seconds": result.seconds, "cpu_seconds": busy, "tokens": result.tokens, **result.more}
    return {"seconds": {name: wall}, "cpu_seconds": busy, "tokens": []}


def process_peak() -> int | None:
    """Return the most memory this process held since the last call, in bytes; None where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
