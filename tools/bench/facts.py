"""What a row of times depends on: the machine, the versions, the source."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Device:
    """What computes.

    Attributes:
        type: MLX's name of it.
        backend: What would run kernels on it; None on a CPU.
        name: The maker's name of it.
        cores: Of the CPU.
    """

    type: Literal["cpu", "gpu"]
    backend: Literal["metal", "cuda"] | None
    name: str
    cores: int

    @property
    def title(self) -> str:
        """Name for people, such as ``GPU Apple M2 Pro (Metal)``."""
        if self.type == "cpu":
            return f"CPU {self.name}, {self.cores} core{'s' * (self.cores != 1)}"
        return f"GPU {self.name} ({'Metal' if self.backend == 'metal' else 'CUDA'})"

    @property
    def slug(self) -> str:
        """Name for marks in a file, such as ``gpu-apple-m2-pro-metal``."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def gpu_backend() -> Literal["metal", "cuda"] | None:
    """Return the GPU interface that is really there, whatever a test has put in its place."""
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available() and mx.is_available(mx.gpu):
        return "cuda"
    return None


def default_device() -> Device:
    """Describe MLX's default device."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    device = mx.gpu if on_gpu else mx.cpu
    info = mx.device_info(device)
    name = str(info.get("device_name") or platform.processor() or platform.machine() or "unknown").strip()
    return Device("gpu" if on_gpu else "cpu", gpu_backend() if on_gpu else None, name, os.cpu_count() or 1)


def about(date: str, command: str, blas: str | None) -> dict[str, Any]:
    """Return what every row of a run says of itself.

    Args:
        date: When it ran.
        command: The command line.
        blas: Library that MLX's CPU products go through; None for its own.
    """
    return {
        "date": date,
        "command": command,
        "project": _version("qwen4b-asr"),
        "revision": revision(ROOT),
        "mlx": _version("mlx"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": asdict(default_device()),
        "blas": Path(blas).name if blas else None,
        "tf32": os.environ.get("MLX_ENABLE_TF32", "1") != "0",
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Return how many processes wanted a core in the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 1)
    except (AttributeError, OSError):
        return None


def revision(checkout: Path) -> str | None:
    """Return git's short name of what `checkout` holds, with ``-dirty`` if it was changed; None without git."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
            return None  # an unpacked archive inside somebody else's checkout
        # Only what decides the times: an edited document does not make a revision another one.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "kernels/*.metal", "tools")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    if distribution == "qwen4b-asr":
        from qwen4b_asr.version import __version__

        return __version__
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
