"""tools/bench: statistics, taking turns, the ways to compute, comparing, measuring. No time is asserted."""

import math
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import check, facts, host_counts, measure, paths, roofline, rows, timing
from qwen4b_asr.kernels import _loader, operations
from tests.helpers.bench_toys import CPU, GPU, ROOF, make_inputs, measured, toy, toy_case

# --- Statistics ---------------------------------------------------------------------------------------------------


def test_median_and_quartiles():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Summary(3.0, 2.0, 4.0)
    assert timing.summarise([7.0]) == timing.Summary(7.0, 7.0, 7.0)


def test_a_ratio_is_of_neighbours_in_time():
    # A machine that gets ten times slower halfway: each round still says 2.
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.ratio([2.0, 20.0, 6.0], [1.0, 1.0, 2.0]) == 3.0


@given(st.floats(1e-7, 1e-1), st.floats(0, 1e-3), st.integers(1, 500))
def test_a_chain_lasts_long_enough_and_no_longer_than_allowed(each, launch, most):
    def run(length: int) -> float:
        return launch + each * length

    length = timing.chain_length(run, 0.02, most)
    assert 1 <= length <= most
    assert length == most or run(length) >= 0.02
    assert length == 1 or run(length - 1) < 0.02 * (1 + 1e-9)  # and not longer than it has to be


def test_every_way_is_sampled_in_every_round_and_none_is_always_first(monkeypatch):
    order: list[str] = []

    def chain(call, inputs, length, first=0):
        order.append(call)
        return 1.0, 3.0 * length

    monkeypatch.setattr(timing, "run_chain", chain)
    samples = timing.take_turns({"a": "a", "b": "b", "c": "c"}, [{}], 4, rounds=6, seconds=60)
    turns = [order[i : i + 6 : 2] for i in range(0, len(order), 6)]  # each sample is followed by one call alone
    assert len(turns) == 6
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0] for turn in turns} == {"a", "b", "c"}
    assert samples["b"].total == [3.0] * 6
    assert samples["b"].build == [0.25] * 6
    assert samples["b"].alone == [3.0] * 6


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-9, timing.LEAST_ROUNDS), (60.0, 5)])
def test_rounds_end_with_the_time_but_not_before_there_are_a_few(seconds, rounds):
    samples = timing.take_turns({"a": lambda given: mx.array(1.0)}, [{}], 1, rounds=5, seconds=seconds)
    assert len(samples["a"].total) == rounds


def test_a_chain_is_evaluated_and_waited_for_on_each_set_of_inputs(monkeypatch):
    events: list[Any] = []
    monkeypatch.setattr(timing.mx, "eval", lambda results: events.append(("eval", list(results))))
    monkeypatch.setattr(timing.mx, "synchronize", lambda: events.append("wait"))
    build, total = timing.run_chain(lambda given: given["i"], [{"i": 0}, {"i": 1}, {"i": 2}], 4, first=2)
    assert events == [("eval", [2, 0, 1, 2]), "wait"]
    assert 0 <= build <= total


# --- Roofline -----------------------------------------------------------------------------------------------------


def test_the_floor_is_what_takes_longer():
    assert ROOF.floor(10**6, 10**6, "float32") == roofline.Floor(1e-3, "bytes")
    assert ROOF.floor(10**6, 10**9, "float32") == roofline.Floor(0.1, "flops")
    assert ROOF.floor(None, 10**9, "float32") == roofline.Floor(0.1, "flops")
    assert ROOF.floor(10**6, 10**9, "bfloat16") == roofline.Floor(1e-3, "bytes")  # its products were not measured
    assert ROOF.floor(None, None, "float32") is None
    slow_halves = roofline.Roofline(1e9, {"float32": 1e10, "float16": 1e9, "bfloat16": 4e10})
    assert slow_halves.floor(None, 10**9, "float16").seconds == 0.1
    assert slow_halves.floor(None, 10**9, "bfloat16").seconds == 0.025


def test_the_roofline_is_measured_for_float32_and_the_types_asked_for(monkeypatch):
    asked: list[tuple[mx.Dtype, int]] = []

    def best(function, *arrays):
        asked.append((arrays[0].dtype, arrays[0].size))
        return 2.0

    monkeypatch.setattr(roofline, "_best", best)
    monkeypatch.setattr(roofline, "COPY_MIB", {"cpu": 1})
    monkeypatch.setattr(roofline, "OTHER_SQUARE", {"cpu": 16})
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": {"float32": 32}})
    found = roofline.measure_roofline("cpu", ["bfloat16"])
    assert found.bytes_per_second == 2 * 2**20 / 2.0  # read and written
    assert found.flops_per_second == {"float32": 2 * 32**3 / 2.0, "bfloat16": 2 * 16**3 / 2.0}
    assert asked == [(mx.float32, 2**18), (mx.float32, 32 * 32), (mx.bfloat16, 16 * 16)]


