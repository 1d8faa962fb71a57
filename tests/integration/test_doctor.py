"""`qwen4b-asr doctor`: what it shows, what it calls broken, what it advises, its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import qwen4b_asr
from qwen4b_asr.cli import doctor
from qwen4b_asr.cli.main import main
from qwen4b_asr.kernels import NAMES
from qwen4b_asr.kernels._dispatch import Operation, State
from tests.helpers.tiny import save_tiny

SOURCE = Path(qwen4b_asr.__file__).parents[1]


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    for name in ("MODEL", "KERNELS", "BLAS"):
        monkeypatch.delenv(f"QWEN4B_ASR_{name}", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys, *words: str) -> tuple[int, str]:
    status = main(["doctor", *words])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out


def examined(capsys, *words: str) -> tuple[int, dict]:
    status, out = run(capsys, *words, "--json")
    return status, json.loads(out)


def problems(report: dict, broken: bool = True) -> list[str]:
    return [finding["problem"] for finding in report["findings"] if finding["broken"] is broken]


def test_a_machine_in_order(capsys):
    status, report = examined(capsys)
    assert (status, report["ok"], problems(report)) == (0, True, [])
    assert report["versions"]["qwen4b-asr"] == qwen4b_asr.__version__
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["versions"]["mlx"]
    assert report["device"]["kind"] in ("cpu", "metal", "cuda")
    assert report["memory"]["total"] > 1e8
    assert report["memory"]["limit"] == mx.set_memory_limit(report["memory"]["limit"])  # and it was put back
    assert set(report["kernels"]) == set(NAMES)
    assert [(model["name"], model["problem"]) for model in report["models"]] == [("demo", None)]


def test_the_text_says_the_same(capsys):
    _, report = examined(capsys)
    status, text = run(capsys)
    assert status == 0
    assert text.endswith("\nnothing is broken\n")
    for word in (*report["versions"].values(), report["device"]["name"], *NAMES, report["models"][0]["path"]):
        assert word in text
    for name, state in report["kernels"].items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert state["status"] in line.split()
        assert state["detail"] in line
    for finding in report["findings"]:
        assert f"  {finding['problem']}\n    -> {finding['advice']}\n" in text


def test_a_failed_kernel_is_broken_and_the_others_are_still_shown(capsys, monkeypatch):
    real = Operation.state

    def state(self):
        return State("failed", "RuntimeError: no\nsecond line") if self.name == "fsmn" else real(self)

    monkeypatch.setattr(Operation, "state", state)
    status, report = examined(capsys)
    assert (status, report["ok"]) == (1, False)
    assert problems(report) == ["the kernel fsmn failed (RuntimeError: no)"]
    assert report["kernels"]["fsmn"] == {"status": "failed", "detail": "RuntimeError: no\nsecond line"}
    assert report["kernels"]["attention"]["status"] != "failed"
    status, text = run(capsys)
    assert status == 1
    assert "second line" not in text
    assert text.endswith("\nsomething is broken\n")


@pytest.mark.parametrize(("value", "expected"), [("off", ["off"]), ("fsmn", ["off", "plain"])])
@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_choice_of_kernels_is_shown(capsys, monkeypatch, value, expected):
    monkeypatch.setenv("QWEN4B_ASR_KERNELS", value)
    status, report = examined(capsys)
    assert status == 0
    assert sorted({state["status"] for state in report["kernels"].values()}) == expected


def test_a_misspelt_kernel_is_broken(capsys, monkeypatch):
    monkeypatch.setenv("QWEN4B_ASR_KERNELS", "fsnm")
    status, report = examined(capsys)
    assert status == 1
    assert "but got fsnm" in problems(report)[0]
    assert report["models"]  # the rest is still looked at


def test_models_are_looked_at(capsys, monkeypatch, tmp_path):
    save_tiny(tmp_path / "good")
    for name in ("config", "weights"):
        save_tiny(tmp_path / name)
    (tmp_path / "config" / "config.json").write_text("{")
    for path in (tmp_path / "weights").glob("*.safetensors"):
        path.unlink()
    monkeypatch.setenv("QWEN4B_ASR_MODEL", str(tmp_path / "good"))
    status, report = examined(capsys)
    assert (status, [model["problem"] for model in report["models"]]) == (0, [None, None])
    assert not [problem for problem in problems(report, broken=False) if "demo" in problem]
    words = [str(tmp_path / name) for name in ("config", "weights", "none")]
    status, report = examined(capsys, *words)
    assert status == 1
    found = {Path(model["path"]).name: model["problem"] for model in report["models"]}
    assert found["good"] is None
    assert "config.json" in found["config"]
    assert found["weights"] == "without *.safetensors"
    assert found["none"].endswith("no such model directory.")
    assert len(problems(report)) == 3


def test_without_a_model_of_ones_own_the_advice_is_to_make_one(capsys):
    _, report = examined(capsys)
    (finding,) = [f for f in report["findings"] if f["problem"] == "only the demo model is known"]
    assert not finding["broken"]
    assert "QWEN4B_ASR_MODEL" in finding["advice"]


def test_an_mlx_that_does_not_compute_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(mx, "arange", lambda *_: mx.zeros((5,)))
    status, report = examined(capsys)
    assert status == 1
    assert "MLX does not work" in problems(report)[0]
    assert (report["memory"], report["kernels"]) == ({}, {})
    assert "MLX does not work" in run(capsys)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="MLX has a fast BLAS of its own on a Mac")
@pytest.mark.parametrize("blas", [None, "off"])
def test_the_blas_is_named_and_its_absence_no_failure(blas, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "QWEN4B_ASR_BLAS"}
    environment |= {"PYTHONPATH": str(SOURCE)} | ({"QWEN4B_ASR_BLAS": blas} if blas else {})
    command = [sys.executable, "-m", "qwen4b_asr", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    if report["device"]["kind"] != "cpu":
        pytest.skip("a GPU multiplies here")
    slow = [finding for finding in report["findings"] if "BLAS" in finding["problem"]]
    assert bool(slow) is (report["blas"] is None)
    if blas == "off":
        assert report["blas"] is report["numpy_blas"] is None
        assert "everything" in slow[0]["problem"]
        assert slow[0]["advice"] == "unset QWEN4B_ASR_BLAS"
        return
    if report["numpy_blas"]:
        assert "openblas" in Path(report["numpy_blas"]).name
    if report["blas"]:
        assert Path(report["blas"]).is_file()
    else:
        assert "OpenBLAS" in slow[0]["advice"]


@pytest.mark.parametrize(
    ("platform", "machine", "said"), [("darwin", "x86_64", "built for Intel"), ("darwin", "arm64", None)]
)
def test_a_mac_needs_an_arm_python(monkeypatch, platform, machine, said):
    monkeypatch.setattr(doctor.sys, "platform", platform)
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    report = doctor.Report()
    doctor._look_at_versions(report)
    assert [said] * bool(said) == [word for f in report.findings for word in ["built for Intel"] if word in f.problem]
