"""An operation that multiplies, and a machine for it, for the tests of how kernels are dispatched."""

import mlx.core as mx
import numpy as np
import pytest

import qwen4b_asr.kernels._dispatch as dispatch
import qwen4b_asr.kernels._sources as sources
import qwen4b_asr.kernels._switch as switch
from qwen4b_asr.kernels import NAMES
from qwen4b_asr.kernels._cases import Case
from qwen4b_asr.kernels._dispatch import Operation

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


def arguments(rng: np.random.Generator, dtype: mx.Dtype) -> dict[str, mx.array]:
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


def failing(*args, **kwargs):
    """A kernel that cannot be built."""
    raise RuntimeError("\n  cannot compile\nline 2")


def make(spy, **changes) -> Operation:
    """The operation, with its kernel and what else a test changes."""
    options = {"kernel": spy, "reference": reference, "cases": (CHECK, OTHER), "files": ("scaled.metal",)} | changes
    return Operation("scaled", **options)


X, W = mx.arange(4.0), mx.array(3.0)


@pytest.fixture
def toy(tmp_path, monkeypatch):
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
