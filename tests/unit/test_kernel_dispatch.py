"""Dispatch: when a kernel is used, what happens when it fails, and whose gradients there are."""

import threading
import warnings

import mlx.core as mx
import pytest

import qwen4b_asr.kernels._dispatch as dispatch
from qwen4b_asr.kernels import NAMES, use
from qwen4b_asr.kernels._cases import Case
from qwen4b_asr.kernels._dispatch import KernelWarning
from qwen4b_asr.kernels._loader import override
from tests.helpers.kernel_toy import HEAD, Spy, W, X, arguments, failing, make, reference

pytestmark = pytest.mark.usefixtures("toy")


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
