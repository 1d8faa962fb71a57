"""The command line with real models: what it prints is what the Python interface gives."""

import json
import sys

import numpy as np
import pytest
import soundfile

import qwen4b_asr
from qwen4b_asr.cli.main import main
from qwen4b_asr.text import one_line
from qwen4b_asr.weights.paths import weights_data
from tests.helpers.tiny import save_tiny

SAMPLE = weights_data() / "demo" / "sample.wav"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=7))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("recordings")
    paths = []
    for seed, (name, rate) in enumerate([("a.wav", 16_000), ("b.flac", 44_100), ("c.ogg", 8000)]):
        paths.append(str(directory / name))
        noise = np.random.default_rng(seed).uniform(-0.3, 0.3, ((1 + seed) * rate // 2, 1 + seed))
        soundfile.write(paths[-1], noise, rate)
    return paths


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    return status, *capsys.readouterr()


def test_text_json_and_stream_say_what_the_interface_says(capsys, model, recordings):
    transcriber = qwen4b_asr.load(model)
    want = [transcriber.transcribe(path, max_tokens=12).to_dict() for path in recordings]
    assert len({transcript["text"] for transcript in want}) > 1  # random weights, but not deaf
    options = ["--model", model, "--max-tokens", "12", "--quiet"]

    lines = "".join(f"{path}\t{one_line(found['text'])}\n" for path, found in zip(recordings, want, strict=True))
    status, out, err = run(capsys, *options, *recordings)
    assert (status, err) == (0, "")
    assert out == lines.encode("utf-8", "backslashreplace").decode()

    status, out, err = run(capsys, *options, "--format", "json", *recordings)
    assert (status, err) == (0, "")
    for line, path, transcript in zip(out.splitlines(), recordings, want, strict=True):
        found = json.loads(line)
        timings, expected = found.pop("timings"), transcript.pop("timings")
        assert found == {"file": path, **transcript}
        assert timings.keys() == expected.keys()
        stages = sum(seconds for stage, seconds in timings.items() if stage != "total")
        assert timings["total"] >= stages - 1e-9  # the stages are rounded, and so is their sum

    status, out, err = run(capsys, *options, "--stream", recordings[0])
    assert (status, out, err) == (0, want[0]["text"] + "\n", "")


def test_standard_input_equals_the_file(capsys, model, recordings, monkeypatch):
    options = ["--model", model, "--max-tokens", "12", "--quiet"]
    _, want, _ = run(capsys, *options, recordings[1])
    with open(recordings[1], "rb") as binary:
        monkeypatch.setattr(sys, "stdin", open(binary.fileno(), closefd=False))  # noqa: SIM115
        assert run(capsys, *options, "-") == (0, want, "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--language", "xx"], 2, "unknown language 'xx'; choose one of auto, zh"),
        (["--prompt-profile", "xx"], 2, "unknown prompt profile 'xx'; choose one of plain"),
        (["--model", "nowhere"], 1, "nowhere: no such directory, and no model of that name."),
    ],
)
def test_what_the_model_refuses(capsys, model, recordings, arguments, status, words):
    found, out, err = run(capsys, "--model", model, *arguments, *recordings)
    assert (found, out) == (status, "")
    assert err.startswith(f"qwen4b-asr: {words}")
    assert err.count("qwen4b-asr: ") == 1


@pytest.mark.skipif(not SAMPLE.exists(), reason="the demonstration model is not in this checkout")
def test_the_demonstration_transcribes_its_sample(capsys):
    status, out, err = run(capsys, "--model", "demo", str(SAMPLE))
    assert (status, err) == (0, "")
    assert out.strip()


def test_translations_follow_their_texts(capsys, model, recordings):
    transcriber = qwen4b_asr.load(model)
    want = [transcriber.transcribe(path, max_tokens=6, translate=True) for path in recordings[:2]]
    options = ["--model", model, "--max-tokens", "6", "--quiet", "--translate"]

    def printed(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode()

    several = "".join(
        f"{path}\t{one_line(found.text)}\t{one_line(found.translation)}\n"
        for path, found in zip(recordings, want, strict=False)
    )
    single = f"{want[0].text}\n{want[0].translation}\n"
    assert run(capsys, *options, *recordings[:2]) == (0, printed(several), "")
    assert (
        run(capsys, *options, "--stream", *recordings[:2])[1]
        .splitlines()[0]
        .endswith(f"\t{printed(one_line(want[0].translation))}")
    )
    assert run(capsys, *options, recordings[0]) == (0, printed(single), "")
    assert run(capsys, *options, "--stream", recordings[0]) == (0, printed(single), "")
    status, out, _ = run(capsys, *options, "--format", "json", recordings[0])
    assert (status, json.loads(out)["translation"]) == (0, want[0].translation)


def test_the_task_reaches_the_model(capsys, model, recordings):
    want = qwen4b_asr.load(model).transcribe(recordings[0], max_tokens=6, task="translate", prompt_profile="instruct")
    options = ["--model", model, "--max-tokens", "6", "--quiet", "--task", "translate", recordings[0]]
    status, out, _ = run(capsys, *options, "--prompt-profile", "instruct", "--format", "json")
    assert (status, tuple(json.loads(out)["tokens"])) == (0, want.tokens)
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "")
    assert "'plain' cannot translate; use instruct or chatml" in err
