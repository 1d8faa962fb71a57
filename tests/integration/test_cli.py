"""The command line with a model that says what it is told: output, options, failures, exit status."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.cli.main import main
from qwen4b_asr.cli.transcribe import output_paths
from qwen4b_asr.errors import CheckpointError, ConfigError, ModelNotFoundError, PromptError
from qwen4b_asr.text import JSON_KEYS
from tests.helpers.command_line import _settings, fake, run
from tests.helpers.fake_transcriber import FakeTranscriber

__all__ = ["_settings", "fake"]  # fixtures


# --- what is printed -------------------------------------------------------------------------------------------------


def test_one_file_prints_its_text(capsys, fake):
    fake("one two\nthree")
    assert run(capsys, "a.wav") == (0, "one two\nthree\n", "")


def test_several_files_print_a_line_each(capsys, fake):
    fake("one\ntwo", "", "三")
    assert run(capsys, "a.wav", "b.wav", "c.wav") == (0, "a.wav\tone two\nb.wav\t\nc.wav\t三\n", "")


@pytest.mark.parametrize("files", [["a.wav"], ["a.wav", "b.wav"]])
def test_json_is_one_object_per_line(capsys, fake, files):
    fake("one\ntwo", "三")
    status, out, err = run(capsys, "--format", "json", *files)
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert [line["text"] for line in lines] == ["one\ntwo", "三"][: len(files)]
    for line in lines:
        assert set(JSON_KEYS) <= set(line)
        assert line["duration_seconds"] == 0.5
        assert line["timings"]["audio"] > 0  # the command line itself read the file
        assert line["timings"]["total"] == 0.5 + line["timings"]["audio"]


@pytest.mark.parametrize(("texts", "want"), [(["one two\nthree"], "one two\nthree\n"), ([""], "\n")])
def test_stream_of_one_file_is_its_text(capsys, fake, texts, want):
    fake(*texts)
    assert run(capsys, "--stream", "a.wav") == (0, want, "")


def test_stream_of_several_files_is_a_line_each(capsys, fake):
    fake("one\ntwo", "", "三")
    assert run(capsys, "--stream", "a.wav", "b.wav", "c.wav") == (0, "a.wav\tone two\nb.wav\t\nc.wav\t三\n", "")


def test_stream_prints_before_the_end(capsys, fake, monkeypatch):
    seen = []
    monkeypatch.setattr("qwen4b_asr.cli.transcribe.write_stdout", seen.append)
    fake("one two three")
    run(capsys, "--stream", "a.wav")
    assert seen == ["one ", "two ", "three", "\n"]


def test_a_budget_that_cuts_is_a_warning(capsys, fake):
    cut = {"text": "one", "finish_reason": "length"}
    fake(cut, cut)
    status, out, err = run(capsys, "a.wav")
    assert (status, out) == (0, "one\n")
    assert err == "qwen4b-asr: a.wav: warning: cut off by the token budget; raise it with --max-tokens\n"
    assert run(capsys, "--quiet", "a.wav") == (0, "one\n", "")


def test_characters_that_the_terminal_lacks_are_escaped(fake, monkeypatch, tmp_path):
    fake("三 ok")
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["a.wav"]) == 0
    assert (tmp_path / "out").read_text() == "\\u4e09 ok\n"


# --- what reaches the model ------------------------------------------------------------------------------------------


def test_options_reach_the_model_and_unset_ones_do_not(capsys, fake):
    model = fake("x", "x")
    run(capsys, "a.wav")
    words = "-m other --dtype bfloat16 -l zh --prompt-profile raw --max-tokens 7 a.wav"
    run(capsys, *words.split())
    assert model.loaded == [("some-model", "auto"), ("other", "bfloat16")]
    assert model.calls == [{}, {"language": "zh", "prompt_profile": "raw", "max_tokens": 7}]


def test_the_model_is_loaded_once_and_only_for_a_readable_file(capsys, fake):
    model = fake("x", "y")
    run(capsys, "bad.wav", "none.wav")
    assert model.loaded == []
    run(capsys, "bad.wav", "a.wav", "b.wav")
    assert len(model.loaded) == 1


def test_standard_input(capsys, fake, monkeypatch):
    fake("one", "two")
    with open("a.wav", "rb") as binary:
        monkeypatch.setattr(sys, "stdin", open(binary.fileno(), closefd=False))  # noqa: SIM115
        assert run(capsys, "-", "b.wav") == (0, "-\tone\nb.wav\ttwo\n", "")


def test_a_file_named_as_a_command(capsys, fake):
    Path("a.wav").rename("convert")
    Path("b.wav").rename("--debug")
    fake("one", "two")
    assert run(capsys, "./convert") == (0, "one\n", "")
    assert run(capsys, "--", "--debug") == (0, "two\n", "")


# --- output files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_output_dir_gets_one_file_each(capsys, fake, suffix):
    Path("sub").mkdir()
    Path("sub/a.wav").hardlink_to("a.wav")
    fake("one\ntwo", "三", "four")
    Path("out").mkdir()
    Path(f"out/a.{suffix}").write_text("old")
    status, out, err = run(capsys, "-f", suffix, "-o", "out", "a.wav", "sub/a.wav", "b.wav")
    assert (status, out, err) == (0, "", "")
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path("out").iterdir()}
    if suffix == "json":
        texts = {name: json.loads(text)["text"] + "\n" for name, text in texts.items()}
    assert texts == {f"a.{suffix}": "one\ntwo\n", f"a-2.{suffix}": "三\n", f"b.{suffix}": "four\n"}


def test_output_dir_is_made_and_files_get_ordinary_permissions(capsys, fake):
    fake("one")
    assert run(capsys, "-o", "new/deep", "a.wav")[0] == 0
    Path("plain").touch()
    assert Path("new/deep/a.txt").stat().st_mode == Path("plain").stat().st_mode


def test_output_dir_that_cannot_be(capsys, fake):
    fake()
    status, out, err = run(capsys, "-o", "a.wav", "b.wav")
    assert (status, out) == (1, "")
    assert err == "qwen4b-asr: a.wav: File exists; choose another --output-dir\n"


def test_a_failed_write_leaves_no_part(capsys, fake, monkeypatch):
    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    fake("one", "two")
    status, out, err = run(capsys, "-o", "out", "a.wav", "b.wav")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"qwen4b-asr: {name}.wav: cannot write out/{name}.txt: No space left on device" for name in "ab"
    ]
    assert list(Path("out").iterdir()) == []


@given(
    st.lists(st.sampled_from(["a.wav", "A.mp3", "x/a.wav", "a-2.wav", "b", ".wav", "-", "stdin.ogg", "a.b.wav", ".."]))
)
def test_output_names_never_collide(files):
    paths = output_paths(files, Path("out"), "txt")
    assert len({str(path).casefold() for path in paths}) == len(files)
    for path in paths:
        assert path.parent == Path("out")
        assert path.suffix == ".txt"
    if files:
        assert paths[0].stem == {"-": "stdin", "..": "..", ".wav": ".wav"}.get(files[0], Path(files[0]).stem)


# --- failures --------------------------------------------------------------------------------------------------------


def test_failed_files_do_not_stop_the_others(capsys, fake):
    fake("one", RuntimeError("matmul\nsecond line"), "three")
    status, out, err = run(capsys, "bad.wav", "a.wav", "b.wav", "none.wav", "c.wav")
    assert status == 1
    assert out == "a.wav\tone\nc.wav\tthree\n"
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("qwen4b-asr: bad.wav: is not audio")
    assert lines[1] == "qwen4b-asr: b.wav: unexpected RuntimeError: matmul (--debug shows where)"
    assert lines[2] == "qwen4b-asr: none.wav: no such file; check the path"


def test_debug_shows_the_traceback(capsys, fake):
    fake(RuntimeError("matmul"), "two")
    status, out, err = run(capsys, "--debug", "a.wav", "b.wav", "bad.wav")
    assert (status, out) == (1, "b.wav\ttwo\n")
    assert err.count("Traceback") == 3  # the third has a cause
    assert "raise reply\nRuntimeError: matmul" in err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelNotFoundError("m: no such model\n  - try demo"), 1),
        (CheckpointError("m: damaged"), 1),
        (ConfigError("m: unknown key"), 1),
        (PromptError("unknown language 'xx'"), 2),
    ],
)
def test_what_is_wrong_for_all_files_is_said_once(capsys, fake, error, status):
    fake(error, "two")
    assert run(capsys, "a.wav", "b.wav") == (status, "", f"qwen4b-asr: {error}\n")


def test_a_failure_in_the_middle_of_a_stream_ends_the_line(capsys, fake, monkeypatch):
    model = fake("unused", "two")

    def transcribe(samples, *, on_token, **options):
        if model.replies.pop(0) == "two":
            return FakeTranscriber(["two"]).transcribe(samples, on_token=on_token)
        on_token("half")
        raise RuntimeError("boom")

    monkeypatch.setattr(model, "transcribe", transcribe)
    status, out, err = run(capsys, "--stream", "a.wav", "b.wav")
    assert (status, out) == (1, "a.wav\thalf\nb.wav\ttwo\n")
    assert "a.wav: unexpected RuntimeError: boom" in err


def test_interruption(capsys, fake):
    fake("one", KeyboardInterrupt())
    assert run(capsys, "a.wav", "b.wav", "c.wav") == (130, "a.wav\tone\n", "qwen4b-asr: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "required: FILE"),
        ("--format srt a.wav", "invalid choice: 'srt'"),
        ("--dtype float16 a.wav", "invalid choice: 'float16'"),
        ("--max-tokens 0 a.wav", "whole number from 1 but got '0'"),
        ("--max-tokens x a.wav", "whole number from 1 but got 'x'"),
        ("--batch-size 0 a.wav", "whole number from 1 but got '0'"),
        ("--batch-size 2 --stream a.wav", "--stream prints one recording after the other"),
        ("--batch-size 2 --draft a.wav", "--draft is for one recording at a time"),
        ("--stream --format json a.wav", "--stream prints text"),
        ("--stream --output-dir out a.wav", "--stream prints text"),
        ("--formt json a.wav", "unrecognized arguments"),
        ("--form json a.wav", "unrecognized arguments"),
        ("- a.wav -", "only once"),
        ("verify", "required: DIR"),
        ("convert", "required: --output"),
    ],
)
def test_wrong_usage(capsys, fake, arguments, words):
    model = fake("x")
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert words in err
    assert model.loaded == []


def test_no_model_says_what_to_do(capsys, monkeypatch):
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("QWEN4B_ASR_MODEL")
        else:
            monkeypatch.setenv("QWEN4B_ASR_MODEL", value)
        status, out, err = run(capsys, "a.wav")
        assert (status, out) == (2, "")
        for hint in ("--model demo", "qwen4b-asr convert", "qwen4b-asr download", "QWEN4B_ASR_MODEL"):
            assert hint in err


def test_an_unusable_blas_is_wrong_usage(capsys, monkeypatch):
    def refuse():
        raise ValueError("[preload_openblas] QWEN4B_ASR_BLAS must be better")

    monkeypatch.setattr("qwen4b_asr._blas.preload_openblas", refuse)
    status, out, err = run(capsys, "a.wav")
    assert (status, out) == (2, "")
    assert "QWEN4B_ASR_BLAS must be better" in err


def test_commands_report_errors_in_one_line(capsys):
    status, out, err = run(capsys, "verify", "nowhere")
    assert (status, out) == (1, "")
    assert err.startswith("qwen4b-asr: ")
    assert "Traceback" not in err
