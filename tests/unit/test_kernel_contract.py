"""Contracts: what is read from a source's head, which heads are refused, which calls."""

from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.kernels import NAMES, operations
from qwen4b_asr.kernels._cases import Case
from qwen4b_asr.kernels._contract import ContractError, parse_contract
from qwen4b_asr.kernels._expressions import Expression, ExpressionError
from qwen4b_asr.kernels._sources import kernel_sources

TEXT = """\
// kernel: stack
// computes: rows, M at a time
//   out[l, j] = x[l * N + j]
//
// inputs:
//   x (R, F) T               -- rows
//   keep (R) bool            -- True on real rows
//   scale () float32
// outputs:
//   out (ceil(R/N), M*F) T   -- stacked
// template:
//   T dtype float32|bfloat16 -- element type
//   M int                    -- rows of a stack
//   N int 1|2|6
//   LAST bool
// grid: (F, L, 1)
// threadgroup: 32x8, <= 256
// threadgroup_memory: 4*M*F + sizeof(T) bytes
// math: safe
// vjp: reference
// --- body
// kernel: not me
"""


def call(**changes):
    """Arguments of `check_call` that suit `TEXT`, some of them changed."""
    arguments = {
        "x": mx.zeros((7, 5)),
        "keep": mx.ones((7,), mx.bool_),
        "scale": mx.array(1.0),
        "out": (4, 15),
        "dtype": mx.float32,
        "template": [("T", mx.float32), ("M", 3), ("N", 2), ("LAST", True)],
    } | changes
    inputs = [arguments[name] for name in ("x", "keep", "scale")]
    return inputs, arguments["template"], [arguments["out"]], [arguments["dtype"]]


def test_every_part_is_read():
    contract = parse_contract(TEXT)
    assert contract.name == "stack"
    assert contract.computes == "rows, M at a time\nout[l, j] = x[l * N + j]"
    x, keep, scale = contract.inputs
    assert (x.name, [a.text for a in x.shape], x.dtype, x.about) == ("x", ["R", "F"], "T", "rows")
    assert (keep.dtype, scale.shape, scale.about) == ("bool", (), "")
    assert [a.text for a in contract.outputs[0].shape] == ["ceil(R/N)", "M*F"]
    assert [(t.name, t.kind, t.choices) for t in contract.template] == [
        ("T", "dtype", ("float32", "bfloat16")),
        ("M", "int", ()),
        ("N", "int", ("1", "2", "6")),
        ("LAST", "bool", ()),
    ]
    assert (contract.max_threads, contract.math, contract.vjp, contract.grid) == (256, "safe", "reference", "(F, L, 1)")
    assert contract.differentiable
    assert contract.threadgroup_memory.evaluate({"M": 3, "F": 5}, {"T": 2}) == 62


def test_what_may_be_left_out():
    text = "// kernel: k\n// computes: c\n// inputs:\n// outputs:\n//   y (2,) float32\n// grid: 1\n// threadgroup: 1\n"
    contract = parse_contract(text + "// vjp: none: nobody trains it\n")
    assert (contract.inputs, contract.template, contract.math, contract.max_threads) == ((), (), "safe", 1024)
    assert (contract.differentiable, contract.threadgroup_memory.evaluate({})) == (False, 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("// kernel: stack\n", "", "must have a line `// kernel:`"),
        ("// vjp: reference\n", "", "must have a line `// vjp:`"),
        ("// vjp: reference", "// vjp: none", "none: <reason>"),
        ("// vjp: reference", "// vjp: maybe", "none: <reason>"),
        ("// math: safe", "// math: fast", "`fast` and a reason"),
        ("// math: safe", "// math: quick", "`fast` and a reason"),
        ("// grid:", "// gird:", "gird"),
        ("// grid: (F, L, 1)", "// grid: (F, L, 1)\n// grid: 1", "one `grid:`"),
        ("kernel: stack", "kernel: My-Stack", "small letters"),
        ("(R, F) T   ", "(R, F)", "must be written `name (shape) dtype"),
        ("x (R, F) T", "x (R, F) S", "known element type"),
        ("keep (R) bool", "keep (R) boolean", "known element type"),
        ("keep (R)", "x (R)", "stand for one thing"),
        ("x (R, F) T", "x (R, 2**F) T", "not understood"),
        ("ceil(R/N)", "ceil(R/Q)", "made of axes"),
        ("M int  ", "M float", "must be written `name dtype|int|bool"),
        ("T dtype float32|bfloat16", "T dtype", "must name its element types"),
        ("T dtype float32|bfloat16", "T dtype float32|f16", "must name its element types"),
        ("4*M*F", "4*M*Q", "known names"),
        ("sizeof(T)", "sizeof(Q)", "known names"),
        ("<= 256", "<= 2048", "at most 1024"),
    ],
)
def test_a_wrong_head_is_refused(old, new, said):
    assert old in TEXT
    with pytest.raises(ContractError) as caught:
        parse_contract(TEXT.replace(old, new, 1))
    assert said in str(caught.value)


def test_a_call_that_fits_is_accepted():
    parse_contract(TEXT).check_call(*call())


