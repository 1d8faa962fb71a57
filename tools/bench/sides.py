"""The parent's end: the peers, their environments, and processes that are asked in turns.

A side computes only while it is asked, and one is asked at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OWN = "qwen4b-asr"

# What the extra [golden] names; funasr itself goes in without its dependencies.
_TORCH = (
    *("torch==2.13.0", "transformers==5.23.0", "kaldi-native-fbank==1.22.3", "safetensors", "librosa", "kaldiio"),
    *("omegaconf", "hydra-core", "PyYAML", "sentencepiece", "rapidfuzz", "six"),
)


class SideError(Exception):
    """A side cannot do what it was asked for; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Another implementation to be timed beside this one.

    Attributes:
        name: As on the command line.
        module: Its worker under ``tools/bench``.
        packages: What pip installs into its environment, pinned.
        imports: A module that is there once that is done.
        parts: What it has: ``listen`` (encoder and what reads it) or ``write`` (decoder).
        mlx: Whether it runs on MLX, where an OpenBLAS may be preloaded.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    imports: str
    parts: tuple[str, ...]
    mlx: bool = True


def peers(mlx_version: str) -> dict[str, Peer]:
    """Return the peers by name.

    Args:
        mlx_version: The MLX that this project runs on, which the peers on MLX get too.
    """
    mlx = f"mlx[cpu]=={mlx_version}" if sys.platform == "linux" else f"mlx=={mlx_version}"
    known = (
        Peer("mlx-lm", "peer_worker_mlx_lm", (mlx, "mlx-lm==0.32.2"), "mlx_lm", ("write",)),
        Peer("mlx-audio", "peer_worker_mlx_audio", (mlx, "mlx-audio==0.6.2"), "mlx_audio", ("listen",)),
        Peer("funasr-mlx", "peer_worker_funasr_mlx", (mlx, "funasr-mlx==0.2.3"), "funasr_mlx", ("listen",)),
        Peer(
            "torch",
            "peer_worker_torch",
            _TORCH,
            "torch, funasr",
            ("listen", "write"),
            mlx=False,
        ),
    )
    return {peer.name: peer for peer in known}


def environment(peer: Peer, folder: Path) -> Path:
    """Return the interpreter of a peer's virtual environment, which is made if it is not there.

    Args:
        peer: Whose.
        folder: Where the environments are kept, one folder each.

    Raises:
        SideError: If pip does not bring what is needed.
    """
    home = folder / peer.name
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and _imports(python, peer.imports):
        return python
    print(f"making {peer.name}'s environment: {' '.join(peer.packages)}", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True, clear=True)
    steps = [list(peer.packages)]
    if peer.name == "torch":
        steps.append(["--no-deps", "funasr==1.4.16"])
    for words in steps:
        run = subprocess.run([python, "-m", "pip", "install", "-q", *words], capture_output=True, text=True)
        if run.returncode:
            said = (run.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise SideError(f"{peer.name}: its environment could not be made: {said}")
    if not _imports(python, peer.imports):
        raise SideError(f"{peer.name}: installed, but {peer.imports} cannot be imported")
    return python


def _imports(python: Path, names: str) -> bool:
    return subprocess.run([python, "-c", f"import {names}"], capture_output=True).returncode == 0


class Side:
    """A worker process.

    Args:
        name: What the tables call it.
        command: Starts the worker.
        environment: Variables on top of this process's own.

    Attributes:
        facts: What it said of itself when it was built.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            SideError: If the process ended, or its answer is that it cannot.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"{self.name}: its process ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(f"{self.name}: {do}: {answer['error']}")
        if do == "build":
            self.facts = answer["facts"]
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(name: str, module: str, python: str | Path, threads: int, *, preload: bool = True) -> Side:
    """Start a worker of this checkout.

    Args:
        name: What the tables call it.
        module: The worker under ``tools/bench``.
        python: Interpreter.
        threads: Of OpenBLAS and of torch.
        preload: Load an OpenBLAS for MLX, where there is one.
    """
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT / "src")]),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "REFERENCE_THREADS": str(threads),
        "MLX_ENABLE_TF32": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    words = [module, *(["preload"] if preload else [])]
    return Side(name, [str(python), "-m", "bench.start_worker", *words], variables)
