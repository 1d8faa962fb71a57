"""tools/bench_transcribe.py: its workers' protocol, rounds and tables. No time is asserted."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench_transcribe
from bench import record, rounds, session, sides, speech_table, worker
from bench.rounds import Samples

TOOLS = Path(bench_transcribe.__file__).parent
OWN = sides.OWN

# --- The worker's protocol ------------------------------------------------------------------------------------------

FAKE = """
import numpy as np
from bench.worker import Timed, Worker, serve, stamped
import time

def build(setup):
    print("loading", setup["size"])  # must not look like an answer
    if setup["size"] < 0:
        raise ValueError("size must not be negative")
    def stages(inputs):
        return {
            "double": lambda: inputs["x"] * setup["size"],
            "generate": lambda: stamped(iter([3, 1, 2]), time.perf_counter()),
            "own": lambda: Timed({"a": 0.5}, more={"bytes_per_second": 7.0}),
            "broken": lambda: 1 / 0,
        }
    return Worker({"versions": {"fake": "1"}}, stages, np.asarray, lambda: 42, {"echo": lambda r: {"said": r["what"]}})

serve(build)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Start workers of a module that is written here; each is ended afterwards."""
    (tmp_path / "fake_peer.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{TOOLS}:{tmp_path}")
    started: list[sides.Side] = []

    def start(name: str = "fake") -> sides.Side:
        started.append(sides.Side(name, [sys.executable, "-m", "fake_peer"], {}))
        return started[-1]

    yield start
    for side in started:
        side.close()


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_a_worker_builds_runs_saves_and_tells_its_peak(fake, tmp_path):
    side = fake()
    side.ask("build", size=2)
    assert side.facts == {"versions": {"fake": "1"}}
    inputs = saved(tmp_path / "in.npz", x=np.arange(3.0))
    assert side.ask("inputs", path=inputs)["stages"] == ["double", "generate", "own", "broken"]
    answer = side.ask("run", stage="double")
    assert list(answer["seconds"]) == ["double"]
    assert answer["tokens"] == []
    assert side.ask("save", stage="double", path=str(tmp_path / "out.npy")) == {"shape": [3]}
    assert np.load(tmp_path / "out.npy").tolist() == [0, 2, 4]
    generated = side.ask("run", stage="generate")
    assert generated["tokens"] == [3, 1, 2]
    assert list(generated["seconds"]) == ["prefill", "decode"]
    own = side.ask("run", stage="own")
    assert (own["seconds"], own["bytes_per_second"]) == ({"a": 0.5}, 7.0)
    assert side.ask("peak")["framework_bytes"] == 42
    assert side.ask("echo", what="x") == {"said": "x"}


def test_a_worker_that_cannot_says_why_and_goes_on(fake, tmp_path):
    side = fake()
    with pytest.raises(sides.SideError, match="run before build"):
        side.ask("run", stage="double")
    with pytest.raises(sides.SideError, match="fake: build: ValueError: size must not be negative"):
        side.ask("build", size=-1)
    side.ask("build", size=1)
    side.ask("inputs", path=saved(tmp_path / "in.npz", x=np.ones(1)))
    with pytest.raises(sides.SideError, match="ZeroDivisionError"):
        side.ask("run", stage="broken")
    assert side.ask("run", stage="double")["seconds"]["double"] >= 0


def test_a_worker_that_ended_is_an_error(tmp_path):
    side = sides.Side("gone", [sys.executable, "-c", "import sys; sys.stdin.readline()"], {})
    with pytest.raises(sides.SideError, match="gone: its process ended"):
        side.ask("build")
    with pytest.raises(sides.SideError, match="its process ended"):
        side.ask("build")
    side.close()


def test_tokens_are_stamped_as_they_come(monkeypatch):
    clock = iter([10.0, 11.0, 13.5])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    timed = worker.stamped(iter([5, 6, 7]), 9.0)
    assert timed.tokens == [5, 6, 7]
    assert timed.seconds == {"prefill": 1.0, "decode": 3.5}


def test_every_peer_has_a_worker_and_pinned_packages():
    for peer in sides.peers("1.2.3").values():
        assert (TOOLS / "bench" / f"{peer.module}.py").is_file()
        assert any(peer.name in package.partition("==")[0] and "==" in package for package in peer.packages)
        assert not peer.mlx or "mlx" in peer.packages[0]
        assert not peer.mlx or peer.packages[0].endswith("==1.2.3")


# --- Rounds ---------------------------------------------------------------------------------------------------------


def test_every_side_is_first_in_turn():
    orders = [rounds.turns(["a", "b", "c"], turn) for turn in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert rounds.turns(["a", "b"], 1) == ["a", "b"]  # a second round runs backwards from its own start


def test_differences_of_rows_and_of_tokens():
    one = np.ones((1, 4))
    assert rounds.relative_difference(one, one[0]) == 0
    assert rounds.relative_difference(1.5 * one, one) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must agree"):
        rounds.relative_difference(one[:, :3], one)
    assert rounds.same_tokens([1, 2], [1, 2]) is None
    assert rounds.same_tokens([1, 2, 3], [1, 5, 3]) == 1
    assert rounds.same_tokens([1, 2], [1, 2, 3]) == 2


def test_a_row_has_medians_and_ratios_of_neighbours():
    samples = {
        OWN: Samples([1.0, 10.0, 2.0], [1.0, 1.0, 1.0]),
        "peer": Samples([2.0, 20.0, 6.0], [3.0, 3.0, 4.0]),
    }
    row = rounds.row("encoder", 10.0, samples, OWN, {"peer": 1e-6})
    assert row.ratios == {"peer": 2.0}  # a machine that is slower for a while does not count
    assert row.cpu_ratios == {"peer": 3.0}
    assert (row.times[OWN]["median"], row.times[OWN]["least"], row.times[OWN]["cpu"]) == (2.0, 1.0, 1.0)
    assert rounds.summary(Samples([3.0], [1.0]))["q3"] == 3.0


def test_rounds_interleave_and_end_with_the_time(fake, tmp_path):
    pair = [fake("a"), fake("b")]
    asked: list[tuple[str, str]] = []
    for side in pair:
        side.ask("build", size=1)
        side.ask("inputs", path=saved(tmp_path / "in.npz", x=np.ones(1)))
        side.ask = lambda do, side=side, ask=side.ask, **request: (  # type: ignore[method-assign]
            asked.append((side.name, request["stage"])) or ask(do, **request)
        )
    samples, extra = rounds.take(pair, "generate", 4, 60.0, beside="own")
    assert [name for name, stage in asked if stage == "generate"] == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert [answer["bytes_per_second"] for answer in extra] == [7.0] * 4
    assert {part: sorted(one) for part, one in samples.items()} == {"prefill": ["a", "b"], "decode": ["a", "b"]}
    assert all(len(one.wall) == len(one.cpu) == 4 for part in samples.values() for one in part.values())
    samples, _ = rounds.take(pair, "double", 99, 1e-9)
    assert len(samples["double"]["a"].wall) == rounds.LEAST_ROUNDS


def test_a_side_that_computes_something_else_is_left_out(fake, tmp_path):
    trio = [fake("own"), fake("same"), fake("other")]
    inputs = saved(tmp_path / "in.npz", x=np.ones(4))
    for side, size in zip(trio, (1.0, 1.0 + 1e-6, 1.1), strict=True):
        side.ask("build", size=size)
    stages = rounds.stages_of(trio, Path(inputs))
    assert list(stages) == ["double", "generate", "own", "broken"]
    check = rounds.check(trio, "double", tmp_path, tokens=False)
    assert [side.name for side in check.agreeing] == ["own", "same"]
    assert check.gaps == {"same": pytest.approx(1e-6)}
    assert check.problems == {"other": "its rows are 1.0e-01 off (relative L2)"}
    check = rounds.check(trio, "generate", tmp_path, tokens=True)
    assert (len(check.agreeing), check.gaps, check.problems) == (3, {"same": None, "other": None}, {})
    trio[1].ask("inputs", path=saved(tmp_path / "more.npz", x=np.ones(5)))
    trio[2].ask = lambda *_, **__: {"tokens": [3, 7, 2]}  # type: ignore[method-assign]
    assert "must agree" in rounds.check(trio[:2], "double", tmp_path, tokens=False).problems["same"]
    assert rounds.check(trio, "generate", tmp_path, tokens=True).problems == {"other": "its token 1 is [7], not [1]"}
    with pytest.raises(sides.SideError, match="ZeroDivisionError"):
        rounds.check(trio, "broken", tmp_path, tokens=False)
    assert (
        "KeyError" in rounds.check([trio[0], fake_without(trio[1])], "double", tmp_path, tokens=False).problems["same"]
    )


def fake_without(side: sides.Side) -> sides.Side:
    """A side that does not have what it is asked for any more."""
    asked = side.ask
    side.ask = lambda do, **request: asked(do, **{**request, "stage": "gone"})  # type: ignore[method-assign]
    return side


# --- Tables ---------------------------------------------------------------------------------------------------------


def plan(**changes: Any) -> session.Plan:
    chosen = session.Plan(
        model=None, shape="qwen3-0.6b", dtype="float32", bits=None, layers=None, sections=("listen", "write", "grow"),
        peers=(), lengths=(5.0, 10.0), seconds=10.0, tokens=11, tokens_per_second=4.0,
        draft_errors=(0.05,), batches=(8,), rounds=3, budget=1.0,
        threads=2, preload=True, pythons={}, folder=Path("x"),
    )  # fmt: skip
    return replace(chosen, **changes)


def times(stage: str, seconds: float, gaps: Any = None, **walls: float) -> rounds.Row:
    samples = {name.replace("_", "-"): Samples([wall], [2 * wall]) for name, wall in walls.items()}
    samples[OWN] = samples.pop("own")
    return rounds.row(stage, seconds, samples, OWN, gaps)


def result() -> session.Result:
    return session.Result(
        facts={
            "model": {},
            OWN: {"versions": {"mlx": "1.0"}, "blas": "libx.so", "threads": "2"},
            "torch": {"versions": {"torch": "2.0"}, "blas": None, "threads": 2},
        },
        rows={
            "listen": [
                times("encoder", 10.0, {"mlx-audio": 2e-6, "torch": 1e-6}, own=0.2, mlx_audio=0.34, torch=0.1),
                times("adaptor", 10.0, own=0.01),
            ],
            "write": [
                times("prefill", 10.0, {"mlx-lm": None}, own=0.5, mlx_lm=0.6),
                times("decode", 10.0, {"mlx-lm": None}, own=2.0, mlx_lm=2.5),
            ],
            "grow": [times(stage, s, own=0.1 * s) for s in (5.0, 10.0) for stage in ("encoder", "whole")],
        },
        ceilings=[8e9, 10e9, 9e9],
        savings=[
            {"errors": 0.05, "tokens": 96, "passes": 4.0, "time": 2.4, "processor": 2.6, "drafted": 9, "accepted": 8}
        ],
        gains=[
            {
                "size": 8,
                "batch": [9.0, 12.0],
                "single": [3.0, 3.0],
                "steps": [3.5, 4.5],
                "whole": [3.0, 3.0],
                "redone": 0,
            }
        ],
        prompt_rows=50,
        decoder_bytes=10**9,
        memory={"5 s": {"framework_bytes": 3 * 10**9, "process_bytes": None}},
        missing=["funasr-mlx: it has nothing like what was asked for"],
    )


RUN: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00", "command": "python tools/bench_transcribe.py", "project": "0.1.0",
    "revision": "abc", "mlx": "1.0", "python": "3.11", "os": "Linux", "device": {"name": "Toy", "cores": 2},
    "load_average": 0.1, "load_average_after": 0.2,
}  # fmt: skip


def test_the_bars_are_read_from_the_rows():
    found = {bar.text: bar for bar in speech_table.bars(result(), plan())}
    assert {text: bar.value for text, bar in found.items()} == {
        "encoder, times mlx-audio's speed": pytest.approx(1.7),
        "encoder, times torch's speed": pytest.approx(0.5),
        "decode, times mlx-lm's tokens per second": pytest.approx(1.25),
        "decode, share of the bandwidth ceiling": pytest.approx(0.5),  # 5 tokens of 1 GB in a second, of 10 GB
        "draft with 5 % of its tokens wrong, times fewer passes": 4.0,
        "draft with 5 % of its tokens wrong, times as fast as plain": 2.4,
        "batch of 8, times as many tokens per second": 4.0,
    }
    assert [bar.verdict for bar in found.values()] == ["met", "missed", "met", "missed", "met", "missed", "met"]
    empty = speech_table.bars(session.Result(), plan())
    assert {bar.verdict for bar in empty} == {"not measured"}


def test_the_block_says_what_ran_and_what_came_out():
    text = speech_table.block(result(), plan(), RUN, "Toy")
    for line in (
        "### Toy",
        "2026-01-02 · Linux · Toy, 2 cores · MLX 1.0, Python 3.11 · qwen4b-asr 0.1.0 at abc · load average 0.1 before, "
        "0.2 after",
        "python tools/bench_transcribe.py",
        "Weights: random, of the true shapes of qwen3-0.6b; the decoder in float32. They cost the same time.",
        "| stage | ms | CPU ms | mlx-audio, ms | times | CPU times | torch, ms | times | CPU times |",
        "| encoder | 200 | 400 | 340 | 1.70 | 1.70 | 100 | 0.50 | 0.50 |",
        "| adaptor | 10.0 | 20.0 | – | – | – | – | – | – |",
        "Tokens per second, prompt of 50 rows, 11 tokens: mlx-lm 4.00 (prefill 83.3); qwen4b-asr 5.00 (prefill 100).",
        "A token reads 1.000 GB of weights; the machine read at most 10.0 GB/s in the same rounds: 50 % of it.",
        "| 5 % | 96 | 9 | 8 | 4.00 | 2.40 | 2.60 |",
        "| 8 | 10.5 | 3.00 | 4.00 | 3.00 |",
        "| bar | wanted | measured |  |",
        "| encoder, times torch's speed | 0.8 | 0.50 | missed |",
        "| 5 | 500 | 500 | 20 | 0.100 | 3000 |",
        "| 10 | 1000 | 1000 | 40 | 0.100 | – |",
        "* qwen4b-asr: mlx 1.0, libx.so, 2 threads.",
        "* torch: torch 2.0, 2 threads.",
        "* Before the rounds, rows agreed within 2.0e-06 (relative L2).",
        "* Before the rounds, the token ids of all sides were equal.",
        "* funasr-mlx: it has nothing like what was asked for.",
    ):
        assert line in text.splitlines()


def test_a_bar_is_shown_where_it_was_measured_at_full_size():
    assert "| bar |" not in speech_table.block(result(), plan(model="demo"), RUN, "Toy")
    partly = session.Result(rows={"listen": result().rows["listen"]})
    shown = speech_table.block(partly, plan(), RUN, "Toy")
    assert "mlx-audio's speed" in shown
    assert "bandwidth" not in shown


def test_the_weights_are_named():
    assert speech_table.weights(plan(bits=4, layers=2)) == (
        "Weights: random, of the true shapes of qwen3-0.6b; the decoder in 4 bits, only 2 of its layers. "
        "They cost the same time."
    )
    assert speech_table.weights(plan(model="demo")) == "Weights: demo; the decoder in float32."


def test_a_run_is_json():
    assert json.loads(json.dumps(result().as_json()))["rows"]["listen"][0]["stage"] == "encoder"


def test_the_document_has_a_place_for_the_tables():
    text = bench_transcribe.DOCUMENT.read_text(encoding="utf-8")
    block = speech_table.block(result(), plan(), RUN, "Toy")
    once = record.with_block(text, "toy", block, record.SPEECH_AREA_BEGIN)
    assert record.with_block(once, "toy", block, record.SPEECH_AREA_BEGIN) == once


# --- The command line -----------------------------------------------------------------------------------------------


def test_the_command_is_shown_without_places():
    words = ["--torch-python", "/somewhere/env/bin/python", "--json=/else/run.json", "--seconds", "5,10"]
    assert bench_transcribe.command_line(words) == (
        "python tools/bench_transcribe.py --torch-python python --json=run.json --seconds 5,10"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "whisper"], "--against whisper: must be one of mlx-lm, mlx-audio, funasr-mlx, torch"),
        (["--sections", "sing"], "--sections sing: must be one of listen, write, draft, batch, grow"),
        (["--shape", "qwen3-8b"], "--shape qwen3-8b: must be one of qwen3-0.6b, qwen3-1.7b, qwen3-4b"),
        (["--tokens", "1"], "--tokens must be at least 2"),
    ],
)
def test_what_does_not_exist_is_refused(words, said, capsys):
    parser = bench_transcribe.arguments()
    with pytest.raises(SystemExit):
        bench_transcribe.make_plan(parser, parser.parse_args(words))
    assert said in capsys.readouterr().err


def test_a_plan_is_read_from_the_words(tmp_path):
    parser = bench_transcribe.arguments()
    words = ["--against", "torch,mlx-lm", "--torch-python", "py", "--seconds", "5,7.5", "--sections", "write,listen"]
    found = bench_transcribe.make_plan(parser, parser.parse_args([*words, "--env-dir", str(tmp_path)]))
    assert [peer.name for peer in found.peers] == ["mlx-lm", "torch"]
    assert (found.lengths, found.sections, found.folder) == ((5.0, 7.5), ("listen", "write"), tmp_path)
    assert found.pythons == {"torch": Path("py")}
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        bench_transcribe.numbers("5,-1")
