"""Fixtures of tests that run the command line in this process, with a model that says what it is told."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen4b_asr.cli.main import main
from tests.helpers.fake_transcriber import MODULE, FakeTranscriber


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN4B_ASR_MODEL", "some-model")
    monkeypatch.delenv("QWEN4B_ASR_BLAS", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(name, np.zeros(8000), 16_000)
    Path("bad.wav").write_bytes(b"not a recording")


@pytest.fixture
def fake(monkeypatch):
    def build(*replies) -> FakeTranscriber:
        model = FakeTranscriber(replies)
        monkeypatch.setitem(sys.modules, MODULE, model.as_module())
        return model

    return build


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err
