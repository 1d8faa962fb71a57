"""Memory of real runs: flat over many utterances, within the plan, and refused by the command line beforehand."""

import gc
import json
import weakref

import mlx.core as mx
import numpy as np
import pytest

import qwen4b_asr
from qwen4b_asr import loading
from qwen4b_asr.audio import load_audio
from qwen4b_asr.cli.main import main
from qwen4b_asr.machine import KEPT_ON_GPU, Machine, kept_buffers
from qwen4b_asr.memory import plan_memory
from qwen4b_asr.weights.paths import weights_data
from tests.helpers.tiny import save_tiny

SAMPLE = weights_data() / "demo" / "sample.wav"


@pytest.fixture(autouse=True)
def limits():
    """Put MLX's limits back, which belong to the process."""
    memory, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def test_fifty_utterances_leave_nothing_behind():
    transcriber = qwen4b_asr.load("demo")
    samples = load_audio(SAMPLE)
    rng = np.random.default_rng(0)
    # Every length from half a second to all of it, longest first; what is kept for good is kept by then.
    lengths = [samples.size, *rng.integers(8000, samples.size, 49)]
    active, peaks = [], []
    for number, length in enumerate(lengths):
        decoder = ("llm", "ctc", "ctc-beam")[number % 3]
        assert transcriber.transcribe(samples[:length], decoder=decoder).model
        mx.synchronize()
        active.append(mx.get_active_memory())
        peaks.append(mx.get_peak_memory())
        mx.reset_peak_memory()
    assert max(active[6:]) == min(active[6:])
    assert max(peaks[1:]) <= 1.1 * max(peaks[:4])


def test_a_run_stays_within_its_plan():
    transcriber = qwen4b_asr.load("demo")
    plan = plan_memory(transcriber.config, "float32")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    transcriber.transcribe(np.tile(load_audio(SAMPLE), 20)[: 30 * 16_000])
    assert mx.get_peak_memory() - before <= plan.peak
    assert mx.get_active_memory() - before <= 1.05 * plan.weight_bytes


def test_a_model_that_nobody_uses_is_freed_at_once():
    """Without Python's search for cycles, which may come long after the next model has asked for the same room."""
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        transcriber = qwen4b_asr.load("demo")
        samples = load_audio(SAMPLE)[:48_000]
        for draft in (True, False):
            transcriber.transcribe(samples, draft=draft)
        transcriber.transcribe_batch([samples] * 3, batch_size=3)
        modules = [weakref.ref(module) for _, module in transcriber.model.named_modules()]
        del transcriber
        assert not [type(module()).__name__ for module in modules if module() is not None]
        assert mx.get_active_memory() <= before + (1 << 20)
    finally:
        gc.enable()


# --- load ---------------------------------------------------------------------------------------------------------


