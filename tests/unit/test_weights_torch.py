"""Torch files: what torch wrote reads as torch has it; what is damaged is refused by file and key."""

import json
import resource
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.weights.checkpoint import open_checkpoint
from qwen4b_asr.weights.tensors import TensorRef
from qwen4b_asr.weights.torch_zip import read_torch
from tests.helpers import weights_torch_writer as w

DATA = Path(__file__).parents[1] / "data" / "torch"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))["files"]
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
FOUR = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize("file", EXPECTED)
def test_reads_what_torch_wrote(file):
    tensors = read_torch(DATA / file)
    assert list(tensors) == list(EXPECTED[file])
    for name, (dtype, shape, values) in EXPECTED[file].items():
        ref = tensors[name]
        assert (ref.name, ref.dtype, list(ref.shape)) == (name, dtype, shape)
        assert list(ref.read().shape) == shape
        assert ref.read().reshape(-1).tolist() == values
        assert [v for block in ref.blocks(max_bytes=8) for v in block.tolist()] == values


def test_the_fixtures_cover_every_type_and_both_layouts():
    dtypes = {dtype for tensors in EXPECTED.values() for dtype, _, _ in tensors.values()}
    assert dtypes == set(DTYPES)
    assert sum(file.endswith(".legacy.pt") for file in EXPECTED) >= 5


def test_a_whole_module_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"whole_module\.pt: .*'torch\.nn\.modules\.linear\.Linear'.*nothing was"):
        read_torch(DATA / "whole_module.pt")


def test_an_expanded_tensor_is_refused():
    with pytest.raises(CheckpointError, match=r"'expanded': it claims 1000 elements of a storage that holds 1$"):
        read_torch(DATA / "expanded.pt")


@pytest.mark.parametrize("file", ["dtypes.pt", "dtypes.legacy.pt"])
def test_a_truncated_file_is_refused_at_every_length(tmp_path, file):
    whole = (DATA / file).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (w.View("0", "F32", 8, 0, (4,), (1,)), "storage '0' should hold 32 bytes but holds 16"),
        (w.View("0", "F32", 4, 1, (4,), (1,)), "reaches element 4 of a storage that holds 4"),
        (w.View("0", "F32", 4, 0, (2, 2), (3, 1)), "reaches element 4 "),
        (w.View("0", "F32", 4, 0, (2, 2), (-1, 1)), "strides .* from 0"),
        (w.View("0", "F32", 4, -1, (1,), (1,)), "offset must be at least 0"),
        (w.View("0", "F32", 4, 0, (-4,), (1,)), "shape .* from 0"),
        (w.View("0", "F32", 4, 0, (4, 0), (1,)), "2 sizes but 1 strides"),
        (w.View("0", "F32", 4, 0, (2**40, 2**40), (0, 0)), "shape .* from 0"),
        (w.View("0", "F32", 4, 0, (2**30, 2**30), (0, 0)), "claims 1152921504606846976 elements"),
        (w.View("0", "F32", -4, 0, (1,), (1,)), "a size of -4"),
        (w.View("1", "F32", 4, 0, (4,), (1,)), "storage '1' is not in the file"),
        (w.View("../version", "I8", 2, 0, (2,), (1,)), "is not in the file"),
    ],
)
def test_a_claim_beyond_the_storage_is_refused(tmp_path, view, message):
    path = w.write_views(tmp_path / "bad.pt", {"encoder.w": view}, {"0": FOUR})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch(path)
    assert "bad.pt" in str(caught.value)
    assert "encoder.w" in str(caught.value) or view.items < 0


GOOD = w.opdict([(w.optext("x"), w.optensor(w.opstorage("0", "F32", 4), 0, (4,), (1,)))])


