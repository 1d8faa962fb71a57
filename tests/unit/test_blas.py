"""The preloaded BLAS really is the one that MLX multiplies with, and refusals name their reason."""

import ctypes
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qwen4b_asr import _blas

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the preload is for Linux")

MULTIPLY = """
from qwen4b_asr._blas import preload_openblas
path = preload_openblas()
import mlx.core as mx
a = mx.arange(64 * 64, dtype=mx.float32).reshape(64, 64)
mx.eval(mx.matmul(a, a, stream=mx.cpu))
print(path)
"""

THREADS = """
import ctypes
from qwen4b_asr import _blas
count = _blas.physical_cores()
_blas.physical_cores = lambda: {cores} or count
library = ctypes.CDLL(_blas.preload_openblas())
print(library.openblas_get_num_threads(), count)
"""


def fresh(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter without any BLAS settings but the given ones."""
    unset = {"LD_PRELOAD", _blas.BLAS_VARIABLE, *_blas._THREAD_VARIABLES}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    # The preload of this very process needs no search again, and PYTHONPATH may be relative.
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def openblas() -> str:
    path = fresh("from qwen4b_asr._blas import preload_openblas; print(preload_openblas())").stdout.strip()
    if sys.platform != "linux" or path == "None":
        pytest.skip("no OpenBLAS on this machine")
    return path


def binding(tmp_path, **variables: str) -> tuple[str, str]:
    """Return what the preload reported, and the library to which the dynamic linker bound MLX's cblas_sgemm."""
    log = tmp_path / "bindings"
    run = fresh(MULTIPLY, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(log), **variables)
    assert run.returncode == 0, run.stderr
    text = "".join(path.read_text(errors="replace") for path in tmp_path.glob("bindings*"))
    if not text:
        pytest.skip("this C library's linker does not report bindings")
    found = re.findall(r"binding file (\S+) \[0\] to (\S+) \[0\]: normal symbol `cblas_sgemm'", text)
    users = {os.path.realpath(target) for source, target in found if os.path.basename(source).startswith("libmlx")}
    assert len(users) == 1, found
    return run.stdout.strip(), users.pop()


@linux_only
def test_mlx_multiplies_with_the_preloaded_library(tmp_path, openblas):
    reported, bound = binding(tmp_path)
    assert bound == os.path.realpath(openblas)
    assert os.path.realpath(reported) == bound


@linux_only
def test_off_leaves_mlx_its_own(tmp_path, openblas):
    reported, bound = binding(tmp_path, QWEN4B_ASR_BLAS="off")
    assert reported == "None"
    assert bound != os.path.realpath(openblas)


@linux_only
def test_a_given_path_is_taken(tmp_path, openblas):
    alias = tmp_path / "mine.so"
    alias.symlink_to(openblas)
    reported, bound = binding(tmp_path, QWEN4B_ASR_BLAS=str(alias))
    assert bound == os.path.realpath(openblas)
    assert reported == bound  # the file behind the link


@linux_only
def test_threads_are_the_cores_unless_somebody_said_otherwise(openblas):
    default, cores = fresh(THREADS.format(cores=0)).stdout.split()
    assert default == cores
    assert fresh(THREADS.format(cores=1)).stdout.split()[0] == "1"
    assert fresh(THREADS.format(cores=1), OPENBLAS_NUM_THREADS="").stdout.split()[0] == "1"
    assert fresh(THREADS.format(cores=1), OPENBLAS_NUM_THREADS="2").stdout.split()[0] == str(
        min(2, os.cpu_count() or 1)
    )
    assert fresh(THREADS.format(cores=0), OMP_NUM_THREADS="1").stdout.split()[0] == "1"


def test_nothing_happens_once_mlx_is_there():
    import mlx.core  # noqa: F401

    assert _blas.preload_openblas() is None


@linux_only
@pytest.mark.parametrize("choice", ["no-such-library.so", "libm.so.6"])
def test_an_unusable_choice_is_an_error(choice):
    run = fresh("from qwen4b_asr._blas import preload_openblas; preload_openblas()", QWEN4B_ASR_BLAS=choice)
    assert f"QWEN4B_ASR_BLAS must be 'off' or the path of a usable BLAS library but got {choice!r}" in run.stderr
    if choice == "libm.so.6":
        assert "has no cblas_sgemm" in run.stderr


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setenv(_blas.BLAS_VARIABLE, "no-such-library.so")
    assert _blas.preload_openblas() is None


@linux_only
def test_candidates_that_do_not_fit_are_passed_over(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(_blas.BLAS_VARIABLE, raising=False)
    monkeypatch.setattr(_blas, "_candidates", lambda: ["no-such-library.so", "libm.so.6"])
    assert _blas.preload_openblas() is None


def test_64_bit_integers_are_refused():
    def config() -> bytes:
        return b"OpenBLAS 0.3.21 USE64BITINT DYNAMIC_ARCH"

    with pytest.raises(ValueError, match="64-bit integers"):
        _blas._check(SimpleNamespace(cblas_sgemm=None, openblas_get_config=config))
    _blas._check(SimpleNamespace(cblas_sgemm=None, openblas_get_config=lambda: b"OpenBLAS 0.3.21"))
    _blas._check(SimpleNamespace(cblas_sgemm=None))


def test_cores_are_counted_within_what_this_process_may_use(monkeypatch):
    assert 1 <= _blas.physical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(_blas, "_cgroup_cpus", lambda: 1)
    assert _blas.physical_cores() == 1


@linux_only
def test_hyperthreads_count_once(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    monkeypatch.setattr(_blas, "_cgroup_cpus", lambda: 99)
    monkeypatch.setattr(_blas.Path, "read_text", lambda path: str(int(str(path).split("cpu")[-1][0]) % 2))
    assert _blas.physical_cores() == 2


def test_a_library_is_found_by_its_address():
    if sys.platform != "linux":
        pytest.skip("/proc/self/maps")
    libm = ctypes.CDLL("libm.so.6")
    libm.cblas_sgemm = libm.cos
    assert "libm" in os.path.basename(_blas._path_of(libm) or "")


@pytest.mark.parametrize("function", ["openblas_set_num_threads", "bli_thread_set_num_threads"])
def test_threads_are_set_by_the_librarys_own_function(function):
    seen = []
    _blas._set_threads(SimpleNamespace(**{function: lambda count: seen.append(count.value)}), 3)
    assert seen == [3]


@pytest.mark.parametrize(("bits", "said"), [(32, None), (64, "64-bit integers")])
def test_blis_with_64_bit_integers_is_refused(bits, said):
    library = SimpleNamespace(cblas_sgemm=None, bli_info_get_blas_int_type_size=lambda: bits)
    if said is None:
        _blas._check(library)
    else:
        with pytest.raises(ValueError, match=said):
            _blas._check(library)


SHARES = """
import ctypes, os
import numpy as np
from qwen4b_asr import _blas
numpys, mlxs = _blas.numpy_blas(), _blas.preload_openblas()
_blas.physical_cores = lambda: {cores}
_blas.leave_cores_to_numpy()
library = ctypes.CDLL(numpys)
names = ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_")
print(next(getattr(library, name)() for name in names if hasattr(library, name)))
print(ctypes.CDLL(mlxs).openblas_get_num_threads() if mlxs else 1)
"""


@linux_only
@pytest.mark.parametrize("cores", [1, 2])
def test_numpy_has_the_cores_and_mlx_one(cores):
    if _blas.numpy_blas() is None:
        pytest.skip("this NumPy does not carry an OpenBLAS")
    assert fresh(SHARES.format(cores=cores)).stdout.split() == [str(cores), "1"]
    chosen = fresh(SHARES.format(cores=2), OPENBLAS_NUM_THREADS="1").stdout.split()
    assert chosen == ["1", "1"]


@linux_only
def test_numpy_multiplies_only_where_nobody_chose_otherwise(monkeypatch):
    monkeypatch.delenv(_blas.BLAS_VARIABLE, raising=False)
    carried = _blas.numpy_blas()
    assert carried is None or "openblas" in os.path.basename(carried)
    for choice in ("off", "/some/libblis.so"):
        monkeypatch.setenv(_blas.BLAS_VARIABLE, choice)
        assert _blas.numpy_blas() is None
    monkeypatch.delenv(_blas.BLAS_VARIABLE)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _blas.numpy_blas() is None
