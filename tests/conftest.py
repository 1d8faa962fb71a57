"""Settings for every test: exact float32 matrix products, a fast BLAS on Linux, hypothesis profiles."""

import os
import sys
from importlib.metadata import version

import pytest
from hypothesis import HealthCheck, settings

from qwen4b_asr._blas import preload_openblas

os.environ["MLX_ENABLE_TF32"] = "0"  # read when MLX starts: goldens compare in full float32
BLAS = preload_openblas()  # no test module, and so no mlx.core, is imported yet

_SLOW_MACHINE = (HealthCheck.too_slow,)  # a shared core is no defect of a strategy
settings.register_profile(
    "ci", derandomize=True, max_examples=25, deadline=None, database=None, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("many", max_examples=500, deadline=None, suppress_health_check=_SLOW_MACHINE)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)


def _conditions() -> str:
    """Say what the numbers of this run depend on."""
    return f"BLAS: {BLAS or 'as MLX comes'} · mlx {version('mlx')} · hypothesis profile: {PROFILE}"


def pytest_report_header(config: pytest.Config) -> str:
    """Show the conditions at the head of a verbose run."""
    return _conditions()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show them at the end of a quiet run, which has no head; and which of the kernels' checks took place."""
    if terminalreporter.verbosity < 0:
        terminalreporter.write_line(_conditions())
    if "tests.helpers.metal_host" in sys.modules:  # a test of kernels was collected
        from tests.helpers.kernel_checks import report

        for line in report():
            terminalreporter.write_line(line)