def test_the_writer_writes_what_the_reader_reads(tmp_path):
    path = w.write_archive(tmp_path / "a.pt", w.program(GOOD), {"0": FOUR})
    assert read_torch(path)["x"].read().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        (w.optext("storage"), "does not describe a storage"),
        (w.opint(3), "does not describe a storage"),
        (w.optuple(w.optext("module"), w.optext("a"), w.optext("b"), w.optext("c"), w.opint(1)), "does not describe"),
        (w.optuple(w.optext("storage"), w.optext("f"), w.optext("0"), w.optext("cpu"), w.opint(4)), "not describe"),
        (
            w.optuple(w.optext("storage"), w.opglobal("torch", "Size"), w.optext("0"), w.optext("cpu"), w.opint(4)),
            r"storage of type torch\.Size",
        ),
        (
            w.optuple(
                w.optext("storage"), w.opglobal("torch", "FloatStorage"), w.opint(0), w.optext("cpu"), w.opint(4)
            ),
            "does not describe",
        ),
    ],
)
def test_a_persistent_id_of_the_wrong_kind_is_refused(tmp_path, identifier, message):
    body = w.opdict([(w.optext("x"), w.optensor(identifier + b"Q", 0, (4,), (1,)))])
    with pytest.raises(CheckpointError, match=message):
        read_torch(w.write_archive(tmp_path / "a.pt", w.program(body), {"0": FOUR}))


def test_compressed_entries_are_refused(tmp_path):
    path = w.write_archive(tmp_path / "a.pt", w.program(GOOD), {"0": FOUR}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read_torch(path)


def test_big_endian_files_are_refused(tmp_path):
    path = w.write_archive(tmp_path / "a.pt", w.program(GOOD), {"0": FOUR}, byteorder="big")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_occurs_twice_is_refused(tmp_path):
    path = w.write_archive(tmp_path / "a.pt", w.program(GOOD), {"0": FOUR})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", FOUR)
    with pytest.raises(CheckpointError, match="occurs twice"):
        read_torch(path)


def test_entries_that_overlap_are_refused(tmp_path):
    path = w.write_archive(tmp_path / "a.pt", w.program(GOOD), {"0": FOUR, "1": FOUR})
    raw = bytearray(path.read_bytes())
    # Point the central directory's entry of storage 1 at storage 0's local header.
    first = raw.index(b"PK\x03\x04", raw.index(b"archive/byteorder"))
    name = raw.rindex(b"archive/data/1")
    raw[name - 4 : name] = struct.pack("<I", first)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="overlap"):
        read_torch(path)


@pytest.mark.parametrize("roots", [[], ["a", "b"]])
def test_an_archive_needs_one_pickle(tmp_path, roots):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
        for root in roots:
            archive.writestr(f"{root}/data.pkl", w.program(GOOD))
    with pytest.raises(CheckpointError, match=f"this zip has {len(roots)}"):
        read_torch(path)


