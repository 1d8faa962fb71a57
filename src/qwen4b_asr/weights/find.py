"""From the name or path that a user gives to a model directory."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ModelNotFoundError
from .paths import weights_data

BUILT_IN = {"demo": "demo"}

ADVICE = """\
  - try the small model that comes with the package (it knows only spoken numbers): --model demo
  - or build the 4B system once from its published parts and give the directory as --model:
      hf download FunAudioLLM/SenseVoiceSmall --local-dir sensevoice
      hf download Qwen/Qwen3-4B --local-dir qwen3-4b
      qwen4b-asr convert --encoder sensevoice --adaptor adaptor_phase2_final.pt --llm qwen3-4b --output funasr-qwen4b"""


def find_model(path_or_name: str | os.PathLike[str]) -> Path:
    """Return the directory of a model.

    Args:
        path_or_name: ``demo``, or the path of a directory that ``qwen4b-asr convert`` wrote.

    Raises:
        ModelNotFoundError: If there is no such model; the message says how to get one.
    """
    name = os.fspath(path_or_name)
    path = weights_data() / BUILT_IN[name] if name in BUILT_IN else Path(name).expanduser()
    if path.is_dir():
        return path
    kind = "is a file, not a model directory" if path.is_file() else "no such model directory"
    raise ModelNotFoundError(f"{name}: {kind}. What you can do:\n{ADVICE}")
