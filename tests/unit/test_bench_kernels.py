"""tools/bench_kernels.py: its rows, its tables, what it records and what it refuses. No time is asserted."""

import json
import math
import os
import shutil
import subprocess
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench_kernels
from bench import check, facts, host_counts, paths, record, roofline, rows, table
from tests.helpers.bench_toys import CPU, GPU, outcome, row, run_facts, toy, toy_case

# --- Rows ---------------------------------------------------------------------------------------------------------


def test_a_row_as_json_says_where_it_comes_from():
    found = json.loads(json.dumps(rows.as_json(row(), run_facts())))
    assert found["schema"] == rows.SCHEMA
    documented = {word.strip(",") for word in (rows.__doc__ or "").split()}
    assert set(found) <= documented
    assert {"date", "command", "project", "revision", "mlx", "os", "device", "roofline"} <= set(found)
    assert found["ways"]["kernel"] == {"state": "absent", "reason": paths.NO_GPU}
    assert found["ways"]["compiled"]["median"] == 2e-3
    assert found["floor"] == {"seconds": 1e-3, "bound": "bytes"}
    assert (found["blas"], found["device"]["name"]) == ("libblas.so", "Toy CPU")


@pytest.mark.parametrize(
    "claim",
    [
        row(kernel=outcome(1e-3)),
        row(kernel=rows.Outcome("timed")),
        row(kernel=rows.Outcome("absent", "", median=1e-3)),
        row(times_best=2.0),
        row(host_counts={"threads": 8, "emulated_seconds": 1}),
        row(host_counts={"kernel_ms": 1}),
    ],
)
def test_no_emulated_time_becomes_a_row(claim):
    with pytest.raises(ValueError, match=r"GPU|times"):
        rows.as_json(claim, run_facts(CPU))


def test_counts_are_no_times():
    counted = row(host_counts={"threads": 8, "barriers": 2})
    assert rows.as_json(counted, run_facts())["host_counts"] == {"threads": 8, "barriers": 2}


def test_a_gpus_time_becomes_a_row():
    assert rows.as_json(row(kernel=outcome(1e-3), times_best=2.0), run_facts(GPU))["times_best"] == 2.0


def test_a_reason_is_given_once():
    said = rows.notes([row(), row(case="large"), row(kernel=rows.Outcome("failed", "no luck"), dtype="float16")])
    assert [note for note in said if "no GPU" in note] == [f"kernel: {paths.NO_GPU}"]
    assert "kernel: failed: no luck (toy small float16)" in said


# --- Tables -------------------------------------------------------------------------------------------------------


def test_without_a_kernel_the_table_has_no_columns_for_it():
    text = table.terminal([row()], run_facts())
    head, _, line = text.splitlines()[:3]
    assert "kernel" not in head
    assert "times" not in head
    assert " ".join(line.split()) == "toy small float32 4.00 2.00 = ref. compiled 50 % 20 %"
    assert f"kernel: {paths.NO_GPU}." in text.splitlines()


def test_with_a_kernel_the_table_says_what_it_gains():
    kernel = rows.Outcome("timed", median=1e-3, q1=1e-3, q3=1e-3, times_reference=4.0)
    head, _, line = table.terminal([row(kernel=kernel, times_best=2.0)], run_facts(GPU)).splitlines()[:3]
    assert "times reference" in head
    wanted = "toy small float32 1.00 4.00 2.00 = ref. 4.00 2.00 100 % compiled 50 % 20 %"
    assert " ".join(line.split()) == wanted


@pytest.mark.parametrize(("state", "word"), [("failed", "FAILED"), ("wrong", "WRONG")])
def test_a_broken_kernel_is_loud(state, word):
    text = table.terminal([row(kernel=rows.Outcome(state, "why it broke"))], run_facts(GPU))
    assert word in text
    assert f"kernel: {state}: why it broke (toy small float32)." in text


def test_markdown_has_the_same_cells():
    lines = table.markdown([row(), row(case="large")]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "| toy | large | float32 | 4.00 | 2.00 | = ref. | compiled | 50 % | 20 % |" in lines


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.001234, "0.00123"), (1.5, "1.50"), (99.96, "100.0"), (1234.5, "1234")]
)
def test_three_digits(value, text):
    assert table.three_digits(value) == text


def test_the_block_of_a_device_names_versions_command_and_a_busy_machine():
    said = run_facts()
    text = table.block([row()], said, CPU.title)
    assert text.startswith("### CPU Toy CPU, 2 cores\n\n2026-01-02 · ")
    for part in (
        f"MLX {said['mlx']}",
        "libblas.so",
        said["command"],
        "1.00 GB/s",
        "float32 10.0",
        f"* kernel: {paths.NO_GPU}.",
    ):
        assert part in text
    assert "shared" not in text
    assert "shared the machine" in table.block([row()], {**said, "load_average": 1.9}, CPU.title)


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.0, "0 %"), (0.003, "<1 %"), (0.256, "26 %"), (1.5, "150 %")]
)
def test_percent(share, text):
    assert table.percent(share) == text