TEMPLATE = call()[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": mx.zeros((7, 5), mx.bfloat16)}, "[stack] x must be float32 but got bfloat16"),
        ({"x": mx.zeros((7, 5, 1))}, "[stack] x must have 2 axes but got shape (7, 5, 1)"),
        ({"keep": mx.ones((6,), mx.bool_)}, "[stack] keep must have R = 7 as elsewhere but got 6 in shape (6,)"),
        ({"scale": mx.array([1.0])}, "[stack] scale must have 0 axes but got shape (1,)"),
        ({"out": (3, 15)}, "[stack] out must have ceil(R/N) = 4 but got 3 in shape (3, 15)"),
        ({"out": (4, 16)}, "[stack] out must have M*F = 15 but got 16 in shape (4, 16)"),
        ({"dtype": mx.bfloat16}, "[stack] out must be float32 but got bfloat16"),
        ({"template": TEMPLATE[:3]}, "[stack] template must be ['T', 'M', 'N', 'LAST'] but got ['T', 'M', 'N']"),
        ({"template": [TEMPLATE[1], TEMPLATE[0], *TEMPLATE[2:]]}, "but got ['M', 'T', 'N', 'LAST']"),
        ({"template": [("T", mx.float16), *TEMPLATE[1:]]}, "T must be one of float32|bfloat16 but got float16"),
        ({"template": [*TEMPLATE[:2], ("N", 3), TEMPLATE[3]]}, "N must be one of 1|2|6 but got 3"),
        ({"template": [*TEMPLATE[:3], ("LAST", 1)]}, "LAST must be bool but got 1"),
        ({"template": [TEMPLATE[0], ("M", mx.int32), *TEMPLATE[2:]]}, "M must be int but got"),
        ({"x": mx.zeros((7, 3000)), "out": (4, 9000)}, "threadgroup_memory must be at most 32768 bytes but got 36004"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, as the message is compared below
        parse_contract(TEXT).check_call(*call(**changes))
    assert said in str(caught.value)


def test_the_number_of_arrays_is_checked():
    inputs, template, shapes, dtypes = call()
    contract = parse_contract(TEXT)
    with pytest.raises(ValueError, match="inputs must be 3: x, keep, scale but got 2"):
        contract.check_call(inputs[:2], template, shapes, dtypes)
    with pytest.raises(ValueError, match="output_shapes must be 1: out but got 2"):
        contract.check_call(inputs, template, shapes * 2, dtypes)
    with pytest.raises(ValueError, match="output_dtypes must be 1: out but got 0"):
        contract.check_call(inputs, template, shapes, [])


@pytest.mark.parametrize(
    ("grid", "threadgroup", "said"),
    [
        ((0, 1, 1), (1, 1, 1), "grid must be three positive"),
        ((4, 4), (1, 1, 1), "grid must be three positive"),
        ((4, 4, 4), (1, 0, 1), "threadgroup must be three positive"),
        ((4, 4, 4), (32, 3, 3), "at most 256 threads"),
    ],
)
def test_the_launch_is_checked(grid, threadgroup, said):
    contract = parse_contract(TEXT)
    contract.check_launch((4, 4, 4), (32, 8, 1))
    with pytest.raises(ValueError, match=said):
        contract.check_launch(grid, threadgroup)


# --- Expressions --------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9))
def test_expressions_are_computed_as_kernels_do(a, b, c):
    values = {"a": a, "b": b, "c": c}
    assert Expression("ceil(a/b)").evaluate(values) == -(-a // b)
    assert Expression("(a + 2*b - 1) / c % 7").evaluate(values) == (a + 2 * b - 1) // c % 7
    assert Expression("max(a, b)*sizeof(T) - min(b, 3)").evaluate(values, {"T": 4}) == max(a, b) * 4 - min(b, 3)


@pytest.mark.parametrize(
    "text", ["", "a b", "a.b", "f(a)", "a if b else c", "'a'", "2.5", "a ** b", "True", "-a", "min(a)"]
)
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ExpressionError):
        Expression(text)


def test_a_length_without_a_value_is_an_error():
    with pytest.raises(ExpressionError, match="b has no value"):
        Expression("a + b").evaluate({"a": 1})
    with pytest.raises(ExpressionError, match="division by zero"):
        Expression("a / b").evaluate({"a": 1, "b": 0})


# --- The kernels there are ----------------------------------------------------------------------------------------


def test_each_kernel_has_source_wrapper_contract_and_cases():
    sources = {path.stem for path in kernel_sources().glob("*.metal")}
    wrappers = {path.stem for path in Path(kernel_sources_package()).glob("[a-z]*.py")}
    assert sources == wrappers == set(NAMES) == set(operations())
    for name, operation in operations().items():
        assert [source.contract.name for source in operation.sources] == [name]
        assert {"check", "test", "bench"} <= {role for case in operation.cases for role in case.roles}
        assert len({case.name for case in operation.cases}) == len(operation.cases)


def kernel_sources_package() -> Path:
    """Folder of the wrappers."""
    import qwen4b_asr.kernels

    return Path(qwen4b_asr.kernels.__file__).parent


def test_a_case_is_the_same_each_time_and_refuses_what_it_does_not_know():
    case = Case("c", lambda rng, dtype: {"x": mx.array(rng.standard_normal(3)).astype(dtype)}, dtypes=("float16",))
    first, again, other = (case.arguments("float16", seed)["x"] for seed in (0, 0, 1))
    assert first.dtype == mx.float16
    assert first.tolist() == again.tolist() != other.tolist()
    with pytest.raises(ValueError, match="must be one of"):
        case.arguments("float32")
    with pytest.raises(ValueError, match="roles of c"):
        Case("c", case.make, roles=frozenset({"cheque"}))
    with pytest.raises(ValueError, match="dtypes of c"):
        Case("c", case.make, dtypes=("f32",))
