"""Pickles that want to run something, or to eat the machine, are refused by name and leave no trace."""

import copyreg
import functools
import os
import pickle
import struct
import time

import pytest

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.weights.torch_zip import read_torch
from tests.helpers import weights_torch_writer as w


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker):
    """Things to call that would leave `marker` behind, and the name each must be refused by."""
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, f"touch {marker}"), r"'(posix|nt|os)\.system'"),
        "eval": (Calls(eval, write), r"'(builtins|__builtin__)\.eval'"),
        "exec": (Calls(exec, write), r"'(builtins|__builtin__)\.exec'"),
        "open": (Calls(open, str(marker), "w"), r"'(_?io)\.open'"),
        "partial": (functools.partial(os.mkdir, str(marker)), r"'functools\.partial'"),
        "nested": ([{"a": Calls(os.mkdir, str(marker))}], r"'(posix|nt|os)\.mkdir'"),
        "key": ({Calls(os.mkdir, str(marker)): 1}, r"'(posix|nt|os)\.mkdir'"),
    }


def archived(folder, data):
    """The two ways in which a pickle can come: in an archive, and as an old file's main part."""
    zipped = w.write_archive(folder / "evil.pt", data, {"0": b"\0" * 16})
    return [zipped, w.write_legacy(folder / "evil.legacy.pt", data, {}, keys=w.oplist())]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("attack", attacks(""))
def test_calls_are_refused_by_name(tmp_path, attack, protocol):
    marker = tmp_path / "ran"
    content, name = attacks(marker)[attack]
    data = pickle.dumps({"state_dict": content}, protocol)
    for path in archived(tmp_path, data):
        with pytest.raises(CheckpointError, match=rf"{name}|its pickle (uses|builds)") as caught:
            read_torch(path)
        assert path.name in str(caught.value)
    assert not marker.exists()


def test_the_attacks_would_work_on_a_plain_unpickler(tmp_path):
    # Otherwise the tests above would prove nothing.
    for name in ("os.system", "eval", "exec", "open", "nested"):
        marker = tmp_path / name
        content, _ = attacks(marker)[name]
        result = pickle.loads(pickle.dumps(content))
        if hasattr(result, "close"):
            result.close()
        assert marker.exists()


ORDERED = w.opglobal("collections", "OrderedDict")
TENSOR = w.optensor(w.opstorage("0", "F32", 4), 0, (4,), (1,))
SYSTEM = b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"