# --- Recording ----------------------------------------------------------------------------------------------------

EMPTY = f"# Title\n\nbefore\n\n{record.AREA_BEGIN}\n{record.AREA_END}\n\nafter\n"
texts = st.text(st.characters(exclude_characters="<>\r", exclude_categories=["Cs"]))


@given(texts, texts, st.lists(st.tuples(st.sampled_from(["a", "b", "c-d"]), texts), min_size=1))
def test_recording_keeps_what_is_around_and_is_idempotent(before, after, blocks):
    text = f"{before}{record.AREA_BEGIN}\n{record.AREA_END}{after}"
    for slug, block in blocks:
        text = record.with_block(text, slug, block)
        assert record.with_block(text, slug, block) == text
    assert text.startswith(before + record.AREA_BEGIN)
    assert text.endswith(record.AREA_END + after)
    for slug, block in dict(blocks).items():  # the last of each
        assert f"<!-- bench {slug} -->\n{block.strip(chr(10))}\n<!-- end {slug} -->" in text


def test_a_device_takes_its_own_place_alone():
    text = record.with_block(record.with_block(EMPTY, "gpu-b", "B"), "cpu-a", "A")
    assert text.index("A\n") < text.index("B\n")
    again = record.with_block(text, "gpu-b", "B2")
    assert again == text.replace("\nB\n", "\nB2\n")


@pytest.mark.parametrize(
    "text",
    [
        "# No marks\n",
        f"{record.AREA_BEGIN}\n",
        f"{record.AREA_END}\n{record.AREA_BEGIN}\n",
        f"{EMPTY}{EMPTY}",
        f"{record.AREA_BEGIN}\n{EMPTY}",
        f"{EMPTY}{record.AREA_END}\n",
        EMPTY.replace(record.AREA_END, f"something by hand\n{record.AREA_END}"),
        EMPTY.replace(record.AREA_END, f"<!-- bench a -->\nno end\n{record.AREA_END}"),
    ],
)
def test_a_document_without_proper_marks_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(record.RecordError):
        record.write_block(path, "cpu-a", "A")
    assert path.read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_the_kernels_readme_can_be_recorded_into():
    text = bench_kernels.DOCUMENT.read_text(encoding="utf-8")
    assert "\nA\n" in record.with_block(text, CPU.slug, "A")


# --- Command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command on two toy operations and a document of its own, on the CPU and with a roofline out of the hat."""
    from qwen4b_asr import kernels

    document = tmp_path / "kernels" / "README.md"
    document.parent.mkdir()
    document.write_text(EMPTY, encoding="utf-8")
    table_of = {"toy": toy(), "half": toy(name="half", cases=(toy_case("other", dtypes=("float16",)),))}
    monkeypatch.setattr(kernels, "operations", lambda: table_of)
    monkeypatch.setattr(bench_kernels, "DOCUMENT", document)
    monkeypatch.setattr(roofline, "measure_roofline", lambda device, dtypes: roofline.Roofline(1e9, {}))
    device = mx.default_device()

    def run(*words: str) -> int:
        return bench_kernels.main(["--device", "cpu", "--repeat", "3", "--seconds", "0.001", *words])

    yield SimpleNamespace(run=run, document=document, operations=table_of)
    mx.set_default_device(device)


def test_the_command_prints_a_table_and_appends_rows(command, capsys, tmp_path, monkeypatch):
    def self_check(operation):
        raise AssertionError("a kernel was run without a GPU")

    monkeypatch.setattr(check, "self_check", self_check)
    monkeypatch.setattr(host_counts, "unavailable", lambda: "nobody asked for counts")
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        assert command.run("--check", "--json", str(file)) == 0
    said = capsys.readouterr().out
    assert "no GPU in use, so no kernel is timed or checked here" in said
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["kernel"], one["case"], one["dtype"]) for one in found[:4]] == [
        *(("toy", "small", dtype) for dtype in ("float32", "float16", "bfloat16")),
        ("half", "other", "float16"),
    ]
    assert len(found) == 8
    assert all(one["ways"]["kernel"]["state"] == "absent" for one in found)
    assert str(tmp_path) not in found[0]["command"]


