"""The demo model hears the same with a draft of its CTC head and without, in fewer passes."""

import json
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen4b_asr
from qwen4b_asr.cli.main import main
from qwen4b_asr.errors import PromptError
from qwen4b_asr.weights.paths import weights_data
from tests.helpers.fake_transcriber import MODULE, FakeTranscriber
from tests.helpers.tiny import save_tiny

DEMO = weights_data() / "demo"


@pytest.fixture(scope="module")
def demo():
    return qwen4b_asr.load("demo")


@pytest.fixture(scope="module")
def sounds():
    return [soundfile.read(DEMO / name, dtype="float32")[0] for name in ("sample.wav", "sample_zh.wav")]


def test_a_draft_saves_passes(demo):
    plain, drafted = (demo.transcribe(DEMO / "sample.wav", draft=draft) for draft in (False, True))
    assert drafted.tokens == plain.tokens
    assert drafted.text == plain.text == "three one four one five"
    assert (plain.decoder_passes, plain.drafted, plain.accepted) == (5, 0, 0)
    assert (drafted.decoder_passes, drafted.drafted, drafted.accepted) == (1, 4, 4)
    assert "draft" in drafted.timings
    assert "draft" not in plain.timings
    assert {"decoder_passes": 1, "drafted": 4, "accepted": 4}.items() <= drafted.to_dict().items()
    assert demo.transcribe(DEMO / "sample.wav").decoder_passes == 1  # it is on by itself


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.floats(0, 0.3)), min_size=1, max_size=4))
def test_whatever_is_heard_is_heard_with_a_draft_too(demo, sounds, parts):
    """Samples one after the other, from anywhere in them, in noise: the two heads do not always agree."""
    random = np.random.default_rng(0)
    pieces = [sounds[which][int(start * sounds[which].size / 2) :] for which, start, _ in parts]
    noisy = [x + random.normal(size=x.size) * noise for x, (_, _, noise) in zip(pieces, parts, strict=True)]
    samples = np.concatenate(noisy).astype(np.float32)
    plain, drafted = (demo.transcribe_samples(samples, draft=draft, segment_seconds=4.0) for draft in (False, True))
    assert drafted.tokens == plain.tokens
    assert drafted.segments == plain.segments
    assert drafted.accepted <= drafted.drafted
    assert plain.drafted == 0


def test_what_is_accepted_at_once_is_streamed_piece_by_piece(demo):
    pieces: list[str] = []
    transcript = demo.transcribe(DEMO / "sample.wav", draft=True, on_token=pieces.append)
    assert "".join(pieces) == transcript.text
    assert len(pieces) == len(transcript.tokens)


def test_a_draft_that_cannot_be_made_is_refused_and_not_missed(tmp_path):
    transcriber = qwen4b_asr.load(save_tiny(tmp_path))  # a CTC head, but nothing says what its symbols read as
    samples = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1
    with pytest.raises(PromptError, match=r"cannot make a draft: tiny: has a CTC head, but nothing says"):
        transcriber.transcribe(samples, draft=True, max_tokens=2)
    assert transcriber.transcribe(samples, max_tokens=2).drafted == 0


def test_a_draft_is_no_matter_of_the_ctc_head_alone(demo):
    with pytest.raises(PromptError, match="has no draft"):
        demo.transcribe(DEMO / "sample.wav", decoder="ctc", draft=True)
    assert demo.transcribe(DEMO / "sample.wav", decoder="ctc", draft=False).text == "three one four one five"


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"kv_bits": 8}])
def test_where_a_draft_cannot_help_there_is_none(demo, options):
    transcript = demo.transcribe(DEMO / "sample.wav", **options)
    assert transcript.drafted == 0
    assert "draft" not in transcript.timings
    with pytest.raises(PromptError, match="draft"):
        demo.transcribe(DEMO / "sample.wav", draft=True, **options)


@pytest.mark.parametrize(("flag", "wanted"), [("--draft", True), ("--no-draft", False), (None, None)])
def test_the_command_line_asks_for_it(monkeypatch, tmp_path, capsys, flag, wanted):
    model = FakeTranscriber(["one"])
    monkeypatch.setitem(sys.modules, MODULE, model.as_module())
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000)
    assert main([*([flag] if flag else []), "--model", "x", str(tmp_path / "a.wav")]) == 0
    assert capsys.readouterr().out == "one\n"
    assert model.calls[0].get("draft") == wanted


def test_json_says_how_many_passes_it_took(capsys):
    assert main(["--model", "demo", "--format", "json", str(DEMO / "sample.wav")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["decoder_passes"], found["drafted"], found["accepted"]) == (1, 4, 4)
