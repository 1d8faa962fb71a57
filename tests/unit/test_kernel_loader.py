"""The loader: sources found and taken apart, names, what is built when, and what is refused."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import qwen4b_asr.kernels._sources as sources
from qwen4b_asr.kernels._loader import Kernel, backend, override

HEAD = """\
// kernel: twice
// computes: y = 2 * x
// inputs:
//   x (N) T
//   offset () int32
// outputs:
//   y (N) T
// template:
//   T dtype float32|float16
//   K int
// grid: (N, 1, 1)
// threadgroup: <= 64
// math: safe
// vjp: reference
"""
TEXT = f"{HEAD}// --- header\ninline float f(float v) {{ return v; }}\n// --- body\ny[0] = f(x[0]);\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of sources in place of the real one."""
    monkeypatch.setattr(sources, "kernel_sources", lambda: tmp_path)
    (tmp_path / "twice.metal").write_text(TEXT)
    (tmp_path / "cuda_prelude.h").write_text("// CUDA\n")
    return tmp_path


class Factory:
    """Remembers what is built, and launches to zeros."""

    def __init__(self) -> None:
        self.built = []
        self.launched = []

    def __call__(self, **options):
        self.built.append(options)

        def launch(**call):
            self.launched.append(call)
            return [mx.zeros(s, d) for s, d in zip(call["output_shapes"], call["output_dtypes"], strict=True)]

        return launch


def launch(kernel: Kernel, size: int = 9, dtype: mx.Dtype = mx.float32, **changes) -> list[mx.array]:
    call = {
        "inputs": [mx.zeros((size,), dtype), mx.array(0, mx.int32)],
        "template": [("T", dtype), ("K", 3)],
        "grid": (size, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(size,)],
        "output_dtypes": [dtype],
    }
    return kernel(**(call | changes))


def test_nothing_is_read_before_it_is_needed():
    kernel = Kernel("no-such.metal")
    assert repr(kernel) == "Kernel('no-such.metal')"
    with pytest.raises(FileNotFoundError):
        assert kernel.contract


def test_the_factory_gets_mlxs_arguments_and_so_does_the_launch(folder):
    factory = Factory()
    with override("metal", factory):
        (y,) = launch(Kernel("twice.metal", ensure_row_contiguous=False, atomic_outputs=True), init_value=1.0)
    assert (y.shape, y.dtype) == ((9,), mx.float32)
    (options,) = factory.built
    name = options.pop("name")
    assert name.startswith("qwen4b_asr_twice_")
    assert options == {
        "input_names": ["x", "offset"],
        "output_names": ["y"],
        "source": "y[0] = f(x[0]);\n",
        "header": "inline float f(float v) { return v; }\n",
        "ensure_row_contiguous": False,
        "atomic_outputs": True,
    }
    (call,) = factory.launched
    assert [array.shape for array in call.pop("inputs")] == [(9,), ()]
    assert call == {
        "template": [("T", mx.float32), ("K", 3)],
        "grid": (9, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(9,)],
        "output_dtypes": [mx.float32],
        "init_value": 1.0,
    }


def test_each_form_of_launch_is_built_once_under_a_name_of_its_own(folder):
    factory, kernel = Factory(), Kernel("twice.metal")
    with override("metal", factory):
        for _ in range(2):
            launch(kernel)
            launch(kernel, size=10)  # another length is the same text
            launch(kernel, size=7)  # MLX passes fewer than 8 elements as constants
            launch(kernel, dtype=mx.float16)
            launch(kernel, template=[("T", mx.float32), ("K", 4)])
    assert len(factory.built) == 4
    assert len({options["name"] for options in factory.built}) == 4
    assert len(factory.launched) == 10


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "twice.metal").write_text(TEXT.replace("f(x[0])", "f(x[1])")),
        lambda folder: (folder / "twice.metal").write_text(TEXT.replace("return v", "return -v")),
        lambda folder: (folder / "part.h").write_text("// B\n"),
    ],
)
def test_the_name_changes_with_the_text(folder, change):
    text = TEXT.replace("// --- header\n", '// --- header\n#include "part.h"\n')
    (folder / "twice.metal").write_text(text)
    (folder / "part.h").write_text("// A\n")
    before = Kernel("twice.metal")
    factory = Factory()
    with override("metal", factory):
        launch(before)
        launch(Kernel("twice.metal"))
        change(folder)
        after = Kernel("twice.metal")
        launch(after)
    first, same, changed = (options["name"] for options in factory.built)
    assert first == same != changed
    assert before.hash != after.hash


def test_a_comment_in_the_contract_changes_neither_name_nor_hash(folder):
    before = Kernel("twice.metal").hash
    (folder / "twice.metal").write_text(TEXT.replace("y = 2 * x", "twice x"))
    assert Kernel("twice.metal").hash == before


