"""Conversion as a process: killed in the middle, short of memory, called from the command line."""

import json
import re
import signal
from dataclasses import replace

import mlx.core as mx
import pytest

from qwen4b_asr.weights.convert import convert
from qwen4b_asr.weights.verify import verify
from tests.helpers.tiny import CONFIG
from tests.helpers.weights_parts import write_parts
from tests.helpers.weights_process import files_of, in_child

KILLED = """
import os, signal, sys
from pathlib import Path
from qwen4b_asr.weights.convert import convert
folder, at, force = Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
count = 0
def on_progress(name, done, total):
    global count
    count += 1
    if count == at or (at == 0 and done == total):  # 0: when all is written but the checksums
        os.kill(os.getpid(), signal.SIGKILL)
convert(encoder=folder / "sensevoice", adaptor=folder / "adaptor.pt", llm=folder / "qwen3", output=folder / "out",
        adaptor_heads=4, shard_bytes=50_000, force=force, on_progress=on_progress)
"""


@pytest.mark.parametrize("at", [1, 40, 0])
def test_a_killed_conversion_leaves_nothing_half_made(tmp_path, at):
    parts = write_parts(tmp_path)
    child = in_child(KILLED, tmp_path, at, 0)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]
    assert len(left) == 1
    convert(**parts.arguments(tmp_path / "out"))  # and the next run clears up
    assert verify(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adaptor.pt", "out", "qwen3", "sensevoice"]


def test_a_killed_replacement_leaves_the_old_model(tmp_path):
    parts = write_parts(tmp_path)
    convert(**parts.arguments(tmp_path / "out"))
    before = files_of(tmp_path / "out")
    assert in_child(KILLED, tmp_path, 100, 1).returncode == -signal.SIGKILL
    assert files_of(tmp_path / "out") == before
    assert verify(tmp_path / "out").ok


def test_a_conversion_that_fails_cleans_up(tmp_path):
    parts = write_parts(tmp_path)

    def stop(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(**parts.arguments(tmp_path / "out"), on_progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adaptor.pt", "qwen3", "sensevoice"]


MEASURED = """
import json, resource, sys
from pathlib import Path
import mlx.core as mx
from qwen4b_asr.weights.convert import convert
from qwen4b_asr.weights.load import load_model
from qwen4b_asr.weights.parts import plan_parts
from qwen4b_asr.weights.verify import verify
from mlx.utils import tree_flatten
folder, out = Path(sys.argv[1]), Path(sys.argv[1]) / "out"
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: on Linux it starts at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
plan_parts(folder / "sensevoice", folder / "adaptor.pt", folder / "qwen3", None, 4)
figures = [peak()]
convert(encoder=folder / "sensevoice", adaptor=folder / "adaptor.pt", llm=folder / "qwen3", output=out, adaptor_heads=4)
figures.append(peak())
assert verify(out).ok
figures.append(peak())
model, config = load_model(out, dtype="float32")
figures.append(peak())
mx.eval(model.audio_encoder.parameters(), model.adaptor.parameters())
figures.append(peak())
mx.eval(model.parameters())
figures.append(peak())
total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
print(json.dumps(figures + [total]))
"""


def test_memory_stays_within_blocks_and_loading_within_the_weights(tmp_path):
    # Two matrices of 66 MB (bfloat16) are nearly all of the model.
    decoder = replace(CONFIG.decoder, vocab_size=128_000, hidden_size=256, tie_word_embeddings=False)
    config = replace(CONFIG, decoder=decoder, adaptor=replace(CONFIG.adaptor, output_size=256))
    write_parts(tmp_path, config=config, llm_dtype=mx.bfloat16, shards=False)
    largest = 128_000 * 256 * 2
    child = in_child(MEASURED, tmp_path)
    assert child.returncode == 0, child.stderr
    planned, converted, verified, opened, some, loaded, total = json.loads(child.stdout)
    assert converted - planned < largest  # the aim was two of the largest tensors
    assert verified - planned < largest
    assert opened - verified < 20 << 20  # headers only
    assert some - verified < 20 << 20  # a decoder that is not run is not read
    assert loaded - opened < 1.15 * total + largest


# --- The command line ------------------------------------------------------------------------------------------------

CLI = """
import argparse, sys
from qwen4b_asr.cli import convert, verify
command = {"convert": convert, "verify": verify}[sys.argv[1]]
parser = argparse.ArgumentParser()
command.add_arguments(parser)
sys.exit(command.run(parser.parse_args(sys.argv[2:])))
"""


def test_the_commands(tmp_path):
    parts = write_parts(tmp_path)
    options = ["--encoder", parts.encoder, "--adaptor", parts.adaptor, "--llm", parts.llm, "--adaptor-heads", "4"]
    child = in_child(
        CLI, "convert", *options, "--output", tmp_path / "out", "--shard-size", "50K", "--dtype", "bfloat16"
    )
    assert (child.returncode, child.stdout) == (0, "")
    assert re.fullmatch(r".*out: funasr-qwen4b with 5 encoder, 2 adaptor, 2 decoder layers\. .*\n", child.stderr)
    child = in_child(CLI, "verify", tmp_path / "out")
    assert (child.returncode, child.stderr) == (0, "")
    assert re.search(r"out: ok \(\d+ files, 1\d\d tensors, [\d,]+ parameters", child.stdout)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    child = in_child(CLI, "verify", tmp_path / "out")
    assert child.returncode == 1
    assert "tokenizer.json does not have the checksum" in child.stderr


@pytest.mark.parametrize("size", ["0", "-1", "4T", "x", "1.5G", ""])
def test_a_shard_size_that_is_none_is_a_usage_error(tmp_path, size):
    options = ["--encoder", "a", "--adaptor", "b", "--llm", "c", "--output", tmp_path / "d", f"--shard-size={size}"]
    child = in_child(CLI, "convert", *options)
    assert child.returncode == 2
    assert "is not a size such as 500M or 4G" in child.stderr
