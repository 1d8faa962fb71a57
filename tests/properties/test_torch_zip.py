"""Round trips through torch's archive: any type, shape, stride and offset; any damage is a clean refusal."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.weights.checkpoint import open_checkpoint
from qwen4b_asr.weights.tensors import TensorRef
from qwen4b_asr.weights.torch_zip import read_torch
from tests.helpers import weights_torch_writer as w

NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def views(draw: st.DrawFn):
    """A storage's bytes and a view that lies inside it: sliced, stepped, offset and transposed."""
    dtype = draw(st.sampled_from(sorted(NUMPY)))
    base = draw(st.lists(st.integers(0, 5), max_size=4))
    items = int(np.prod(base, dtype=int)) + (lead := draw(st.integers(0, 3))) + draw(st.integers(0, 3))
    size = np.dtype(NUMPY[dtype]).itemsize
    if dtype == "BOOL":
        data = bytes(draw(st.lists(st.integers(0, 1), min_size=items, max_size=items)))
    else:
        data = draw(st.binary(min_size=items * size, max_size=items * size))
    array = np.frombuffer(data, NUMPY[dtype])
    index = np.arange(items)[lead : lead + int(np.prod(base, dtype=int))].reshape(base)
    slices = [slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in base]
    index = index[tuple(slices)].transpose(draw(st.permutations(range(len(base)))))
    strides = tuple(step // index.itemsize for step in index.strides)
    offset = int(index.reshape(-1)[0]) if index.size else lead
    return w.View("0", dtype, items, offset, index.shape, strides), data, array[index]


def same_bits(found: mx.array, wanted: np.ndarray) -> bool:
    """Compare through bytes, so that NaN equals itself and bfloat16 needs no numpy type."""
    raw = np.array(found.reshape(-1).view(mx.uint8)).tobytes() if found.size else b""
    return tuple(found.shape) == wanted.shape and raw == np.ascontiguousarray(wanted).tobytes()


@SHARED_FOLDER
@given(views(), st.sampled_from([(), ("state_dict",), ("model", "module")]), st.integers(1, 64))
def test_any_view_comes_back(tmp_path, case, wrap, block_bytes):
    view, data, wanted = case
    tensors = read_torch(w.write_views(tmp_path / "a.pt", {"x": view, "y": view}, {"0": data}, wrap))
    assert list(tensors) == ["x", "y"]
    with mx.stream(mx.cpu):
        assert same_bits(tensors["x"].read(), wanted)
        blocks = list(tensors["y"].blocks(max_bytes=block_bytes))
        assert all(block.ndim == 1 for block in blocks)
        joined = mx.concatenate(blocks) if blocks else mx.zeros((0,), tensors["y"].read().dtype)
        assert same_bits(joined.reshape(wanted.shape), wanted)
    assert tensors["x"].nbytes == wanted.nbytes


@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_a_view_is_taken_exactly_when_it_lies_inside(tmp_path_factory, shape, strides, offset, items):
    reached = [offset + sum(i * s for i, s in zip(at, strides, strict=False)) for at in np.ndindex(*shape)]
    good = len(shape) == len(strides) and all(r < items for r in reached) and len(reached) <= items
    path = tmp_path_factory.getbasetemp() / "unused.pt"

    def make() -> TensorRef:
        return TensorRef("x", tuple(shape), "I16", path, bytes(items * 2), 0, items, offset, tuple(strides))

    if good:
        assert make().read().shape == tuple(shape)
    else:
        with pytest.raises(CheckpointError):
            make()


def whole_archive(tmp_path) -> bytes:
    """The bytes of a small good file."""
    tensors = {"a.weight": ("F32", (2, 3), bytes(24)), "b": ("BF16", (4,), bytes(range(8)))}
    return w.write_dense(tmp_path / "good.pt", tensors, ("state_dict",)).read_bytes()


@SHARED_FOLDER
@given(data=st.data())
def test_any_damage_is_read_or_refused_cleanly(tmp_path, data):
    raw = bytearray(whole_archive(tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "bad.pt"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):  # any other error fails
        for tensor in open_checkpoint(path).values():
            tensor.read()


OPCODES = st.sampled_from([bytes([code]) for code in b"}](.)tusaeRQbNJKXcqhr0\x85\x86\x87\x88\x8c\x94\x93\x80"])


@SHARED_FOLDER
@given(st.lists(st.one_of(OPCODES, st.binary(max_size=4), st.just(b"cos\nsystem\n")), max_size=40))
def test_any_pickle_is_read_or_refused_cleanly(tmp_path, pieces):
    for path in (
        w.write_archive(tmp_path / "bad.pt", w.program(b"".join(pieces)), {}),
        w.write_legacy(tmp_path / "bad.legacy.pt", w.program(b"".join(pieces)), {}),
    ):
        with pytest.raises(CheckpointError, match="bad"):
            read_torch(path)
