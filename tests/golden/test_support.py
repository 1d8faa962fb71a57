"""The comparison itself, and the refusal of files that are out of date."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from .support import TOLERANCES, GoldenMismatch, StaleGolden, compare, compare_ids, load, require_schema


def test_compare_says_what_is_off() -> None:
    wanted = np.ones((2, 3), np.float32)
    found = wanted.copy()
    found[1, 2] = 1.5
    with pytest.raises(GoldenMismatch, match=r"adaptor: rows \(2, 3\) is off.*worst at \(1, 2\): 1\.5 instead of 1"):
        compare(found, wanted, "adaptor", "rows")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_compare_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(GoldenMismatch, match="not finite"):
        compare(np.array([value], np.float32), np.array([value], np.float32), "adaptor", "rows")


def test_compare_refuses_other_shapes_and_nothing() -> None:
    with pytest.raises(GoldenMismatch, match="shape"):
        compare(np.zeros((1, 3)), np.zeros(3), "adaptor", "rows")
    with pytest.raises(GoldenMismatch, match="empty"):
        compare(np.zeros(0), np.zeros(0), "adaptor", "rows")


@pytest.mark.parametrize("stage", TOLERANCES)
def test_compare_holds_each_bound(stage: str) -> None:
    bound = TOLERANCES[stage]
    wanted = np.linspace(1, 2, 1000)
    compare(wanted, wanted, stage, "itself")
    with pytest.raises(GoldenMismatch):
        compare(wanted * (1 + 2 * bound.relative + 1e-12), wanted, stage, "relative")
    spike = wanted.copy()
    spike[3] += 2 * bound.largest + 1e-12
    with pytest.raises(GoldenMismatch):
        compare(spike, wanted, stage, "largest")


def test_compare_ids_names_the_first_step() -> None:
    compare_ids([1, 2], [1, 2], "same")
    with pytest.raises(GoldenMismatch, match="from step 1"):
        compare_ids([1, 3, 4], [1, 2, 4], "other")
    with pytest.raises(GoldenMismatch, match="from step 2"):
        compare_ids([1, 2], [1, 2, 4], "shorter")


def test_stale_schema_says_how_to_regenerate(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1)}, tmp_path / "encoder.safetensors", {"schema": "0"})
    with pytest.raises(StaleGolden, match=r"(?s)schema 0.*make_golden\.py --only encoder") as caught:
        load("encoder", tmp_path)
    assert "tests/golden/README.md" in str(caught.value)
    save_file({"x": np.zeros(1)}, tmp_path / "encoder.safetensors")
    with pytest.raises(StaleGolden, match="schema None"):
        load("encoder", tmp_path)
    require_schema("x", 1, "")
