"""``qwen4b-asr doctor``: show what this machine runs on, check it, and say what to do about each problem."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AsrError

EPILOG = """\
exit status:
  0 nothing is broken, though something may be worth improving; 1 something is broken, and the report says what
"""

GIGABYTE = 1e9


@dataclass
class Finding:
    """Something worth saying.

    Attributes:
        broken: Whether something does not work, or merely could be better.
        problem: What is the matter.
        advice: What to do about it.
    """

    broken: bool
    problem: str
    advice: str


@dataclass
class Report:
    """What the machine runs on. Numbers of bytes; None stands for what cannot be known here.

    Attributes:
        versions: Of this package, MLX, Python, and the system.
        device: ``kind`` (``cpu``, ``metal`` or ``cuda``), ``name``, ``architecture``.
        memory: ``total`` of the machine; ``active``, ``cache``, ``peak`` and ``limit`` of MLX.
        blas: Library that was loaded for MLX's CPU matrix products; None if it is MLX's own.
        numpy_blas: Library through which NumPy multiplies with float32 weights; None if that is left to MLX.
        kernels: By operation, ``status`` and ``detail``.
        models: ``name``, ``path`` and ``problem``, if any, of each model directory.
        findings: What is broken or could be better.
    """

    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    blas: str | None = None
    numpy_blas: str | None = None
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    models: list[dict[str, str | None]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not any(finding.broken for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"ok": self.ok, **asdict(self)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="*", type=Path, metavar="DIR", help="further model directories to look at")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Examine and print; returns 0 if nothing is broken and 1 otherwise."""
    from ._terminal import write_stdout

    report = examine(args.models)
    write_stdout(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n" if args.json else as_text(report))
    return 0 if report.ok else 1


def examine(models: Sequence[Path] = ()) -> Report:
    """Look at everything; what fails becomes a finding.

    Args:
        models: Model directories to look at besides the built-in one and that of the environment.
    """
    report = Report()
    _look_at_versions(report)
    if _look_at_device(report):
        _look_at_memory(report)
        _look_at_blas(report)
        _look_at_kernels(report)
    _look_at_models(report, models)
    return report


def _look_at_versions(report: Report) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from ..version import __version__

    try:
        mlx = version("mlx")
    except PackageNotFoundError:
        mlx = "not installed"
    report.versions = {
        "qwen4b-asr": __version__,
        "mlx": mlx,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if sys.platform == "darwin" and platform.machine() != "arm64":
        report.findings.append(
            Finding(True, "this Python is built for Intel", "install an arm64 Python: MLX needs it on a Mac")
        )


def _look_at_device(report: Report) -> bool:
    """Find the device, and whether it computes."""
    try:
        import mlx.core as mx

        gpu = mx.default_device().type == mx.DeviceType.gpu
        info = mx.device_info()
        report.device = {
            "kind": ("metal" if mx.metal.is_available() else "cuda") if gpu else "cpu",
            "name": str(info.get("device_name", "unknown")),
            "architecture": str(info.get("architecture", "unknown")),
        }
        if mx.arange(5).sum().item() != 10:
            raise RuntimeError("the numbers from 0 to 4 do not add up to 10")
    except Exception as error:  # a broken installation can fail in any way, and the rest is still worth a look
        advice = "reinstall it: pip install --force-reinstall mlx, on Linux 'mlx[cpu]' or 'mlx[cuda13]'"
        report.findings.append(Finding(True, f"MLX does not work ({type(error).__name__}: {_line(error)})", advice))
        return False
    if not gpu and sys.platform == "darwin":
        report.findings.append(
            Finding(
                False, "the default device is the CPU", "leave it to MLX: nothing should call mx.set_default_device"
            )
        )
    if not gpu and sys.platform == "linux" and Path("/proc/driver/nvidia/version").exists():
        advice = "pip install 'mlx[cuda13]', then pip install --force-reinstall --no-deps mlx-cuda-13"
        report.findings.append(Finding(False, "there is an NVIDIA driver, and MLX runs on the CPU", advice))
    return True


def _look_at_memory(report: Report) -> None:
    import mlx.core as mx

    try:
        total: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        total = None
    limit = mx.set_memory_limit(1 << 62)  # the only way to read it is to set it
    mx.set_memory_limit(limit)
    report.memory = {
        "total": total,
        "active": mx.get_active_memory(),
        "cache": mx.get_cache_memory(),
        "peak": mx.get_peak_memory(),
        "limit": limit,
    }


def _look_at_blas(report: Report) -> None:
    from .._blas import BLAS_VARIABLE, loaded_blas, numpy_blas

    report.blas = loaded_blas()
    if report.device["kind"] == "cpu":
        report.numpy_blas = numpy_blas()
    if report.device["kind"] != "cpu" or sys.platform != "linux" or report.blas:
        return
    if os.environ.get(BLAS_VARIABLE, "").lower() == "off":
        advice = f"unset {BLAS_VARIABLE}"
    else:
        advice = f"install OpenBLAS (Debian, Ubuntu: apt install libopenblas0-pthread), or set {BLAS_VARIABLE} to one"
    what = "what is not left to NumPy" if report.numpy_blas else "everything"
    problem = f"MLX multiplies {what} with its own BLAS, some twenty times slower"
    report.findings.append(Finding(False, problem, advice))


def _look_at_kernels(report: Report) -> None:
    from ..kernels import operations
    from ..kernels._switch import VARIABLE

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would say is in the report
            states = {name: operation.state() for name, operation in operations().items()}
    except AsrError as error:
        report.findings.append(Finding(True, str(error), f"correct {VARIABLE}, or unset it"))
        return
    report.kernels = {name: asdict(state) for name, state in states.items()}
    for name, state in states.items():
        if state.status == "failed":
            advice = (
                f"results are right without it, only slower; to silence its warning, leave {name} out of {VARIABLE}; "
                "please report it with the output of --json"
            )
            report.findings.append(Finding(True, f"the kernel {name} failed ({_line(state.detail)})", advice))


def _look_at_models(report: Report, models: Sequence[Path]) -> None:
    from ..weights.find import BUILT_IN
    from .transcribe_options import MODEL_VARIABLE

    named = os.environ.get(MODEL_VARIABLE)
    wanted = [(name, name) for name in BUILT_IN]
    wanted += [(f"${MODEL_VARIABLE}", named)] if named and named not in BUILT_IN else []
    wanted += [(str(path), str(path)) for path in models]
    for name, place in wanted:
        path, problem, advice = _look_at_model(place)
        report.models.append({"name": name, "path": path, "problem": problem})
        if problem:
            report.findings.append(Finding(True, f"model {name}: {problem}", advice))
    if not named and not models:
        report.findings.append(
            Finding(
                False,
                "only the demo model is known",
                f"set {MODEL_VARIABLE} to the directory of the 4B system; `qwen4b-asr convert` makes it (README)",
            )
        )


def _look_at_model(place: str) -> tuple[str, str | None, str]:
    """Path of a model directory, what is wrong with it at first sight, and what to do."""
    from ..weights.find import find_model

    try:
        path = find_model(place)
    except (AsrError, FileNotFoundError) as error:
        return (
            place,
            _line(error).removesuffix(" What you can do:"),
            "give the directory that `qwen4b-asr convert` wrote",
        )
    try:
        from ..config import ModelConfig

        ModelConfig.load(path)
        missing = [] if (path / "tokenizer.json").is_file() else ["tokenizer.json"]
        missing += [] if any(path.glob("*.safetensors")) else ["*.safetensors"]
    except Exception as error:  # MLX itself may be what is broken
        return str(path), _line(error), f"qwen4b-asr verify {path}"
    return str(path), f"without {', '.join(missing)}" if missing else None, f"qwen4b-asr verify {path}"


# --- Text ---------------------------------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """Lay the report out for a terminal."""
    versions = report.versions
    rows = [
        ("version", f"qwen4b-asr {versions['qwen4b-asr']}, MLX {versions['mlx']}, Python {versions['python']}"),
        ("system", versions["system"]),
    ]
    if report.device:
        rows.append(("device", "{kind}: {name} ({architecture})".format(**report.device)))
    if report.memory:
        sizes = {name: _gigabytes(value) for name, value in report.memory.items()}
        rows.append(
            ("memory", "{total}; MLX: {active} active, {cache} cached, {peak} peak, limit {limit}".format(**sizes))
        )
        rows.append(("BLAS", report.blas or "as MLX comes"))
        if report.numpy_blas:
            rows.append(("", f"for float32 weights NumPy's {Path(report.numpy_blas).name}"))
    width = max(map(len, report.kernels), default=0)
    for index, (name, state) in enumerate(report.kernels.items()):
        words = f"{name:{width}}  {state['status']:6}  {_line(state['detail'])}"
        rows.append(("" if index else "kernels", words))
    for index, model in enumerate(report.models):
        words = f"{model['name']}  {model['path']}  {model['problem'] or 'found'}"
        rows.append(("" if index else "models", words))
    lines = [f"{title:8}  {words}" for title, words in rows]
    for title, broken in (("broken", True), ("could be better", False)):
        if findings := [finding for finding in report.findings if finding.broken is broken]:
            lines += ["", f"{title}:"]
            lines += [f"  {finding.problem}\n    -> {finding.advice}" for finding in findings]
    lines += ["", "nothing is broken" if report.ok else "something is broken"]
    return "\n".join(lines) + "\n"


def _gigabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / GIGABYTE:.1f} GB"


def _line(value: object) -> str:
    """The first line with anything in it."""
    return next((line.strip() for line in str(value).splitlines() if line.strip()), "no reason given")