# --- Ways ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_there_is_no_kernel():
    way = paths.ways(toy(), make_inputs(), CPU)["kernel"]
    assert (way.call, way.reason) == (None, paths.NO_GPU)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_stand_in_for_the_gpu_is_never_timed(device):
    def emulated(*_: Any, **__: Any) -> Any:
        raise AssertionError("the emulated kernel was run to be timed")

    with _loader.override("metal", lambda **_: emulated):
        assert _loader.backend() == "metal"  # the package believes it
        found = measured(toy(kernel=emulated), device)
    assert found.ways["kernel"].state == "absent"
    assert found.times_best is None
    assert found.ways["reference"].state == "timed"


def test_the_devices_backend_is_what_is_there_not_what_a_test_says():
    before = facts.default_device()
    with _loader.override("metal", lambda **_: None):
        assert facts.default_device() == before


def test_without_a_compiler_nothing_claims_to_be_compiled(monkeypatch):
    monkeypatch.setattr(paths, "has_compiler", lambda: False)
    assert "g++" in paths.ways(toy(), make_inputs(), CPU)["compiled"].reason
    assert paths.ways(toy(), make_inputs(), GPU)["compiled"].call is not None


def test_the_compiler_is_looked_for_as_mlx_does(monkeypatch, tmp_path):
    paths.has_compiler.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not paths.has_compiler()
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    paths.has_compiler.cache_clear()
    assert paths.has_compiler()
    paths.has_compiler.cache_clear()


def test_the_compiled_way_hands_arrays_over_and_keeps_constants(monkeypatch):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(paths.mx, "compile", lambda f: lambda arrays: (seen.append(dict(arrays)), f(arrays))[1])
    inputs = make_inputs()
    call = paths.ways(toy(), inputs, GPU)["compiled"].call
    assert call is not None
    assert mx.array_equal(call(inputs), inputs["x"] * 2.0)
    assert [list(arrays) for arrays in seen] == [["x"]]


def test_mlxs_fused_operations_belong_to_operations_that_exist():
    assert set(paths.FUSED) <= set(operations())


@pytest.mark.parametrize("name", ["fsmn"])
def test_mlxs_fused_operation_computes_the_same(name):
    operation = operations()[name]
    given = next(case for case in operation.cases if "check" in case.roles).arguments("float32")
    call = paths.ways(operation, given, CPU)["mlx"].call
    assert call is not None
    assert check.difference(call(given), operation.reference(**given)) is None


def test_where_the_reference_is_the_fused_operation_it_is_not_timed_twice():
    for name in ("attention", "qk_norm_rope"):
        assert paths.ways(operations()[name], {}, GPU)["mlx"].reason == paths.IS_REFERENCE
    assert paths.ways(operations()["fsmn"], {}, GPU)["mlx"].reason == paths.IS_REFERENCE  # on a CPU it is not
    assert paths.ways(toy(), {}, GPU)["mlx"].reason != paths.IS_REFERENCE


@pytest.mark.parametrize("name", list(operations()))
def test_each_operation_has_something_to_time(name):
    benches = [case for case in operations()[name].cases if "bench" in case.roles]
    assert benches
    assert all(case.bytes is not None for case in benches)


# --- Comparing ----------------------------------------------------------------------------------------------------


def test_equal_results_pass():
    x = mx.array([1.0, -2.0, math.inf, math.nan])
    assert check.difference(x, x) is None
    assert check.difference((x, mx.arange(3)), [x, mx.arange(3)]) is None
    assert check.difference(mx.array([1.0, 2.0 + 1e-5]), mx.array([1.0, 2.0])) is None


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (mx.array([1.0, 2.001, 3.0]), "off the reference"),
        (mx.array([1.0, math.nan, 3.0]), "infinities or NaN"),
        (mx.array([1.0, 2.0]), "instead of"),
        (mx.array([1.0, 2.0, 3.0], dtype=mx.float16), "instead of"),
        ([mx.array([1.0, 2.0, 3.0]), mx.array(1)], "2 results instead of 1"),
    ],
)
def test_a_difference_is_said(got, said):
    assert said in (check.difference(got, mx.array([1.0, 2.0, 3.0])) or "")


def test_whole_numbers_must_be_equal():
    assert "1 of 3 values" in (check.difference(mx.array([1, 2, 4]), mx.array([1, 2, 3])) or "")