def _call(function, *arguments):
    return function + w.optuple(*arguments) + b"R"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (w.opglobal("os", "system"), r"asks for 'os\.system'"),
        (SYSTEM, r"asks for 'os\.system'"),
        (w.opglobal("posix", "system"), r"asks for 'posix\.system'"),
        (w.opglobal("builtins", "eval"), r"asks for 'builtins\.eval'"),
        (w.opglobal("torch", "load"), r"asks for 'torch\.load'"),
        (w.opglobal("torch.storage", "_load_from_bytes"), r"asks for 'torch\.storage\._load_from_bytes'"),
        (w.opglobal("collections", "OrderedDict.fromkeys"), r"asks for 'collections\.OrderedDict\.fromkeys'"),
        (w.opglobal("collections", "OrderedDict "), r"asks for 'collections\.OrderedDict '"),
        (w.opglobal("Collections", "OrderedDict"), r"asks for 'Collections\.OrderedDict'"),
        (w.optext("x") + ORDERED + b"\x93", "names a global by something that is not text"),
        (b"(i" + b"os\nsystem\n", r"INST os system"),
        (b"(" + w.opglobal("torch", "Size") + b"o", "OBJ"),
        (w.opglobal("torch", "Size") + b")\x81", "NEWOBJ"),
        (w.opglobal("torch", "Size") + b")}\x92", "NEWOBJ_EX"),
        (b"\x82\x07", "EXT1 7"),
        (b"\x83\x07\x00", "EXT2 7"),
        (b"\x84\x07\x00\x00\x00", "EXT4 7"),
        (b"P1\n", "uses PERSID"),
        (_call(w.optext("os.system"), w.optext("true")), "calls a str"),
        (_call(_call(ORDERED), w.opint(1)), "calls a dict"),
        (_call(w.opglobal("torch", "FloatStorage"), w.opint(1 << 40)), r"calls torch\.FloatStorage with"),
        (_call(w.opglobal("torch.storage", "UntypedStorage"), w.opint(1 << 40)), r"UntypedStorage with arguments"),
        (_call(w.opglobal("torch", "float32")), r"calls torch\.float32 with"),
        (_call(ORDERED, w.opint(3)), r"calls collections\.OrderedDict with"),
        (_call(ORDERED, w.oplist(w.optuple(w.opint(1)))), "not pairs"),
        (_call(ORDERED, w.oplist(w.optuple(w.optuple(), w.opint(1)))), "dict key of type tuple"),
        (_call(w.opglobal("torch._utils", "_rebuild_parameter"), w.opint(3)), "_rebuild_parameter with arguments"),
        (_call(w.opglobal("torch._utils", "_rebuild_tensor_v2"), w.opint(3)), "_rebuild_tensor_v2 with arguments"),
        (w.opglobal("torch", "Size") + w.opint(3) + b"R", r"calls torch\.Size with"),
        (ORDERED + b"}b", "applies BUILD to Global"),
        (_call(ORDERED) + w.opint(3) + b"b", "sets the state of an object"),
        (TENSOR + b"}b", "applies BUILD to TensorSpec"),
        (b"](b", "empty stack"),
        (b"}" + w.optuple() + w.opint(1) + b"s", "dict key of type tuple"),
        (b"}(" + w.opint(1) + b"u", "a key without a value"),
        (b"]" + w.opint(1) + w.opint(2) + b"s", "applies SETITEM to list"),
        (b"}" + w.opint(1) + b"a", "applies APPEND to dict"),
        (b"\x8f", "uses EMPTY_SET"),
        (b"}2", "uses DUP"),
        (b"h\x05", "memo entry 5, which was never stored"),
        (b"e", "never opened"),
        (b"R", "empty stack"),
        (b"", "0 values on the stack"),
        (b"}}", "2 values on the stack"),
        (b"(", "1 values on the stack"),
        (b"\x80\x06", "protocol 6"),
        (b"\xff", "damaged"),
        (b"X\xff\xff\xff\xff", "damaged"),
        (b"\x8d" + b"\xff" * 8, "damaged"),
        (b"cos\n\xff\n", "damaged"),
        (b"\x8b\x04\x00\x00\x00abcd", "uses LONG4"),
    ],
)
def test_opcodes_are_refused_by_name(tmp_path, body, message):
    for path in archived(tmp_path, w.program(body)):
        with pytest.raises(CheckpointError, match=message):
            read_torch(path)


def test_registered_extensions_are_not_looked_up(tmp_path):
    code = 0x7FFFFFFF
    copyreg.add_extension("os", "system", code)
    try:
        with pytest.raises(CheckpointError, match=f"EXT4 {code}"):
            read_torch(archived(tmp_path, w.program(b"\x84" + struct.pack("<I", code)))[0])
    finally:
        copyreg.remove_extension("os", "system", code)


DEPTH = 200_000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # A memo index that an array-backed memo would make room for.
        (b"}r\xff\xff\xff\xff", "no tensors"),
        # Containers nested deeper than any recursion.
        (b"]" * DEPTH + b"a" * (DEPTH - 1), "holds a list"),
        (b")" + b"\x85" * DEPTH, "holds a tuple"),
        # A value of 2**64 leaves in a hundred bytes, as value and as key.
        (b")" + b"q\x00h\x00\x86" * 64, "holds a tuple"),
        (b"})" + b"q\x00h\x00\x86" * 64 + b"Ns", "dict key of type tuple"),
        (b"(" * DEPTH, "values on the stack"),
    ],
)
def test_bombs_cost_nothing(tmp_path, body, message):
    for path in archived(tmp_path, w.program(body)):
        started = time.process_time()
        with pytest.raises(CheckpointError, match=message):
            read_torch(path)
        assert time.process_time() - started < 30  # not a timing: the alternative is for ever