def test_a_huge_pickle_is_refused(tmp_path):
    body = w.optext("x" * (17 << 20)) + b"0" + GOOD
    with pytest.raises(CheckpointError, match="at most 16777216 are read"):
        read_torch(w.write_archive(tmp_path / "a.pt", w.program(body), {"0": FOUR}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (w.opint(3), "holds a int where a dict of tensors"),
        (w.opdict([(w.optext("optimizer"), w.opdict([]))]), "no tensors .* it has: 'optimizer'"),
        (w.opdict([(w.opint(1), w.optensor(w.opstorage("0", "F32", 4), 0, (4,), (1,)))]), "not named by text"),
        (w.opdict([(w.optext("model"), w.opdict([(w.optext("model"), w.opdict([]))]))]), "no tensors"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_has(tmp_path, body, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch(w.write_archive(tmp_path / "a.pt", w.program(body), {"0": FOUR}))


@pytest.mark.parametrize("wrap", [(), ("state_dict",), ("model",), ("module",), ("model", "state_dict"), ("adaptor",)])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_come_off(tmp_path, wrap, prefix):
    views = {f"{prefix}{name}": w.View("0", "F32", 4, 0, (4,), (1,)) for name in ("a", "module_b")}
    assert list(read_torch(w.write_views(tmp_path / "a.pt", views, {"0": FOUR}, wrap))) == ["a", "module_b"]


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    views = {name: w.View("0", "F32", 4, 0, (4,), (1,)) for name in ("module.a", "b")}
    assert list(read_torch(w.write_views(tmp_path / "a.pt", views, {"0": FOUR}))) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "neither"),
        (b"\x80\x02}q\x00.", "no torch checkpoint"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: cannot be read \(No such file"):
        open_checkpoint(tmp_path / "none.pt")


def test_opening_reads_no_tensor(tmp_path):
    # A sparse file of 4 GB: reading its storage would show in the process's peak.
    items = 1 << 30
    body = w.opdict([(w.optext("x"), w.optensor(w.opstorage("0", "F32", items, view=True), items - 4, (4,), (1,)))])
    path = w.write_legacy(tmp_path / "sparse.pt", w.program(body), {"0": items})
    with path.open("r+b") as file:
        file.seek(-16, 2)
        file.write(FOUR)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = read_torch(path)["x"]
    assert tensor.read().tolist() == [1, 2, 3, 4]
    assert [block.tolist() for block in tensor.blocks()] == [[1, 2, 3, 4]]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200 << 20


LEGACY = w.program(w.opdict([(w.optext("x"), w.optensor(w.opstorage("0", "F32", 4, view=True), 0, (4,), (1,)))]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 5}, "no torch checkpoint"),
        ({"protocol": 1002}, "unknown version"),
        ({"little_endian": b"\x89"}, "little-endian"),
        ({"keys": w.optext("0")}, "list of storages is malformed"),
        ({"keys": w.oplist(w.optext("0"), w.optext("0"))}, "'0', which is repeated"),
        ({"keys": w.oplist(w.optext("1"))}, "'1', which is repeated or never used"),
        ({"keys": w.oplist()}, "storage '0' is not in the file"),
        ({"counts": {"0": 5}}, "does not hold its 4 elements"),
        ({"counts": {"0": -4}}, "does not hold its 4 elements"),
    ],
)
def test_a_malformed_old_file_is_refused(tmp_path, changes, message):
    path = w.write_legacy(tmp_path / "a.pt", LEGACY, {"0": FOUR})
    assert read_torch(path)["x"].read().tolist() == [1, 2, 3, 4]
    with pytest.raises(CheckpointError, match=message):
        read_torch(w.write_legacy(path, LEGACY, {"0": FOUR}, **changes))


@pytest.mark.parametrize(
    ("view", "values"),
    [((1, 2), [2.0, 3.0]), ((3, 1), None), ((3, 2), None), ((-1, 2), None), ((0, -2), None), ((2**70, 2), None)],
)
def test_views_of_storages_in_old_files(tmp_path, view, values):
    storage = w.opstorage("0", "F32", 4, view=view)
    body = w.opdict([(w.optext("x"), w.optensor(storage, 0, (2,), (1,)))])
    path = w.write_legacy(tmp_path / "a.pt", w.program(body), {"0": FOUR})
    if values is not None:
        assert read_torch(path)["x"].read().tolist() == values
    else:
        with pytest.raises(CheckpointError, match=r"should hold|malformed view|claims 2"):
            read_torch(path)


@pytest.mark.parametrize(("start", "items"), [(0, 5), (1, 4), (16, 1), (-4, 1), (0, -1)])
def test_a_storage_that_is_not_in_the_file_is_refused(tmp_path, start, items):
    with pytest.raises(CheckpointError, match=r"a\.pt: tensor 'x': its storage ends at byte"):
        TensorRef("x", (), "F32", tmp_path / "a.pt", FOUR, start, items)


def test_a_tensor_of_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'x': its type 'F8' cannot be read"):
        TensorRef("x", (), "F8", tmp_path / "a.pt", FOUR, 0, 1)
