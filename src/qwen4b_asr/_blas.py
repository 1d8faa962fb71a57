"""Give MLX's CPU back end a fast BLAS on Linux.

The Linux wheel of MLX carries the reference BLAS of netlib, which multiplies
float32 matrices some twenty times slower than OpenBLAS. `libmlx.so` looks for
`cblas_sgemm` in the process's global symbols before its own libraries, so an
OpenBLAS loaded with RTLD_GLOBAL *before* MLX takes the wheel's place; nothing
else changes. Where there is no OpenBLAS, the wheel's own is used as before.

NumPy's wheels carry an OpenBLAS too, under names of its own, so that MLX cannot
call it; `cpu` does, for the products with weights (`numpy_blas`).

`python -m qwen4b_asr._blas` measures what it gains; compare with
`QWEN4B_ASR_BLAS=off` and `OPENBLAS_NUM_THREADS=1`.
"""

import ctypes
import glob
import importlib.util
import os
import sys
import time
from pathlib import Path

BLAS_VARIABLE = "QWEN4B_ASR_BLAS"
"""Environment variable: `off`, or the path of the BLAS library to load."""

# Debian keeps one library per threading model behind an alternatives link, Fedora puts the model in the name (p is
# pthreads, no letter is serial): the pthreads build comes first, because it has no second thread pool to fight with.
_PATTERNS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
)
_NAMES = ("libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so")
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")
_THREAD_FUNCTIONS = {
    "openblas_set_num_threads": ctypes.c_int,
    "scipy_openblas_set_num_threads64_": ctypes.c_int,
    "bli_thread_set_num_threads": ctypes.c_int64,
}


def preload_openblas() -> str | None:
    """Load an OpenBLAS ahead of MLX, so that MLX's CPU matrix products use it.

    Does nothing outside Linux, when `mlx.core` is already imported (its symbols are bound by then), or when the
    environment variable `QWEN4B_ASR_BLAS` is `off`. `QWEN4B_ASR_BLAS=PATH` names the library to take: BLIS, say, which
    multiplies a single row faster and a hundred rows slower. Unless one of OPENBLAS_NUM_THREADS, GOTO_NUM_THREADS,
    OMP_NUM_THREADS and BLIS_NUM_THREADS is set, it runs one thread per physical core that this process may use.
    Calling it again is harmless.

    Returns:
        The path of the library, or None when none was loaded.

    Raises:
        ValueError: the library that `QWEN4B_ASR_BLAS` names cannot be used.
    """
    choice = os.environ.get(BLAS_VARIABLE, "")
    if sys.platform != "linux" or "mlx.core" in sys.modules or choice.lower() == "off":
        return None
    for candidate in [choice] if choice else _candidates():
        try:
            library = ctypes.CDLL(candidate)  # a private look first: global symbols cannot be taken back
            _check(library)
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except (OSError, ValueError) as error:
            if choice:
                raise ValueError(
                    f"[preload_openblas] {BLAS_VARIABLE} must be 'off' or the path of a usable BLAS library "
                    f"but got {choice!r}: {error}"
                ) from error
            continue
        if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
            _set_threads(library, physical_cores())
        return _path_of(library) or candidate
    return None


def loaded_blas() -> str | None:
    """Return the path of the library that `preload_openblas` loaded, or None if MLX uses its own (Linux)."""
    if sys.platform != "linux":
        return None
    symbols = ctypes.CDLL(None)  # what is global in this process; MLX's own libraries are not
    return _path_of(symbols) if hasattr(symbols, "cblas_sgemm") else None


def numpy_blas() -> str | None:
    """Return the path of the OpenBLAS that NumPy's wheel carries, if it is to multiply (Linux).

    It is not where the environment variable `QWEN4B_ASR_BLAS` chooses another, or `off`. NumPy of another make may
    share its BLAS with MLX or have a slow one; nothing is made of it.
    """
    if sys.platform != "linux" or os.environ.get(BLAS_VARIABLE):
        return None
    found = importlib.util.find_spec("numpy")
    if found is None or found.origin is None:
        return None
    libraries = sorted(Path(found.origin).parents[1].glob("numpy.libs/*openblas*"))
    return str(libraries[0]) if libraries else None


