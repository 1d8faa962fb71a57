"""Runs the Metal text of kernels on the CPU; see README.md."""

from .build import unavailable
from .capture import capture
from .errors import CompileError, LaunchError, MetalHostError, ScheduleError
from .runner import HostKernel, Statistics, metal_kernel
from .verify import SCHEDULES, verify

__all__ = [
    "SCHEDULES",
    "CompileError",
    "HostKernel",
    "LaunchError",
    "MetalHostError",
    "ScheduleError",
    "Statistics",
    "capture",
    "metal_kernel",
    "unavailable",
    "verify",
]
