"""The command line with several files: handed over together, written in order, none brought down by another."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.cli.main import main
from qwen4b_asr.errors import AudioError
from tests.helpers.command_line import _settings, fake, run
from tests.helpers.fake_transcriber import MODULE, FakeTranscriber

__all__ = ["_settings", "fake"]  # fixtures


def test_several_files_are_handed_over_together(capsys, fake):
    model = fake(*"abcdef")
    run(capsys, "a.wav", "b.wav")
    run(capsys, "--batch-size", "3", "a.wav", "b.wav")
    run(capsys, "--batch-size", "1", "a.wav", "b.wav")
    assert model.batch_sizes == [None, 3]


@pytest.mark.parametrize("words", ["--batch-size 1", "--stream", "--memory-limit 8GB"])
def test_what_is_done_one_by_one(capsys, fake, words):
    model = fake("one", "two")
    assert run(capsys, *words.split(), "a.wav", "b.wav") == (0, "a.wav\tone\nb.wav\ttwo\n", "")
    assert model.batch_sizes == []


def test_the_windows_of_a_long_recording_are_several(capsys, fake):
    soundfile.write("long.wav", np.zeros(31 * 16_000), 16_000)
    model = fake("one", "two")
    run(capsys, "a.wav")
    assert model.batch_sizes == []
    assert run(capsys, "long.wav") == (0, "two\n", "")
    assert model.batch_sizes == [None]


def test_files_are_read_as_they_are_asked_for(capsys, fake, monkeypatch):
    model = fake("one", "two")
    read = []

    def transcribe_batch(sources, *, on_transcript, **options):
        for number, samples in enumerate(sources):
            read.append(number)
            Path("b.wav").unlink(missing_ok=True)  # before it is its turn
            on_transcript(number, model.transcribe(samples))

    monkeypatch.setattr(model, "transcribe_batch", transcribe_batch)
    status, out, err = run(capsys, "a.wav", "b.wav", "c.wav")
    assert (status, out, read) == (1, "a.wav\tone\nc.wav\ttwo\n", [0, 1])
    assert err == "qwen4b-asr: b.wav: no such file; check the path\n"


def test_results_that_come_late_keep_those_behind_them(capsys, fake, monkeypatch):
    model = fake("one", "two")
    written = []
    monkeypatch.setattr("qwen4b_asr.cli.transcribe.write_stdout", written.append)

    def transcribe_batch(sources, *, on_transcript, **options):
        found = [model.transcribe(samples) for samples in sources]
        assert written == []
        on_transcript(0, found[0])
        assert written == ["a.wav\tone\n"]
        on_transcript(1, AudioError("samples: are silent"))

    monkeypatch.setattr(model, "transcribe_batch", transcribe_batch)
    status, _, err = run(capsys, "a.wav", "bad.wav", "b.wav", "none.wav")
    assert status == 1
    lines = [line.split(": ")[1] for line in err.splitlines()]
    assert lines == ["bad.wav", "b.wav", "none.wav"]


@given(st.lists(st.sampled_from(["good", "bad", "boom"]), min_size=1, max_size=7))
def test_who_breaks_a_batch_breaks_no_other(tmp_path_factory, kinds):
    """Files that cannot be read, and failures that nobody foresaw, in any order."""
    folder = tmp_path_factory.mktemp("many")
    lines: list[str] = []
    errors: list[str] = []
    replies: list = []
    for number, kind in enumerate(kinds):
        name = f"{number}.wav"
        if kind == "bad":
            (folder / name).write_bytes(b"not audio")
        else:
            soundfile.write(folder / name, np.zeros(8000), 16_000)
            replies.append(f"text {number}" if kind == "good" else RuntimeError("boom"))
        if kind == "good":
            lines.append(f"{folder / name}\ttext {number}\n" if len(kinds) > 1 else f"text {number}\n")
        else:
            errors.append(str(folder / name))
    model = FakeTranscriber(replies)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULE, model.as_module())
        patch.setattr("qwen4b_asr.cli.transcribe.complain", said.append)
        written: list[str] = []
        patch.setattr("qwen4b_asr.cli.transcribe.write_stdout", written.append)
        status = main([str(folder / f"{number}.wav") for number in range(len(kinds))])
    assert status == (1 if errors else 0)
    assert written == lines
    assert [message.split(": ")[0] for message in said] == errors
    assert model.replies == []
