"""`qwen4b-asr train`: train the demonstration model on recordings of spoken numbers."""

from __future__ import annotations

from ..training.command import add_arguments, run

__all__ = ["add_arguments", "run"]
