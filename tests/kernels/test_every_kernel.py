"""What all kernels are held to alike, in every case and type: clang's address spaces, and a GPU where there is one.

What each computes on the CPU is in the file of its own name; the CUDA form is in tests/unit/test_kernel_cuda.py.
"""

import mlx.core as mx
import pytest

from qwen4b_asr.kernels import NAMES, operations
from qwen4b_asr.kernels._loader import backend, override
from qwen4b_asr.kernels._selfcheck import compare
from tests.helpers import metal_host

EVERY = [
    pytest.param(operation, case, dtype, id=f"{name}-{case.name}-{dtype}")
    for name, operation in operations().items()
    for case in operation.cases
    for dtype in case.dtypes
]


@pytest.mark.skipif(metal_host.lint_unavailable() is not None, reason=str(metal_host.lint_unavailable()))
@pytest.mark.parametrize(("operation", "case", "dtype"), EVERY)
def test_clang_finds_no_mistake_in_the_text(operation, case, dtype):
    recorder = metal_host.Recorder()
    with override("metal", recorder):
        operation.kernel(**case.arguments(dtype))
    assert recorder.texts
    assert [metal_host.lint(text) for text in recorder.texts] == [[]] * len(recorder.texts)


@pytest.mark.skipif(backend() is None, reason="running kernels themselves needs an Apple or NVIDIA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_computes_what_the_plain_operations_do(name):
    operation = operations()[name]
    wrong = []
    for case in operation.cases:
        for dtype in case.dtypes if "check" in case.roles else ():
            arguments = case.arguments(dtype)
            wide = {key: value.astype(mx.float32) if _is_float(value) else value for key, value in arguments.items()}
            actual = _as_list(operation.kernel(**arguments))
            plain, exact = (_as_list(operation.reference(**given)) for given in (arguments, wide))
            found = [compare(*trio) for trio in zip(actual, plain, exact, strict=True)]
            wrong += [f"{case.name}, {dtype}: {message}" for message in found if message]
    assert wrong == [], wrong


def _is_float(value):
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _as_list(value):
    return [value] if isinstance(value, mx.array) else list(value)