def test_one_wrong_row_of_a_long_result_is_seen():
    wanted = mx.random.normal((500, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    got = mx.concatenate([wanted[:499], wanted[:1]])
    assert check.difference(got, wanted)


def test_the_small_cases_are_compared():
    assert check.self_check(toy()) is None
    assert "small, float32" in (check.self_check(toy(kernel=lambda x, by: x * by + 0.1)) or "")


# --- Measuring ----------------------------------------------------------------------------------------------------


def test_a_row_on_a_gpu_has_the_kernel_and_its_ratios(monkeypatch):
    seconds = {"kernel": 1e-3, "reference": 8e-3, "compiled": 4e-3}

    def turns(calls, inputs, length, rounds, limit):
        return {name: timing.Samples([seconds[name]] * 3, [1e-4] * 3, [0.1] * 3) for name in calls}

    monkeypatch.setattr(measure, "take_turns", turns)
    found = measured(toy())
    assert found.best == "compiled"
    assert found.times_best == pytest.approx(4.0)
    assert found.ways["kernel"].times_reference == pytest.approx(8.0)
    assert found.ways["reference"].times_reference == pytest.approx(1.0)
    assert found.ways["mlx"].state == "absent"
    assert (found.bytes, found.flops, found.rounds) == (256, 32, 3)
    assert found.roofline_share("kernel") == pytest.approx(256 / 1e9 / 1e-3)
    assert found.spread == 0.0
    assert not found.broken


def test_what_differs_is_not_timed_and_breaks_the_run():
    found = measured(toy(kernel=lambda x, by: x * by + 1))
    assert found.ways["kernel"].state == "wrong"
    assert found.ways["kernel"].median is None
    assert found.broken
    assert found.ways["reference"].state == "timed"


def test_what_is_not_asked_to_be_checked_is_timed():
    assert measured(toy(kernel=lambda x, by: x), effort=measure.Effort(3, 0.01, 1e-6)).ways["kernel"].state == "timed"


def test_what_raises_is_named_and_the_others_are_timed():
    def broken(x, by):
        raise RuntimeError("\nno such function: simd_sum\nlong text")

    found = measured(toy(kernel=broken))
    assert found.ways["kernel"] == rows.Outcome("failed", "RuntimeError: no such function: simd_sum")
    assert found.broken
    assert found.ways["compiled"].state == "timed"


def test_a_kernel_known_to_be_wrong_is_not_run():
    def kernel(x, by):
        raise AssertionError("run")

    found = measured(toy(kernel=kernel), instead=rows.Outcome("wrong", "tiny case"))
    assert found.ways["kernel"] == rows.Outcome("wrong", "tiny case")


def test_inputs_do_not_stay_in_the_cache():
    size = 4 * 8 * 4
    assert len(measure.input_sets(toy_case(), "float32", 3 * size)) == 3
    assert len(measure.input_sets(toy_case(), "float32", 2**30)) == measure.MOST_SETS
    first, second = measure.input_sets(toy_case(), "float32", 2 * size)
    assert not mx.array_equal(first["x"], second["x"])


# --- Counts -------------------------------------------------------------------------------------------------------


def test_counts_are_added_up_over_the_launches(monkeypatch):
    def metal_kernel(*, threads):
        def launch(**_):
            return [mx.array(1.0)]

        launch.statistics = SimpleNamespace(threads=threads, barriers=2, simd_calls=3, threadgroup_bytes=10 * threads)
        return launch

    def kernel(x, by):
        factory = _loader.current_override()[0].factory
        return [factory(threads=threads)()[0] for threads in (8, 4)]

    monkeypatch.setattr(host_counts, "_runner", lambda: SimpleNamespace(metal_kernel=metal_kernel))
    assert host_counts.count(toy(kernel=kernel), toy_case(), "float32") == {
        "launches": 2, "threads": 12, "barrier_calls": 4, "simd_calls": 6, "threadgroup_bytes": 80,
    }  # fmt: skip


def test_counts_of_a_real_kernel():
    if reason := host_counts.unavailable():
        pytest.skip(reason)
    operation = operations()["fsmn"]
    case = operation.cases[0]
    counts = host_counts.count(operation, case, "float32")
    batch, _, width = operation.reference(**case.arguments("float32")).shape
    assert counts["launches"] == 1
    assert counts["threads"] >= batch * width
    assert counts["barrier_calls"] == 0


def test_where_the_runner_is_not_along_that_is_said(monkeypatch):
    def gone():
        raise ImportError("No module named 'tests.helpers'")

    monkeypatch.setattr(host_counts, "_runner", gone)
    assert "the checkout's tests/helpers" in (host_counts.unavailable() or "")
