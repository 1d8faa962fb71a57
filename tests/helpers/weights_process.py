"""Run a program on the sources in a fresh interpreter, and compare what it leaves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import qwen4b_asr

PACKAGE_PARENT = Path(qwen4b_asr.__file__).parents[1]


def files_of(folder):
    """File name -> content hash."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def in_child(code, *arguments):
    """Run a program against the sources in a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
