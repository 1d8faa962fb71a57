"""Downloads from a hub on this machine: cached, broken off, damaged, refused, offline, and with a full disk."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen4b_asr.errors import DownloadError, ModelNotFoundError
from qwen4b_asr.weights import hub_transfer
from qwen4b_asr.weights.catalog import Source, any_source
from qwen4b_asr.weights.hub import Hub
from tests.helpers.hub_server import COMMIT, free_port, serving, sha256
from tests.helpers.weights_process import PACKAGE_PARENT

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": WEIGHTS, "README.md": b"?", "x.bin": b"?"}
SOURCE = any_source("ann/model")


CHUNK = 100_000  # huggingface_hub hands on 10 MB at a time; what is smaller is lost when a connection drops


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", os.devnull)


@pytest.fixture
def server():
    with serving({"ann/model": dict(FILES)}) as running:
        yield running


@pytest.fixture
def hub(server, tmp_path):
    return Hub(tmp_path / "hub", server.address, offline=False)


def blobs(hub: Hub) -> Path:
    return hub.folder / "models--ann--model" / "blobs"


def content(snapshot: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in snapshot.iterdir()}


WANTED = {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}


# --- what is fetched, and when ---------------------------------------------------------------------------------------


def test_a_source_is_fetched_into_the_layout_that_other_tools_read(hub):
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    snapshot = hub.fetch(SOURCE)
    assert content(snapshot) == WANTED
    path = try_to_load_from_cache("ann/model", "model.safetensors", cache_dir=hub.folder)
    assert path == str(snapshot / "model.safetensors")
    scanned = scan_cache_dir(hub.folder)
    assert (scanned.warnings, [repo.repo_id for repo in scanned.repos]) == ([], ["ann/model"])
    assert list(blobs(hub).glob("*.incomplete")) == []


def test_what_is_cached_causes_no_request(hub, server):
    assert hub.cached(SOURCE) is None
    snapshot = hub.fetch(SOURCE)
    count = len(server.requests)
    assert hub.fetch(SOURCE) == hub.cached(SOURCE) == snapshot
    assert hub.fetch(any_source("ann/model", COMMIT)) == snapshot
    assert len(server.requests) == count


def test_what_another_tool_has_fetched_causes_no_request(hub, server):
    from huggingface_hub import hf_hub_download

    for name in WANTED:
        hf_hub_download("ann/model", name, cache_dir=hub.folder, endpoint=server.address)
    count = len(server.requests)
    assert content(hub.fetch(SOURCE)) == WANTED
    assert len(server.requests) == count


def test_an_update_asks_and_fetches_only_what_changed(hub, server):
    old = hub.fetch(SOURCE)
    server.commit = "f" * 40
    server.repos["ann/model"]["config.json"] = b'{"new": 1}'
    assert hub.fetch(SOURCE) == old
    server.requests.clear()
    new = hub.fetch(SOURCE, update=True)
    assert new.name == "f" * 40
    assert content(new) == {**WANTED, "config.json": b'{"new": 1}'}
    assert len(server.transfers()) == 1
    assert hub.cached(SOURCE) == new


def test_shards_that_the_index_lists_belong_to_it(hub, server):
    shards = {f"model-{i}-of-2.safetensors": bytes([i]) * 1000 for i in (1, 2)}
    index = b'{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    del server.repos["ann/model"]["model.safetensors"]
    server.repos["ann/model"] |= {**shards, "model.safetensors.index.json": index}
    snapshot = hub.fetch(SOURCE)
    assert content(snapshot).keys() >= shards.keys()
    (snapshot / "model-2-of-2.safetensors").resolve().unlink()
    assert hub.cached(SOURCE) is None
    assert content(hub.fetch(SOURCE))["model-2-of-2.safetensors"] == bytes([2]) * 1000
    del server.repos["ann/model"]["model-2-of-2.safetensors"]
    shutil.rmtree(hub.folder)
    with pytest.raises(DownloadError, match=r"lists model-2-of-2\.safetensors, which the hub does not have"):
        hub.fetch(SOURCE)
    assert hub.cached(SOURCE) is None


def test_progress_runs_from_nothing_to_all(hub):
    seen = []
    hub.fetch(SOURCE, on_progress=lambda name, done, total: seen.append((name, done, total)))
    total = sum(map(len, WANTED.values()))
    assert {step[2] for step in seen} == {total}
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    assert [name for name in dict.fromkeys(step[0] for step in seen)] == [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    ]


# --- broken off ------------------------------------------------------------------------------------------------------


def test_a_connection_that_drops_is_taken_up_where_it_broke(hub, server):
    server.cut_after = 350_000
    assert content(hub.fetch(SOURCE)) == WANTED
    assert [request.range for request in server.transfers() if request.range] == ["bytes=300000-"]


KILLED = """
import sys, pathlib
from huggingface_hub import constants
from qwen4b_asr.weights.catalog import any_source
from qwen4b_asr.weights.hub import Hub
constants.DOWNLOAD_CHUNK_SIZE = 100_000
Hub(pathlib.Path(sys.argv[1]), sys.argv[2]).fetch(any_source("ann/model"))
"""


def test_a_killed_run_is_taken_up_by_the_next(hub, server):
    server.stall_after = 700_000
    command = [sys.executable, "-c", KILLED, str(hub.folder), server.address]
    run = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)})
    assert server.stalled.wait(60)
    partial = blobs(hub) / f"{sha256(WEIGHTS)}.incomplete"
    while not partial.exists() or not partial.stat().st_size:
        assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = partial.stat().st_size
    assert hub.cached(SOURCE) is None
    server.requests.clear()
    assert content(hub.fetch(SOURCE)) == WANTED
    assert [request.range for request in server.transfers()] == [f"bytes={kept}-"]


def leave_partial(hub: Hub, data: bytes) -> None:
    blobs(hub).mkdir(parents=True)
    (blobs(hub) / f"{sha256(WEIGHTS)}.incomplete").write_bytes(data)


def test_a_server_without_ranges_begins_again(hub, server):
    leave_partial(hub, WEIGHTS[:1000])
    server.refuse_ranges = True
    assert content(hub.fetch(SOURCE)) == WANTED


@pytest.mark.parametrize("data", [b"?" * 1000, WEIGHTS + b"more"], ids=["other bytes", "too many"])
def test_what_an_earlier_run_left_is_not_trusted(hub, server, data):
    leave_partial(hub, data)
    assert content(hub.fetch(SOURCE)) == WANTED
    assert server.transfers()[-1].range is None


# --- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"], ids=["SHA-256", "git hash"])
def test_a_wrong_checksum_is_refused_and_nothing_kept(hub, server, name):
    true = FILES[name]
    server.sent[name] = bytes([true[0] ^ 1]) + true[1:]
    with pytest.raises(DownloadError, match=f"{name}: what arrived does not have the checksum"):
        hub.fetch(SOURCE)
    assert hub.cached(SOURCE) is None
    assert true not in [path.read_bytes() for path in blobs(hub).iterdir()]
    assert list(blobs(hub).glob("*.incomplete")) == []
    server.sent.clear()
    assert content(hub.fetch(SOURCE)) == WANTED


def test_a_pinned_checksum_is_compared(hub, server):
    pin = {"tokenizer.json": sha256(FILES["tokenizer.json"]), "model.safetensors": sha256(WEIGHTS)}
    source = Source("ann/model", None, SOURCE.needed, SOURCE.wanted, sha256=pin)
    assert content(hub.fetch(source)) == WANTED
    for name, said in (("tokenizer.json", "checksum"), ("model.safetensors", "another file than the one")):
        shutil.rmtree(hub.folder)
        server.requests.clear()
        with pytest.raises(DownloadError, match=said):
            hub.fetch(Source("ann/model", None, SOURCE.needed, SOURCE.wanted, sha256={name: "0" * 64}))
        assert hub.cached(source) is None


def test_a_shortened_file_is_refused(hub, server):
    server.sent["model.safetensors"] = WEIGHTS[:-1]
    with pytest.raises(DownloadError, match=r"model|size"):
        hub.fetch(SOURCE)
    assert hub.cached(SOURCE) is None
    server.sent.clear()
    assert content(hub.fetch(SOURCE)) == WANTED


# --- refused ---------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("ann/model")
    return said


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        ((404, "RepoNotFound"), ModelNotFoundError, "the hub has no such model"),
        ((401, "RepoNotFound"), ModelNotFoundError, "keeps it private"),
        ((404, "RevisionNotFound"), ModelNotFoundError, "not this revision"),
        ((403, "GatedRepo"), DownloadError, "asks for consent"),
        ((403, ""), DownloadError, "refuses access"),
        ((429, ""), DownloadError, "answers 429: it asks for patience"),
        ((418, ""), DownloadError, "answers 418"),
    ],
)
def test_a_refusal_is_one_line(hub, server, monkeypatch, status, kind, said):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits before it repeats
    server.status = status
    with pytest.raises(kind) as error:
        hub.fetch(SOURCE)
    assert said in one_line(error)


def test_a_wrong_token_is_said_and_the_right_one_stays_with_the_hub(hub, server, monkeypatch):
    server.token = "right"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(DownloadError) as error:
        hub.fetch(SOURCE)
    assert "refuses access (401): HF_TOKEN" in one_line(error)
    monkeypatch.setenv("HF_TOKEN", "right")
    server.requests.clear()
    hub.fetch(SOURCE)
    shown = {request.path.startswith("/cdn/"): request.token for request in server.requests}
    assert shown == {False: "right", True: None}


def test_a_model_without_what_is_needed(hub, server):
    del server.repos["ann/model"]["model.safetensors"]
    with pytest.raises(DownloadError, match=r"no \*\.safetensors\|\*\.pt in it"):
        hub.fetch(SOURCE)
    assert server.transfers() == []


# --- no network, no room ---------------------------------------------------------------------------------------------


def test_no_network_and_no_cache_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub = Hub(tmp_path, f"http://127.0.0.1:{free_port()}", offline=False)
    with pytest.raises(DownloadError) as error:
        hub.fetch(SOURCE)
    assert "the hub cannot be reached" in one_line(error)


def test_offline_no_request_is_made(hub, server):
    offline = Hub(hub.folder, server.address, offline=True)
    with pytest.raises(DownloadError) as error:
        offline.fetch(SOURCE)
    assert "HF_HUB_OFFLINE" in one_line(error)
    assert server.requests == []
    snapshot = hub.fetch(SOURCE)
    assert offline.fetch(SOURCE) == snapshot


def test_too_little_room_is_said_before_anything_is_fetched(hub, server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(DownloadError) as error:
        hub.fetch(SOURCE)
    assert "has room for 0.00 GB" in one_line(error)
    assert server.transfers() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_what_arrived(hub, server, monkeypatch, number):
    write = hub_transfer._Counting.write

    def full(self, data):
        if self.tell() > 200_000:
            raise OSError(number, os.strerror(number))
        return write(self, data)

    monkeypatch.setattr(hub_transfer._Counting, "write", full)
    with pytest.raises(DownloadError) as error:
        hub.fetch(SOURCE)
    assert "the disk is full" in one_line(error)
    monkeypatch.setattr(hub_transfer._Counting, "write", write)
    server.requests.clear()
    assert content(hub.fetch(SOURCE)) == WANTED
    assert [request.range for request in server.transfers()] == ["bytes=300000-"]


def test_a_place_that_cannot_be_written(hub, tmp_path):
    hub.folder.write_bytes(b"a file")
    with pytest.raises(DownloadError, match="cannot be written"):
        hub.fetch(SOURCE)


def test_an_error_that_nobody_foresaw_passes(hub, monkeypatch):
    def broken(*words, **more):
        raise RuntimeError("a defect")

    monkeypatch.setattr("qwen4b_asr.weights.hub.fetch_file", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        hub.fetch(SOURCE)


def test_a_server_that_is_no_hub(hub, server):
    server.status = (200, "")
    with pytest.raises(DownloadError) as error:
        hub.fetch(SOURCE)
    assert "does not answer as a hub does" in one_line(error)