def test_load_refuses_before_it_reads(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(qwen4b_asr.ConfigError, match=r"tiny: needs \d+ MB of memory \(weights .*, but the limit is"):
        qwen4b_asr.load(folder, memory_limit=1_000_000)
    with pytest.raises(qwen4b_asr.ConfigError, match="memory_limit 0: must be a number of bytes from 1"):
        qwen4b_asr.load(folder, memory_limit=0)
    with pytest.raises(qwen4b_asr.CheckpointError):  # with room it is read
        qwen4b_asr.load(folder, memory_limit=1 << 40)


def test_load_warns_where_little_is_left_and_refuses_where_nothing_helps(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr(loading, "this_machine", lambda: Machine(1 << 40, 1_000_000))
    with pytest.warns(RuntimeWarning, match="this machine has only 1 MB for it"):
        qwen4b_asr.load(folder)
    monkeypatch.setattr(loading, "this_machine", lambda: Machine(1_000_000, 1_000_000))
    with pytest.raises(qwen4b_asr.ConfigError, match=r"this machine has 1 MB; .*--memory-limit tries all the same"):
        qwen4b_asr.load(folder)
    qwen4b_asr.load(folder, memory_limit=1 << 40)


def test_a_batch_needs_more(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    config = qwen4b_asr.load(folder).config
    limit = plan_memory(config, "float32", reserve=kept_buffers()).total
    qwen4b_asr.load(folder, memory_limit=limit)
    with pytest.raises(qwen4b_asr.ConfigError, match="but the limit is"):
        qwen4b_asr.load(folder, memory_limit=limit, batch_size=32)


def test_the_limit_reaches_mlx(tmp_path):
    qwen4b_asr.load(save_tiny(tmp_path / "tiny"), memory_limit=5 << 30)
    assert (4 << 30) < mx.get_memory_limit() < (5 << 30)


# --- The command line ---------------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    return status, *capsys.readouterr()


def test_transcribing_within_a_limit(capsys):
    status, out, err = run(capsys, "--model", "demo", "--memory-limit", "2G", str(SAMPLE))
    assert (status, err) == (0, "")
    assert out == (weights_data() / "demo" / "sample.txt").read_text()
    status, out, err = run(capsys, "--model", "demo", "--memory-limit", "5M", str(SAMPLE))
    assert (status, out) == (1, "")
    assert "but the limit is 5 MB; no quantisation fits" in err


@pytest.mark.parametrize("size", ["0", "-1", "12T", "much", "1.5G"])
def test_what_is_no_size(capsys, size):
    with pytest.raises(SystemExit) as caught:
        main(["--model", "demo", f"--memory-limit={size}", str(SAMPLE)])
    assert caught.value.code == 2
    assert "is not a size such as 500M or 4G" in capsys.readouterr().err


def test_a_warning_is_one_line_and_quiet_leaves_it_out(capsys, monkeypatch):
    monkeypatch.setattr(loading, "this_machine", lambda: Machine(1 << 40, 1_000_000))
    status, _, err = run(capsys, "--model", "demo", str(SAMPLE))
    assert status == 0, err
    assert err.startswith("qwen4b-asr: warning: demo-spoken-numbers: needs ")
    assert err.count("\n") == 1
    status, _, err = run(capsys, "--model", "demo", "--quiet", str(SAMPLE))
    assert (status, err) == (0, "")


def test_the_plan_of_the_4b_system(capsys):
    status, out, err = run(capsys, "plan", "funasr-qwen4b", "--dtype", "bfloat16", "--memory-limit", "100G")
    assert (status, err) == (0, "")
    lines = {line.split("  ")[1]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert lines["decoder"][1:] == ["8.04", "GB"]
    assert lines["--quantize 8"][-4:] == ["-", "+", "+", "+"]
    assert lines["--quantize 4"][-4:] == ["+", "+", "+", "+"]
    assert lines["bfloat16"][-4] == "-"


def test_the_plan_as_json(capsys):
    status, out, err = run(capsys, "plan", "demo", "--json", "--batch", "4")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["total"] > found["peak"] > sum(found["weights"].values())
    assert found["path"] == str(weights_data() / "demo")
    assert found["forms"][0]["reserve"] == KEPT_ON_GPU
    assert found["forms"][0]["fits"] == {"8": True, "16": True, "24": True, "32": True}
    one = json.loads(run(capsys, "plan", "demo", "--json")[1])
    assert found["weights"] == one["weights"]
    assert one["cache"] < found["cache"] < 4 * one["cache"]  # the text before the audio is kept once


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "nosuch: no such directory, and no model of that name."),
        (["qwen3-4b"], "qwen3-4b: a language model, no recogniser"),
        (["demo", "--batch", "0"], "[Work] batch must be at least 1 but got 0"),
        (["funasr-qwen4b", "--memory-limit", "4G"], "funasr-qwen4b: needs "),
    ],
)
def test_what_cannot_be_planned(capsys, arguments, words):
    status, _, err = run(capsys, "plan", *arguments)
    assert status == 1
    assert err.startswith(f"qwen4b-asr: {words}")
