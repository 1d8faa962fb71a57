"""Dispatch: when a kernel is used, what happens when it fails, and whose gradients there are."""

import json
import threading
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import qwen4b_asr.kernels._dispatch as dispatch
import qwen4b_asr.kernels._selfcheck as selfcheck
import qwen4b_asr.kernels._sources as sources
import qwen4b_asr.kernels._switch as switch
from qwen4b_asr.errors import ConfigError
from qwen4b_asr.kernels import NAMES, use
from qwen4b_asr.kernels._cases import Case
from qwen4b_asr.kernels._dispatch import KernelWarning, Operation
from qwen4b_asr.kernels._loader import override

HEAD = """\
// kernel: scaled
// computes: y = x * w
// inputs:
//   x (N) float32
// outputs:
//   y (N) float32
// grid: N
// threadgroup: 1
// vjp: reference
// --- body
y[0] = x[0];
"""


def reference(x: mx.array, w: mx.array, *, power: int = 1) -> mx.array:
    """The plain operations."""
    return (x * w) ** power


def arguments(rng: np.random.Generator, dtype: mx.Dtype) -> dict:
    """A small input."""
    return {"x": mx.array(rng.standard_normal(50)).astype(dtype), "w": mx.array(2.0).astype(dtype)}


CHECK = Case("small", arguments)
OTHER = Case("other", arguments, roles=frozenset({"test"}))


class Spy:
    """A kernel: the reference, or what a test puts in its place."""

    def __init__(self) -> None:
        self.calls = 0
        self.body = reference

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.body(*args, **kwargs)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Another source folder, another cache, no choice made."""
    (tmp_path / "scaled.metal").write_text(HEAD)
    monkeypatch.setattr(sources, "kernel_sources", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    monkeypatch.setattr(switch, "_KNOWN", set(NAMES))
    monkeypatch.setattr(switch, "_CHOICES", [])
    monkeypatch.setattr(dispatch.inspect, "getfile", lambda _: __file__)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the dispatcher can tell."""
    monkeypatch.setattr(dispatch, "backend", lambda: "metal")


def make(spy: Spy, **changes) -> Operation:
    options = {"kernel": spy, "reference": reference, "cases": (CHECK, OTHER), "files": ("scaled.metal",)} | changes
    return Operation("scaled", **options)


X, W = mx.arange(4.0), mx.array(3.0)


def test_without_a_gpu_the_plain_operations_run():
    spy = Spy()
    operation = make(spy)
    assert operation(X, W).tolist() == [0, 3, 6, 9]
    assert (operation.ready(), spy.calls, operation.state().status) == (False, 0, "plain")


@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_agrees_is_used():
    spy = Spy()
    operation = make(spy)
    assert operation.state() == dispatch.State("used", "self-check passed")
    assert spy.calls == 3  # the check case in each type, and no other case
    assert operation(X, w=W, power=2).tolist() == [0, 9, 36, 81]
    assert operation(X, W).tolist() == [0, 3, 6, 9]
    assert spy.calls == 5


def failing(*args, **kwargs):
    raise RuntimeError("\n  cannot compile\nline 2")


WRONG = [
    (failing, "RuntimeError:"),
    (lambda x, w: reference(x, w) + 0.02, "small, float32, result 0: error 0.02"),
    (lambda x, w: reference(x, w).astype(mx.float32), "small, float16, result 0: (50,) of mlx.core.float32 instead"),
    (lambda x, w: reference(x, w)[:-1], "small, float32, result 0: (49,)"),
    (lambda x, w: (reference(x, w), X), "small, float32: 2 results instead of 1"),
    (lambda x, w: mx.where(x == x[7], float("nan"), reference(x, w)), "infinities or NaN"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("body", "said"), WRONG)
def test_a_kernel_that_disagrees_is_left_alone_with_one_warning(body, said):
    spy = Spy()
    spy.body = body
    operation = make(spy)
    with pytest.warns(KernelWarning) as caught:
        assert operation(X, W).tolist() == [0, 3, 6, 9]
    (warning,) = caught
    assert issubclass(KernelWarning, RuntimeWarning)
    assert "the kernel scaled is not used" in str(warning.message)
    assert "doctor" in str(warning.message)
    calls = spy.calls
    assert operation(X, W).tolist() == [0, 3, 6, 9]  # no second warning: it would be an error here
    assert spy.calls == calls
    assert operation.state().status == "failed"
    assert said in operation.state().detail


@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_fails_later_is_left_alone_too():
    spy = Spy()
    operation = make(spy)
    operation(X, W)
    spy.body = failing
    with pytest.warns(KernelWarning, match="cannot compile|RuntimeError"):
        assert operation(X, W).tolist() == [0, 3, 6, 9]
    assert operation(X, W).tolist() == [0, 3, 6, 9]
    assert operation.state().status == "failed"


@pytest.mark.usefixtures("gpu")
def test_wrong_arguments_are_the_callers_and_not_the_kernels():
    operation = make(Spy())
    with pytest.raises(ValueError, match="broadcast"):
        operation(X, mx.ones((5,)))
    assert operation.state().status == "used"


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


# --- Choices ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("", True, True),
        ("", False, False),
        ("on", False, True),
        ("ON", False, True),
        ("off", True, False),
        ("scaled", False, True),
        ("fsmn, scaled", False, True),
        ("fsmn", True, False),
    ],
)
def test_the_environment_chooses(monkeypatch, value, default, expected):
    monkeypatch.setenv(switch.VARIABLE, value)
    operation = make(Spy(), default=default)
    assert operation.ready() is expected
    assert operation.state().status == ("used" if expected else "off")


