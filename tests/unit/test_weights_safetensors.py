"""safetensors: read as the reference library reads, written as it can read, refused where it is damaged."""

import hashlib
import json
import struct
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.weights.checkpoint import open_checkpoint
from qwen4b_asr.weights.safetensors_file import (
    INDEX_FILE,
    SINGLE_FILE,
    OutgoingTensor,
    plan_shards,
    read_safetensors,
    read_safetensors_directory,
    write_safetensors,
)
from qwen4b_asr.weights.tensors import dtype_name

ARRAYS = {
    "a": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "b": mx.arange(4).astype(mx.bfloat16),
    "c": mx.array(3, dtype=mx.int64),
    "d": mx.zeros((0, 5), mx.float16),
    "e": mx.array([True, False, True]),
    "f": mx.arange(3, dtype=mx.uint8),
    "g": mx.arange(5, dtype=mx.int16),
}


def outgoing(arrays):
    """The arrays as tensors to be written, each in two blocks."""

    def blocks(array):
        flat = array.reshape(-1)
        return lambda: [flat[: flat.size // 2], flat[flat.size // 2 :]]

    return [OutgoingTensor(n, tuple(a.shape), dtype_name(a.dtype), blocks(a)) for n, a in arrays.items()]


def raw(header, data=b"", length=None):
    """A file from its parts."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize("shard_bytes", [1, 30, 1 << 30])
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    seen = []
    digests = write_safetensors(
        tmp_path, outgoing(ARRAYS), shard_bytes=shard_bytes, on_tensor=lambda name, nbytes: seen.append((name, nbytes))
    )
    refs = read_safetensors_directory(tmp_path)
    assert list(refs) == list(ARRAYS) or shard_bytes > 1
    assert set(refs) == set(ARRAYS)
    for name, array in ARRAYS.items():
        found = refs[name].read()
        assert found.dtype == array.dtype
        assert found.shape == array.shape
        assert mx.array_equal(found, array)
    assert sorted(seen) == sorted((name, array.nbytes) for name, array in ARRAYS.items())
    files = {path.name for path in tmp_path.iterdir()}
    assert digests.keys() == files
    assert all(hashlib.sha256((tmp_path / f).read_bytes()).hexdigest() == digest for f, digest in digests.items())
    if shard_bytes == 1 << 30:
        assert files == {SINGLE_FILE}
    else:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
        assert list(index["weight_map"]) == list(ARRAYS)


def test_the_libraries_read_what_is_written(tmp_path):
    arrays = {name: array for name, array in ARRAYS.items() if name != "b"}  # numpy has no bfloat16
    write_safetensors(tmp_path, outgoing(arrays))
    for name, array in safetensors.numpy.load_file(tmp_path / SINGLE_FILE).items():
        assert np.array_equal(array, np.array(arrays[name]))
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b", outgoing(ARRAYS))
    loaded = mx.load(str(tmp_path / "b" / SINGLE_FILE))
    assert loaded.keys() == ARRAYS.keys()
    assert all(mx.array_equal(loaded[name], array) for name, array in ARRAYS.items())


def test_what_the_libraries_write_is_read(tmp_path):
    mx.save_safetensors(str(tmp_path / "m.safetensors"), ARRAYS, metadata={"format": "mlx"})
    safetensors.numpy.save_file({"x": np.arange(6.0).reshape(2, 3)}, tmp_path / "n.safetensors", {"k": "v"})
    refs = open_checkpoint(tmp_path / "m.safetensors")
    assert all(mx.array_equal(refs[name].read(), array) for name, array in ARRAYS.items())
    found = read_safetensors(tmp_path / "n.safetensors")["x"]
    assert found.dtype == "F64"
    assert found.read().dtype == mx.float64
    assert np.array_equal(np.array(found.read()), np.arange(6.0).reshape(2, 3))


def test_tensors_are_aligned_to_their_type(tmp_path):
    arrays = {"odd": mx.zeros((3,), mx.bfloat16), "wide": mx.zeros((2,), mx.float32), "one": mx.zeros((1,), mx.uint8)}
    write_safetensors(tmp_path, outgoing(arrays))
    for ref in read_safetensors(tmp_path / SINGLE_FILE).values():
        assert ref.start % (ref.nbytes // ref.size) == 0


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"1234567", "7 bytes are no safetensors"),
        (raw({"x": F32}, bytes(8), length=10**6), "cut short"),
        (raw({"x": F32}, bytes(8), length=2**63), "cut short"),
        (raw({"x": F32}, bytes(7)), r"'x' ends at byte .* cut short"),
        (raw(b"{]", bytes(8)), "header is damaged"),
        (raw(b"[" * 100_000, bytes(8)), "header is damaged"),
        (raw(b"\xff\xfe", bytes(8)), "header is damaged"),
        (raw([1], bytes(8)), "must be an object, not list"),
        (raw(b'{"x": 1, "x": 2}'), "a name occurs twice"),
        (raw({"x": 3}), "'x' must have dtype"),
        (raw({"x": {"dtype": "F32", "shape": [2]}}), "'x' must have dtype"),
        (raw({"x": {**F32, "dtype": "F8_E4M3"}}, bytes(8)), "'x' has the type 'F8_E4M3'"),
        (raw({"x": {**F32, "dtype": ["F32"]}}, bytes(8)), "'x' has the type"),
        (raw({"x": {**F32, "shape": [-2]}}, bytes(8)), "'x' has a malformed shape"),
        (raw({"x": {**F32, "shape": [True, 2]}}, bytes(8)), "'x' has a malformed shape"),
        (raw({"x": {**F32, "shape": [2.0]}}, bytes(8)), "'x' has a malformed shape"),
        (raw({"x": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "'x' has a malformed shape or data_offsets"),
        (raw({"x": {**F32, "data_offsets": [0]}}, bytes(8)), "'x' has a malformed shape or data_offsets"),
        (raw({"x": {**F32, "shape": [3]}}, bytes(8)), r"'x': F32 \[3\] does not fill 8 bytes"),
        (raw({"x": {**F32, "shape": [2**62, 2**62]}}, bytes(8)), "does not fill 8 bytes"),
        (raw({"x": {**F32, "data_offsets": [0, 2**62]}}, bytes(8)), "'x' ends at byte"),
        (raw({"x": F32, "y": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "'y' overlaps the tensor before it"),
        (raw({"x": F32, "y": F32}, bytes(8)), "'y' overlaps"),
        (raw({"x": F32, "y": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "'y' leaves a gap before it"),
        (raw({"x": F32}, bytes(12)), "4 bytes after the last tensor belong to none"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert "bad.safetensors" in str(caught.value)


def shards(folder, **changes):
    """A checkpoint of two shards, with parts of its index changed."""
    write_safetensors(folder, outgoing({"x": mx.zeros((4,)), "y": mx.ones((4,))}), shard_bytes=16)
    index = json.loads((folder / INDEX_FILE).read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": SECOND}, f"{SECOND}: lacks 1 tensors .* such as 'z'"),
        ({"y": "model-00003-of-00003.safetensors"}, r"model-00003-of-00003\.safetensors: the shard is missing"),
        ({"y": FIRST}, "lacks 1 tensors"),
        ({"z": FIRST, "y": None}, "lacks 1 tensors"),
        ({"x": SECOND}, f"{SECOND}: lacks|holds 'x'"),
        ({"z": "../other.safetensors"}, "'../other.safetensors', which is not the name of a file beside it"),
        ({"z": "/etc/passwd"}, "not the name of a file beside it"),
        ({"z": ".."}, "not the name of a file beside it"),
        ({"z": 3}, "not the name of a file beside it"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, changes, message):
    assert set(read_safetensors_directory(shards(tmp_path))) == {"x", "y"}
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_directory(shards_again(tmp_path, changes))


def shards_again(folder, changes):
    """Write the shards anew: the writer never overwrites."""
    for path in folder.iterdir():
        path.unlink()
    return shards(folder, **changes)


def test_a_tensor_that_the_index_leaves_out_is_refused(tmp_path):
    shards(tmp_path, y=None)
    (tmp_path / SECOND).unlink()
    assert set(read_safetensors_directory(tmp_path)) == {"x"}
    shards_again(tmp_path, {})
    both = {"x": mx.zeros((4,)), "extra": mx.zeros((1,))}
    (tmp_path / FIRST).unlink()
    mx.save_safetensors(str(tmp_path / FIRST), both)
    with pytest.raises(CheckpointError, match=r"holds 'extra', which .* puts in no file"):
        read_safetensors_directory(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_malformed_index_is_refused(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"weight_map|read as JSON"):
        read_safetensors_directory(tmp_path)


def test_an_empty_directory_says_what_is_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors, or model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_the_writer_refuses_blocks_that_do_not_fill_the_tensor(tmp_path):
    short = OutgoingTensor("x", (4,), "F32", lambda: [mx.zeros((3,))])
    with pytest.raises(ValueError, match="'x' must give 16 bytes but got 12"):
        write_safetensors(tmp_path, [short])


def test_the_writer_never_overwrites_and_says_where_it_failed(tmp_path):
    write_safetensors(tmp_path, outgoing(ARRAYS))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written \(File exists"):
        write_safetensors(tmp_path, outgoing(ARRAYS))


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 100))
@example([1, 1], 1)
@example([3, 2, 5], 5)
def test_shards_keep_order_and_size(sizes, limit):
    tensors = [OutgoingTensor(str(i), (n,), "U8", list) for i, n in enumerate(sizes)]
    shards = plan_shards(tensors, limit)
    assert [t for shard in shards for t in shard] == tensors
    for shard in shards:
        assert shard
        assert sum(t.nbytes for t in shard) <= limit or len(shard) == 1
    for left, right in pairwise(shards):
        assert sum(t.nbytes for t in left) + right[0].nbytes > limit  # no shard is cut short for nothing


def test_a_shard_size_must_be_positive():
    with pytest.raises(ValueError, match="at least 1 but got 0"):
        plan_shards([], 0)
