"""A toy operation, devices and rows with round numbers, for the tests of tools/bench."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from bench import facts, measure, paths, roofline, rows
from qwen4b_asr.kernels._cases import Case

CPU = facts.Device("cpu", None, "Toy CPU", 2)
GPU = facts.Device("gpu", "metal", "Toy M9", 8)
ROOF = roofline.Roofline(1e9, {"float32": 1e10})
QUICK = measure.Effort(rounds=3, seconds=0.01, sample_seconds=1e-6, check=True)


def make(rng, dtype) -> dict[str, Any]:
    return {"x": mx.array(rng.standard_normal((4, 8))).astype(dtype), "by": 2.0}


def toy_case(name: str = "small", **options: Any) -> Case:
    """A case of the toy operation: 4 x 8 values."""
    options = {"bytes": lambda given: 2 * given["x"].nbytes, "flops": lambda given: given["x"].size, **options}
    return Case(name, make, roles=frozenset({"check", "bench"}), **options)


def double(x: mx.array, by: float) -> mx.array:
    """The toy operation."""
    return x * by


def toy(kernel=double, reference=double, *, name: str = "toy", cases: tuple[Case, ...] = (toy_case(),)) -> Any:
    """An operation that looks like the package's."""
    return SimpleNamespace(name=name, kernel=kernel, reference=reference, cases=cases)


def measured(operation: Any, device: facts.Device = GPU, effort: measure.Effort = QUICK, **options: Any) -> rows.Row:
    """The row of the toy's case."""
    return measure.measure(operation, operation.cases[0], "float32", device, ROOF, effort, **options)


def outcome(median: float) -> rows.Outcome:
    return rows.Outcome("timed", median=median, q1=0.9 * median, q3=1.1 * median, build=0.0, alone=2 * median)


def row(kernel: rows.Outcome | None = None, **options: Any) -> rows.Row:
    """A row with round numbers: reference 4 ms, compiled 2 ms, no fused operation."""
    ways = {
        "kernel": kernel or rows.Outcome("absent", paths.NO_GPU),
        "reference": outcome(4e-3),
        "compiled": outcome(2e-3),
        "mlx": rows.Outcome("absent", paths.IS_REFERENCE),
    }
    plain: dict[str, Any] = {
        "kernel": "toy", "case": "small", "dtype": "float32", "bytes": 10**6, "flops": 10,
        "floor": roofline.Floor(1e-3, "bytes"), "rounds": 3, "chain": 1, "ways": ways, "best": "compiled",
    }  # fmt: skip
    return rows.Row(**{**plain, **options})


def run_facts(device: facts.Device = CPU) -> dict[str, Any]:
    """What every row of a run says."""
    said = facts.about("2026-01-02T03:04:05+00:00", "python tools/bench_kernels.py --record", "/usr/lib/libblas.so")
    ceilings = {"bytes_per_second": 1e9, "flops_per_second": {"float32": 1e10}}
    return {**said, "device": vars(device), "roofline": ceilings, "load_average": 0.1, "load_average_after": 0.2}


def make_inputs() -> dict[str, Any]:
    """The toy's arguments."""
    return toy_case().arguments("float32")