def test_an_unknown_name_is_an_error_even_without_a_gpu(monkeypatch):
    operation = make(Spy())
    monkeypatch.setenv(switch.VARIABLE, "fsmn,scalde")
    with pytest.raises(ConfigError, match=r"QWEN4B_ASR_KERNELS must be on, off or some of .*scaled.* but got scalde"):
        operation(X, W)
    with pytest.raises(ValueError, match=r"\[kernels\.use\] must be on, off or some of .* but got scalde, offf"):
        use("scalde", "offf")
    with pytest.raises(ValueError, match="but got on"):
        use("fsmn", "on")


@pytest.mark.usefixtures("gpu")
def test_a_program_chooses_for_good_or_for_a_while(monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "off")
    operation = make(Spy())
    with use("scaled"):
        assert operation.ready()
        with use("off"):
            assert not operation.ready()
        assert operation.ready()
        use("fsmn")
        assert not operation.ready()
    assert not operation.ready()
    use("on")
    assert operation.ready()
    use()
    assert not operation.ready()
    monkeypatch.delenv(switch.VARIABLE)
    assert operation.ready()


# --- Overrides ----------------------------------------------------------------------------------------------------


def test_a_trusted_override_skips_the_check_and_hides_no_error():
    spy = Spy()
    operation = make(spy, default=False)
    with override("metal", failing):
        operation(X, W)
        assert spy.calls == 1
        spy.body = failing
        with pytest.raises(RuntimeError, match="cannot compile"):
            operation(X, W)
        with use("off"):
            operation(X, W)
    assert operation.state().status != "failed"


def test_an_override_without_trust_checks_and_leaves_no_trace(tmp_path):
    spy = Spy()
    operation = make(spy)
    with override("metal", failing, trusted=False):
        assert operation.state().detail == "self-check passed"
        spy.body = failing
        with pytest.warns(KernelWarning):
            operation(X, W)
    spy.body = reference
    with override("metal", failing, trusted=False):
        assert operation.ready()
    assert spy.calls == 7
    assert not (tmp_path / "cache").exists()


# --- Gradients and transformations --------------------------------------------------------------------------------


def opaque(x: mx.array, w: mx.array, *, power: int = 1) -> mx.array:
    """The right values, through which no gradient flows, as through a kernel."""
    return mx.stop_gradient(reference(x, w, power=power))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_the_references(compiled):
    spy = Spy()
    spy.body = opaque
    operation = make(spy)
    wrap = mx.compile if compiled else lambda f: f

    def loss(function):
        return wrap(mx.grad(lambda x, w: (function(x, w=w, power=2) * mx.arange(4.0)).sum(), argnums=(0, 1)))

    got, expected = loss(operation)(X, W), loss(reference)(X, W)
    assert [g.tolist() for g in got] == [e.tolist() for e in expected]
    assert got[1].item() != 0
    assert mx.grad(lambda x: opaque(x, W).sum())(X).tolist() == [0, 0, 0, 0]  # what it would be without


@pytest.mark.usefixtures("gpu")
def test_several_results_and_other_types_among_the_arguments():
    def both(x, keep, *, w):
        return mx.where(keep, x * w, 0), x + w

    def make_arguments(rng, dtype):
        return {**arguments(rng, dtype), "keep": mx.arange(50) % 2 == 0}

    def hidden(x, keep, *, w):
        return tuple(mx.stop_gradient(y) for y in both(x, keep, w=w))

    case = Case("small", make_arguments)
    operation = make(hidden, reference=both, cases=(case,))
    keep = mx.array([True, False, True, False])
    for wanted in (0, 1):
        got = mx.grad(lambda x, i=wanted: operation(x, keep, w=W)[i].sum())(X)
        expected = mx.grad(lambda x, i=wanted: both(x, keep, w=W)[i].sum())(X)
        assert got.tolist() == expected.tolist() != [0, 0, 0, 0]


@pytest.mark.usefixtures("gpu")
def test_no_gradient_where_the_contract_says_none(tmp_path):
    (tmp_path / "scaled.metal").write_text(HEAD.replace("vjp: reference", "vjp: none: nobody trains it"))
    spy = Spy()
    spy.body = opaque
    assert mx.grad(lambda x: make(spy)(x, W).sum())(X).tolist() == [0, 0, 0, 0]


@pytest.mark.usefixtures("gpu")
def test_threads_wait_for_one_check():
    spy, results = Spy(), []
    operation = make(spy)
    release = threading.Event()

    def slow(*args, **kwargs):
        release.wait(5)
        return reference(*args, **kwargs)

    spy.body = slow
    threads = [threading.Thread(target=lambda: results.append(operation.ready())) for _ in range(4)]
    with warnings.catch_warnings():
        for thread in threads:
            thread.start()
        release.set()
        for thread in threads:
            thread.join()
    assert (results, spy.calls) == ([True] * 4, 3)


def test_every_operation_says_how_it_stands():
    from qwen4b_asr.kernels import operations

    states = {name: operation.state().status for name, operation in operations().items()}
    assert set(states) == set(NAMES)
    assert set(states.values()) <= {"used", "off", "failed", "plain"}
