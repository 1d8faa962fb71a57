"""Runs the Metal text of kernels on the CPU, and lints it; see README.md."""

from . import engine_library
from .build import unavailable
from .capture import Recorder, capture
from .errors import CompileError, LaunchError, MetalHostError, ScheduleError
from .lint import lint
from .lint import unavailable as lint_unavailable
from .runner import HostKernel, Statistics, launches, metal_kernel
from .verify import SCHEDULES, verify

__all__ = [
    "SCHEDULES",
    "CompileError",
    "HostKernel",
    "LaunchError",
    "MetalHostError",
    "Recorder",
    "ScheduleError",
    "Statistics",
    "capture",
    "engine_library",
    "launches",
    "lint",
    "lint_unavailable",
    "metal_kernel",
    "unavailable",
    "verify",
]
