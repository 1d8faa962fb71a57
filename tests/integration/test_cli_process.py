"""The command line as a process: what it imports, pipes, signals, a terminal."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen4b_asr.cli import _terminal

ROOT = Path(__file__).resolve().parents[2]
FAKE = "tests.helpers.fake_transcriber"
HEAVY = {"mlx", "numpy", "soundfile", "soxr", "tokenizers", "safetensors", "huggingface_hub", "tqdm"}


@pytest.fixture(autouse=True)
def recording(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN4B_ASR_MODEL", "some-model")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    soundfile.write("a.wav", np.zeros(8000), 16_000)
    return tmp_path / "a.wav"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qwen4b_asr", *arguments]


def fake_command(replies: list, *arguments: str) -> list[str]:
    return [sys.executable, "-m", FAKE, json.dumps(replies), *arguments]


def run(words: list[str], **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False} | options
    return subprocess.run(words, **options)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["convert", "--help"], 0),
        (["verify", "--help"], 0),
        (["download", "--help"], 0),
        (["models", "--help"], 0),
        (["info", "--help"], 0),
        (["doctor", "--help"], 0),
        (["train", "--help"], 0),
        (["--format", "srt"], 2),
        (["none.wav"], 1),
    ],
)
def test_nothing_heavy_is_imported_to_answer_at_once(arguments, status):
    code = (
        "import sys\n"
        "from qwen4b_asr.cli.main import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print('\\n', status, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = run([sys.executable, "-c", code, *arguments])
    found_status, *modules = done.stdout.splitlines()[-1].split()
    assert int(found_status) == status, done.stderr
    heavy = HEAVY & set(modules)
    assert heavy == ({"numpy"} if arguments == ["none.wav"] else set())


def test_as_a_module():
    done = run(command("--version"))
    assert done.returncode == 0
    assert done.stdout.startswith("qwen4b-asr ")
    assert run(command("none.wav")).stderr == "qwen4b-asr: none.wav: no such file; check the path\n"


def test_piped_it_is_silent_but_for_the_text(recording):
    done = run(fake_command([{"text": "one", "sleep": 0.3}], "a.wav"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\n", "")


def test_a_recording_through_a_pipe(recording):
    done = run(fake_command(["one"], "-f", "json", "-"), input=recording.read_bytes(), text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout)
    assert (found["file"], found["text"], found["duration_seconds"]) == ("-", "one", 0.5)


@pytest.mark.parametrize("content", [b"", b"no audio"])
def test_a_pipe_without_a_recording(content):
    done = run(fake_command([], "-"), input=content, text=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"qwen4b-asr: standard input: is")


def test_what_the_mp3_library_prints_is_not_shown(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000)
    soundfile.write("b.mp3", noise, 16_000)
    Path("b.mp3").write_bytes(Path("b.mp3").read_bytes()[:-2000])
    done = run(fake_command([], "b.mp3"))
    assert done.stderr.startswith("qwen4b-asr: b.mp3: is cut short")
    assert done.stderr.count("\n") == 1
    assert "Xing" in run(fake_command([], "--debug", "b.mp3")).stderr


@pytest.mark.parametrize("arguments", [[], ["--stream"], ["--format", "json"]])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does, but certain to be before the first line
    done = run(fake_command(["one"] * 2, *arguments, "a.wav", "a.wav"), capture_output=False, stdout=writer, stderr=-1)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [[], ["--stream"]])
def test_a_full_disk_is_one_line(arguments):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = run(fake_command(["one"], *arguments, "a.wav"), capture_output=False, stdout=full, stderr=-1)
    assert (done.returncode, done.stderr) == (1, "qwen4b-asr: standard output: No space left on device\n")


def test_interruption_ends_quietly():
    process = subprocess.Popen(
        fake_command(["one", {"text": "two", "sleep": 60}], "a.wav", "a.wav"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's & has it ignored
    )
    assert process.stdout.readline() == "a.wav\tone\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "qwen4b-asr: interrupted\n")


# --- a terminal ------------------------------------------------------------------------------------------------------


def on_terminal(words: list[str], *, stdout_too: bool) -> tuple[int, str, str]:
    """Run with standard error on a terminal; return status, what stood there, and standard output (if elsewhere)."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with open("stdout.txt", "w+") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=theirs if stdout_too else file, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        end = time.monotonic() + 60
        while time.monotonic() < end and select.select([ours], [], [], 60)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
        status = process.wait(timeout=60)
        file.seek(0)
        return status, shown.decode(), file.read()


def screen(shown: str) -> list[str]:
    """Return the lines that are left on a terminal, with carriage returns carried out."""
    lines = []
    for line in shown.replace("\x1b[A", "").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


@pytest.mark.parametrize("stdout_too", [False, True])
def test_a_terminal_shows_progress_and_keeps_only_the_text(stdout_too):
    replies = ["one", {"text": "two", "sleep": 0.3}]
    status, shown, out = on_terminal(fake_command(replies, "a.wav", "a.wav"), stdout_too=stdout_too)
    assert status == 0
    assert "1/2" in shown
    assert "a.wav" in shown
    assert screen(shown) == (["a.wav\tone", "a.wav\ttwo"] if stdout_too else [])
    assert out == ("" if stdout_too else "a.wav\tone\na.wav\ttwo\n")


def test_a_terminal_shows_what_takes_long_for_one_file():
    status, shown, out = on_terminal(fake_command([{"text": "one", "sleep": 0.3}], "a.wav"), stdout_too=False)
    assert (status, out) == (0, "one\n")
    assert re.search(r"a\.wav \[00:0\d\]", shown)
    assert screen(shown) == []


def test_quiet_shows_nothing_on_a_terminal():
    words = fake_command([{"text": "one", "sleep": 0.3}], "--quiet", "a.wav")
    assert on_terminal(words, stdout_too=True)[:2] == (0, "one\r\n")


def test_quick_work_shows_no_progress(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(_terminal, "PATIENCE_SECONDS", 3600)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with _terminal.Progress(3) as progress:
        progress.show("a.wav")
        progress.count_token()
        progress.advance()
        with progress.paused():
            pass
    assert sys.stderr.getvalue() == ""


def test_a_stream_on_a_terminal_is_not_drawn_over():
    replies = [{"text": "one two", "sleep": 0.3}]
    status, shown, _ = on_terminal(fake_command(replies, "--stream", "a.wav"), stdout_too=True)
    assert status == 0
    assert screen(shown) == ["one two"]


def test_failures_on_a_terminal_stand_alone():
    replies = [{"sleep": 0.3, "error": "boom"}, {"text": "two", "sleep": 0.3}]
    status, shown, _ = on_terminal(fake_command(replies, "a.wav", "a.wav"), stdout_too=False)
    assert status == 1
    assert screen(shown) == ["qwen4b-asr: a.wav: unexpected RuntimeError: boom (--debug shows where)"]


def test_no_recording_is_read_from_a_terminal():
    import pty

    ours, theirs = pty.openpty()
    done = run(fake_command([], "-"), stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert "pipe one in" in done.stderr