def leave_cores_to_numpy() -> None:
    """Let NumPy's OpenBLAS have the cores, and the one that MLX calls a single thread.

    The threads of either keep their cores busy for some time after a product, waiting for the next: two sets of them
    get into each other's way, and both take more than twice as long. What is left to MLX then are small products.
    """
    numpys, mlxs = numpy_blas(), loaded_blas()
    if numpys is None:
        return
    if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        _set_threads(ctypes.CDLL(numpys), physical_cores())  # its own count knows neither quotas nor hyper-threads
    if mlxs is not None:
        _set_threads(ctypes.CDLL(mlxs), 1)


def physical_cores() -> int:
    """Count the physical cores that this process may use, at least 1 (Linux)."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        try:  # hyper-threads of one core list the same siblings
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(f"cpu {cpu}")
    return max(1, min(len(cores), _cgroup_cpus()))


def _cgroup_cpus() -> int:
    """Return the whole CPUs that a container's quota leaves (cgroup v2), a large number without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max 100000"
        return sys.maxsize


def _candidates() -> list[str]:
    found = [path for pattern in _PATTERNS for path in sorted(glob.glob(pattern))]
    prefix = [str(path) for path in (Path(sys.prefix, "lib", name) for name in _NAMES) if path.exists()]  # conda
    return [*prefix, *found, *_NAMES]  # bare names go through the loader's own search path


def _check(library: ctypes.CDLL) -> None:
    """Refuse a library that lacks the C interface or counts in 64-bit integers, as MLX does not."""
    if not hasattr(library, "cblas_sgemm"):
        raise ValueError("it has no cblas_sgemm")
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        if b"USE64BITINT" in (library.openblas_get_config() or b""):
            raise ValueError("it is built for 64-bit integers")
    if hasattr(library, "bli_info_get_blas_int_type_size") and library.bli_info_get_blas_int_type_size() == 64:
        raise ValueError("it is built for 64-bit integers")


def _set_threads(library: ctypes.CDLL, count: int) -> None:
    for name, integer in _THREAD_FUNCTIONS.items():  # not the environment: child processes decide for themselves
        if hasattr(library, name):
            getattr(library, name)(integer(count))


def _path_of(library: ctypes.CDLL) -> str | None:
    """Return the file that holds `cblas_sgemm` of a loaded library, by the process's memory map."""
    address = ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value or 0
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, _, rest = line.partition(" ")
            low, _, high = span.partition("-")
            if int(low, 16) <= address < int(high, 16):
                fields = rest.split(maxsplit=4)
                return fields[4].strip() if len(fields) == 5 else None
    return None


def _measure() -> None:
    """Print the rate of float32 matrix products on the CPU, for a square one and for shapes of the models."""
    print(f"BLAS: {preload_openblas() or 'as MLX comes'}")
    import mlx.core as mx

    shapes = {
        "square": (1024, 1024, 1024),
        "encoder, 30 s: feed-forward": (504, 512, 2048),
        "adaptor, 30 s: feed-forward": (504, 2048, 8192),
    }
    for name, (rows, inner, columns) in shapes.items():
        a = mx.random.normal((rows, inner), stream=mx.cpu)
        b = mx.random.normal((inner, columns), stream=mx.cpu)
        mx.eval(mx.matmul(a, b, stream=mx.cpu))
        wall = cpu = float("inf")  # best of several: the others were disturbed
        for _ in range(5):
            start, start_cpu = time.perf_counter(), time.process_time()
            mx.eval(mx.matmul(a, b, stream=mx.cpu))
            wall, cpu = min(wall, time.perf_counter() - start), min(cpu, time.process_time() - start_cpu)
        work = 2e-9 * rows * inner * columns
        print(
            f"{name} ({rows}x{inner} by {inner}x{columns}): {work / wall:.0f} GFLOP/s, "
            f"{work / cpu:.0f} GFLOP per second of CPU time"
        )


if __name__ == "__main__":
    _measure()