def test_the_command_narrows_down(command, capsys):
    assert command.run("--list", "--kernel", "toy", "--dtype", "float16", "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out.split() == ["toy", "small", "float16,", "bfloat16"]
    assert command.run("--markdown", "--case", "other") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| half | other | float16 |")


def test_the_command_fails_when_something_differs(command, capsys, monkeypatch):
    wrong = paths.Fused("mx.wrong", frozenset(), lambda reference, given: given["x"])
    monkeypatch.setattr(paths, "FUSED", {"toy": wrong})
    assert command.run("--dtype", "float32") == 0  # nobody asked
    assert command.run("--dtype", "float32", "--check") == 1
    assert "mlx: wrong: off the reference by" in capsys.readouterr().out


def test_a_reference_that_cannot_be_compiled_is_said_and_is_no_failure(command, capsys):
    command.operations["toy"].reference = lambda x, by: x * by if float(x.sum()) != math.pi else x
    assert command.run("--check", "--dtype", "float32") == 0
    assert "compiled: failed: ValueError" in capsys.readouterr().out


def test_recording_writes_this_devices_table_and_nothing_else(command, capsys):
    assert command.run("--record") == 0
    text = command.document.read_text(encoding="utf-8")
    before, _, rest = EMPTY.partition(record.AREA_BEGIN)
    assert text.startswith(before)
    assert text.endswith(rest.partition(record.AREA_END)[2])
    assert text.count("<!-- bench cpu-") == 1
    assert "| toy | small | float32 |" in text
    assert "| half | other | float16 |" in text
    assert command.run("--record") == 0
    assert command.document.read_text(encoding="utf-8").count("<!-- bench cpu-") == 1


def test_recording_checks_and_says_what_is_wrong(command, monkeypatch):
    wrong = paths.Fused("mx.wrong", frozenset(), lambda reference, given: given["x"])
    monkeypatch.setattr(paths, "FUSED", {"toy": wrong})
    assert command.run("--record") == 1
    text = command.document.read_text(encoding="utf-8")
    assert text.count("WRONG") == 3
    assert "* mlx: wrong: off the reference by" in text


def test_on_a_gpu_the_small_cases_decide_whether_a_kernel_is_timed(command, monkeypatch, capsys):
    def self_check(operation):
        if operation.name == "toy":
            return "tiny, float16: error 3"
        raise RuntimeError("does not compile\nat all")

    monkeypatch.setattr(facts, "default_device", lambda: GPU)
    monkeypatch.setattr(check, "self_check", self_check)
    assert command.run("--check", "--dtype", "float16") == 1
    said = capsys.readouterr().out.splitlines()
    assert "kernel: wrong: tiny, float16: error 3 (toy small float16)." in said
    assert "kernel: failed: RuntimeError: does not compile (half other float16)." in said
    assert not any("no GPU in use" in line for line in said)
    monkeypatch.setattr(check, "self_check", lambda operation: None)
    assert command.run("--check", "--dtype", "float16") == 0
    assert "times MLX's best" in capsys.readouterr().out


def test_a_document_that_cannot_be_written_fails_the_command(command, capsys):
    command.document.write_text("no marks", encoding="utf-8")
    assert command.run("--record") == 1
    assert "was not written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "nope"], "--kernel nope: must be one of toy, half"),
        (["--dtype", "float64"], "--dtype float64: must be one of float32, float16, bfloat16"),
        (["--case", "nope"], "--case nope: must be one of small, other"),
        (["--kernel", "half", "--dtype", "float32"], "no case of half in float32"),
        (["--repeat", "0"], "must be at least 1"),
        (["--seconds", "nan"], "must be above 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--record", "--kernel", "toy"], "as a whole"),
    ],
)
def test_what_does_not_exist_is_refused(command, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        command.run(*words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert command.document.read_text(encoding="utf-8") == EMPTY


def test_counts_are_shown_and_recorded_without_a_time(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(host_counts, "unavailable", lambda: None)
    monkeypatch.setattr(host_counts, "count", lambda operation, case, dtype: {"threads": 1234})
    assert command.run("--host-counts", "--json", str(tmp_path / "rows.jsonl"), "--case", "other") == 0
    assert "half other float16: threads 1,234" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.jsonl").read_text())["host_counts"] == {"threads": 1234}


def test_counts_that_cannot_be_had_are_refused(command, capsys, monkeypatch):
    monkeypatch.setattr(host_counts, "unavailable", lambda: "needs a compiler")
    with pytest.raises(SystemExit):
        command.run("--host-counts")
    assert "--host-counts: needs a compiler" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(command, capsys, monkeypatch):
    monkeypatch.setattr(facts, "gpu_backend", lambda: None)
    with pytest.raises(SystemExit):
        command.run("--device", "gpu")
    assert "--device gpu: MLX finds none" in capsys.readouterr().err


def test_a_revision_is_that_of_the_checkout_alone(tmp_path, monkeypatch):
    assert facts.revision(tmp_path) is None
    if shutil.which("git") is None:
        pytest.skip("git makes the checkout to look at")
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    for folder in ("src", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("1")
    me = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "A"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = facts.revision(tmp_path)
    assert clean is not None
    assert len(clean) >= 7
    assert facts.revision(tmp_path / "src") is None  # an archive unpacked inside somebody else's checkout
    (tmp_path / "docs" / "a").write_text("2")
    assert facts.revision(tmp_path) == clean
    (tmp_path / "src" / "a").write_text("2")
    assert facts.revision(tmp_path) == f"{clean}-dirty"
