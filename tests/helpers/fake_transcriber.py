"""A model that answers what it is told to, for tests of the command line.

`python -m tests.helpers.fake_transcriber REPLIES ARGUMENTS...` runs the command line with it: the replies are JSON, a
list of texts; `{"error": "message"}` raises, `{"sleep": seconds}` waits, `{"text": ..., "finish_reason": ...}` is
spelled out.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

MODULE = "qwen4b_asr.loading"


class FakeTranscriber:
    """Gives one reply after the other, and remembers what it was asked."""

    def __init__(self, replies: Iterable[Any]) -> None:
        self.replies = list(replies)
        self.calls: list[dict[str, Any]] = []
        self.loaded: list[tuple[str, str]] = []
        self.batch_sizes: list[int | None] = []

    def load(self, path_or_name: str, dtype: str = "auto", **options: Any) -> FakeTranscriber:
        """Stand in for `qwen4b_asr.load`."""
        self.loaded.append((path_or_name, dtype))
        return self

    def transcribe(self, samples: Any, *, on_token: Callable[[str], None] | None = None, **options: Any) -> Any:
        """Stand in for `Transcriber.transcribe`."""
        self.calls.append(options)
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        if isinstance(reply, str):
            reply = {"text": reply}
        time.sleep(reply.get("sleep", 0))
        if "error" in reply:
            raise RuntimeError(reply["error"])
        text = reply.get("text", "")
        for piece in re.findall(r"\S+\s*", text):
            if on_token:
                on_token(piece)
        values = {
            "text": text,
            "tokens": [1, 2],
            "language": options.get("language"),
            "duration_seconds": len(samples) / 16_000,
            "segments": [],
            "timings": {"audio": 0.0, "encoder": 0.5, "total": 0.5},
            "finish_reason": reply.get("finish_reason", "stop"),
            "model": "fake",
        }
        return SimpleNamespace(to_dict=lambda: values)

    def transcribe_batch(
        self,
        sources: Iterable[Any],
        *,
        batch_size: int | None,
        on_transcript: Callable[[int, Any], None],
        errors: str,
        **options: Any,
    ) -> None:
        """Stand in for `Transcriber.transcribe_batch`; a reply that raises does so again when asked for alone."""
        assert errors == "return"
        self.batch_sizes.append(batch_size)
        for number, samples in enumerate(sources):
            reply = self.replies[0]
            try:
                transcript = self.transcribe(samples, **options)
            except Exception:
                self.replies.insert(0, reply)
                raise
            on_transcript(number, transcript)

    def as_module(self) -> ModuleType:
        """Return what to put into `sys.modules` under `MODULE`."""
        module = ModuleType(MODULE)
        module.load = self.load  # type: ignore[attr-defined]
        return module


if __name__ == "__main__":
    from qwen4b_asr.cli import _terminal
    from qwen4b_asr.cli.main import main

    _terminal.PATIENCE_SECONDS, _terminal.TICK_SECONDS = 0.05, 0.02  # impatient, so that tests need not wait
    sys.modules[MODULE] = FakeTranscriber(json.loads(sys.argv[1])).as_module()
    sys.exit(main(sys.argv[2:]))
