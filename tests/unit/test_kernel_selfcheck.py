"""The check before a kernel is trusted: how results are judged, and what is remembered of it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import qwen4b_asr.kernels._dispatch as dispatch
import qwen4b_asr.kernels._selfcheck as selfcheck
from qwen4b_asr.kernels._dispatch import KernelWarning
from tests.helpers.kernel_toy import HEAD, Spy, failing, make

pytestmark = pytest.mark.usefixtures("toy")

# --- Judging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_errors_are_measured_in_the_plain_operations_own(dtype):
    exact = mx.array(np.random.default_rng(1).standard_normal(200).astype(np.float32))
    kind = getattr(mx, dtype)
    plain = exact.astype(kind)
    own = mx.abs(plain.astype(mx.float32) - exact).max().item()
    eps, scale = mx.finfo(kind).eps, mx.abs(exact).max().item()
    bound = 2 * own + selfcheck.ALLOWANCE[dtype] * eps * scale
    peak = mx.argmax(mx.abs(exact)).item()

    def moved(by):
        values = np.array(exact)
        values[peak] += by
        return mx.array(values).astype(kind)

    assert selfcheck.compare(plain, plain, exact) is None
    assert selfcheck.compare(moved(0.5 * bound), plain, exact) is None
    assert "error" in selfcheck.compare(moved(2 * bound), plain, exact)


def test_what_is_no_float_must_be_equal():
    ids = mx.array([3, 1, 2], mx.int32)
    assert selfcheck.compare(ids, ids, ids) is None
    assert selfcheck.compare(mx.array([3, 1, 1], mx.int32), ids, ids) == "1 of 3 values differ"


def test_infinities_and_nan_must_be_in_their_places():
    plain = mx.array([1.0, float("inf"), float("nan")])
    assert selfcheck.compare(plain, plain, plain) is None
    for values in ([1.0, 2.0, float("nan")], [1.0, float("inf"), 0.0], [1.0, -float("inf"), float("nan")]):
        assert selfcheck.compare(mx.array(values), plain, plain)
    assert selfcheck.compare(mx.array([float("nan"), float("inf"), float("nan")]), plain, plain)


# --- What is remembered -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_a_passed_check_is_remembered_on_disk(tmp_path):
    make(Spy()).ready()
    (path,) = (tmp_path / "cache").rglob("*.json")
    assert {"kernel", "sources", "mlx", "backend", "device", "system"} == set(json.loads(path.read_text()))
    spy = Spy()
    operation = make(spy)
    assert operation.state() == dispatch.State("used", "self-check passed earlier")
    assert spy.calls == 0
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [path]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "change",
    [
        lambda folder, patch: (folder / "scaled.metal").write_text(HEAD + "// changed\n"),
        lambda folder, patch: patch.setattr(selfcheck, "version", lambda _: "99"),
        lambda folder, patch: patch.setattr(mx, "device_info", lambda: {"device_name": "another"}),
        lambda folder, patch: patch.setattr(selfcheck.platform, "platform", lambda: "another"),
        lambda folder, patch: patch.setattr(dispatch.inspect, "getfile", lambda _: str(folder / "scaled.metal")),
        lambda folder, patch: [path.write_text("{") for path in (folder / "cache").rglob("*.json")],
        lambda folder, patch: [path.write_text("{}") for path in (folder / "cache").rglob("*.json")],
        lambda folder, patch: [path.write_bytes(b"\xff") for path in (folder / "cache").rglob("*.json")],
    ],
)
def test_another_machine_kernel_or_damage_is_checked_anew(tmp_path, monkeypatch, change):
    make(Spy()).ready()
    change(tmp_path, monkeypatch)
    spy = Spy()
    assert make(spy).state().detail == "self-check passed"
    assert spy.calls == 3


@pytest.mark.usefixtures("gpu")
def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert make(Spy()).ready()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert selfcheck.cache_folder() is None
    assert make(Spy()).ready()


@pytest.mark.usefixtures("gpu")
def test_a_failure_is_not_remembered(tmp_path):
    spy = Spy()
    spy.body = failing
    with pytest.warns(KernelWarning):
        make(spy).ready()
    assert not (tmp_path / "cache").exists()
    assert make(Spy()).ready()


def test_the_cache_lies_where_the_system_wants_it(tmp_path, monkeypatch):
    assert selfcheck.cache_folder() == tmp_path / "cache/qwen4b-asr/kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(selfcheck.sys, "platform", "darwin")
    assert selfcheck.cache_folder() == tmp_path / "Library/Caches/qwen4b-asr/kernels"
    monkeypatch.setattr(selfcheck.sys, "platform", "linux")
    assert selfcheck.cache_folder() == tmp_path / ".cache/qwen4b-asr/kernels"