def test_includes_are_put_in_once_and_from_the_folder_alone(folder):
    (folder / "twice.metal").write_text(TEXT.replace("inline", '#include "a.h"\n  # include "b.h"\ninline'))
    (folder / "a.h").write_text('#include "b.h"\n#include <metal_stdlib>\nA\n')
    (folder / "b.h").write_text('#include "a.h"\nB\n')
    header, _ = Kernel("twice.metal").parts
    assert [line for line in header.split("\n") if line] == ["B", "#include <metal_stdlib>", "A",
                                                             "inline float f(float v) { return v; }"]  # fmt: skip
    (folder / "a.h").unlink()
    with pytest.raises(FileNotFoundError):
        assert Kernel("twice.metal").parts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT.replace("// --- body\n", ""), "one line `// --- body`"),
        (TEXT + "// --- body\n", "one line `// --- body`"),
        (HEAD + "// --- body\n", "code after it"),
        (TEXT.replace("// --- header\n", ""), "must be behind `// --- header`"),
        (TEXT.replace("2 * x", "2 × x"), "plain ASCII"),
    ],
)
def test_a_source_that_cannot_be_taken_apart_is_refused(folder, text, said):
    (folder / "twice.metal").write_text(text, encoding="utf-8")
    with override("metal", Factory()), pytest.raises(ValueError, match=said):
        launch(Kernel("twice.metal"))


def test_a_launch_against_the_contract_never_reaches_mlx(folder):
    factory, kernel = Factory(), Kernel("twice.metal")
    with override("metal", factory):
        for changes, said in [
            ({"output_shapes": [(8,)]}, r"\[twice\] y must have N = 9"),
            ({"threadgroup": (65, 1, 1)}, r"\[twice\] threadgroup must have at most 64"),
            ({"grid": (0, 1, 1)}, r"\[twice\] grid must be three positive"),
            ({"template": [("T", mx.float32)]}, r"\[twice\] template must be"),
        ]:
            for _ in range(2):  # a refusal is not remembered as a check that passed
                with pytest.raises(ValueError, match=said):
                    launch(kernel, **changes)
        launch(kernel)
        with pytest.raises(ValueError, match="y must have N = 9"):
            launch(kernel, output_shapes=[(8,)])
    assert len(factory.launched) == 1


def test_overrides_nest_and_forget(folder):
    outer, inner, kernel = Factory(), Factory(), Kernel("twice.metal")
    assert backend() != "cuda"
    with override("metal", outer):
        launch(kernel)
        with override("cuda", inner):
            assert backend() == "cuda"
            launch(kernel)
        assert backend() == "metal"
        launch(kernel)
    assert (len(outer.built), len(inner.built)) == (1, 1)
    with override("metal", outer):
        launch(kernel)
    assert len(outer.built) == 2


@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_no_backend(folder):
    assert backend() is None
    with pytest.raises(RuntimeError, match=r"\[twice\] the kernel needs a GPU"):
        launch(Kernel("twice.metal"))


@pytest.mark.parametrize(
    ("gpu", "metal", "cuda", "expected"),
    [
        (True, True, False, "metal"),
        (True, False, True, "cuda"),
        (False, True, False, None),  # metal_kernel would use the GPU of a Mac all the same
        (False, False, True, None),
    ],
)
def test_the_default_device_decides(monkeypatch, gpu, metal, cuda, expected):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu if gpu else mx.cpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    assert backend() == expected


def test_a_new_form_of_launch_is_tried_at_once(folder, monkeypatch):
    """What MLX would raise at some later mx.eval is raised where the operation can still turn to the plain ones."""
    factory = Factory()
    monkeypatch.setattr("qwen4b_asr.kernels._loader.backend", lambda: "metal")
    monkeypatch.setattr(mx.fast, "metal_kernel", factory)
    kernel = Kernel("twice.metal")
    ones = [mx.ones((9,)), mx.array(1, mx.int32)]
    launch(kernel, inputs=ones)
    launch(kernel, inputs=ones)
    launch(kernel, size=10)
    sums = [sum(array.sum().item() for array in call["inputs"]) for call in factory.launched]
    assert sums == [0, 10, 10, 0]  # zeros first, and once


# --- Where the sources lie ----------------------------------------------------------------------------------------


def test_an_installed_folder_comes_before_the_checkouts(tmp_path, monkeypatch):
    module = tmp_path / "src" / "qwen4b_asr" / "kernels" / "_sources.py"
    (tmp_path / "kernels").mkdir()
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(sources, "__file__", str(module))
    assert sources.kernel_sources() == tmp_path / "kernels"
    (module.parent / "metal").mkdir()
    assert sources.kernel_sources() == module.parent / "metal"
    shutil.rmtree(module.parent / "metal")
    (tmp_path / "kernels").rmdir()
    with pytest.raises(FileNotFoundError, match="metal"):
        sources.kernel_sources()
