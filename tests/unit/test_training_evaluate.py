"""Word error, test sets, synthetic voices and the command line."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.training import voices
from qwen4b_asr.training.__main__ import main
from qwen4b_asr.training.archives import Recording, TrainingDataError
from qwen4b_asr.training.corpus import Corpus, join, single_items, string_items
from qwen4b_asr.training.evaluate import Score, edit_distance, words_of
from qwen4b_asr.training.recipe import Recipe
from qwen4b_asr.training.vocabulary import ENGLISH

texts = st.lists(st.sampled_from("abc"), max_size=6)


@given(texts, texts, texts)
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, a) == 0
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [("one two", "one two", 0), ("one two", "one", 1), ("one", "two", 1), ("one two", "two one", 2), ("", "one", 1)],
)
def test_word_errors(said, heard, errors):
    assert edit_distance(said.split(), heard.split()) == errors


def test_transcripts_split_into_words():
    assert words_of("three five") == ["three", "five"]
    assert words_of("三十五") == ["三", "十", "五"]
    assert words_of("one三 two") == ["o", "n", "e", "三", "two"]
    assert words_of("") == []


def test_scores_add_up():
    total = Score("all", 2, 4, 1, 0) + Score("other", 1, 6, 1, 2)
    assert total.row() == "| all | 3 | 10 | 20.0 % | 20.0 % |"


@pytest.fixture
def corpus():
    digits = [
        Recording((word,), speaker, index, np.full(100 + index, 0.1, np.float32), 8000)
        for speaker in ("ann", "bob")
        for word in ENGLISH
        for index in range(8)
    ]
    return Corpus(digits, [], [])


def test_tests_use_held_out_takes_of_one_speaker_only(corpus):
    singles = single_items(corpus, "ann")
    assert len(singles) == 50
    assert {item.samples.size for item in singles} == {100, 101, 102, 103, 104}
    strings = string_items(corpus, "ann", 30)
    assert {len(item.words) for item in strings} == {3, 4, 5, 6, 7}
    for one, again in zip(strings, string_items(corpus, "ann", 30), strict=True):
        assert one.words == again.words
        np.testing.assert_array_equal(one.samples, again.samples)


def test_joined_recordings_are_whole(corpus):
    item = join(corpus.digits[:3], random.Random(0), widest_gap_seconds=0.01)
    assert item.words == tuple(r.words[0] for r in corpus.digits[:3])
    spoken = sum(r.samples.size for r in corpus.digits[:3])
    assert np.count_nonzero(item.samples) == spoken
    assert spoken <= item.samples.size <= spoken + 2 * 80


def test_scripts_are_fixed_by_their_seed_and_keep_voices_apart():
    lines = voices.script(1, 20, 20)
    assert lines == voices.script(1, 20, 20)
    assert lines != voices.script(2, 20, 20)
    heard = {line.voice.partition("+")[2] for line in lines}
    held_out = {line.voice.partition("+")[2] for line in voices.script(1, 0, 12, held_out=True)}
    assert held_out == set(voices.HELD_OUT_VARIANTS)
    assert not heard & held_out


def test_a_missing_engine_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    line = voices.Line(("one",), "espeak-en-0", "espeak-ng", "en-us", 50, 150, 0)
    with pytest.raises(TrainingDataError, match=r"espeak-ng is not installed.*apt install espeak-ng"):
        voices.speak(line)


def script_engine(tmp_path, monkeypatch, body):
    engine = tmp_path / "espeak-ng"
    engine.write_text(f"#!/bin/sh\n{body}\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return voices.Line(("one",), "espeak-en-0", "espeak-ng", "en-us", 50, 150, 0)


def test_a_failing_engine_is_quoted(tmp_path, monkeypatch):
    line = script_engine(tmp_path, monkeypatch, "echo 'no such voice' >&2; exit 1")
    with pytest.raises(TrainingDataError, match=r"failed to say 'one' as en-us: no such voice"):
        voices.speak(line)


def test_speech_is_kept_between_runs(tmp_path, monkeypatch):
    made = []

    def speak(line):
        made.append(line)
        return Recording(line.words, line.speaker, line.take, np.full(50, 0.5, np.float32), voices.RATE)

    monkeypatch.setattr(voices, "speak", speak)
    lines = voices.script(1, 2, 0)[:20]
    first = voices.speak_all(lines, tmp_path, lambda items, total: items)
    again = voices.speak_all(lines, tmp_path, lambda items, total: items)
    assert len(made) == 20
    for one, other in zip(first, again, strict=True):
        assert (one.words, one.speaker) == (other.words, other.speaker)
        np.testing.assert_array_equal(one.samples, other.samples)


def test_recipes_are_told_apart():
    assert Recipe().fingerprint("a") == Recipe().fingerprint("a")
    assert Recipe(seed=2).fingerprint("a") != Recipe().fingerprint("a") != Recipe().fingerprint("b")


@pytest.mark.parametrize("words", [[], ["evaluate", "--model", "demo"]])
def test_the_command_line_explains_a_missing_archive(words, tmp_path, capsys):
    missing = str(tmp_path / "no.tar")
    output = [] if words else ["--output", str(tmp_path / "out")]
    if words:
        words = ["evaluate", "--model", str(make_model(tmp_path))]
    assert main([*words, "--archive", missing, *output]) == 1
    assert "no such archive" in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()


def make_model(tmp_path):
    import mlx.core as mx

    from qwen4b_asr.model import SpeechModel
    from qwen4b_asr.training.recipe import demo_config, write_model

    mx.random.seed(0)
    write_model(tmp_path / "model", demo_config(), SpeechModel(demo_config()))
    return tmp_path / "model"


def test_resuming_nothing_and_bad_options_are_refused(tmp_path, capsys):
    archive = tmp_path / "no.tar"
    assert main(["--archive", str(archive), "--output", str(tmp_path / "out"), "--scale", "0"]) == 1
    assert "--scale must be above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--output", "x"])


@pytest.fixture
def archive(tmp_path):
    """Both collections in one archive: ten digits of one speaker, one Mandarin syllable."""
    import io
    import tarfile

    import soundfile

    path = tmp_path / "all.tar"
    names = [f"{digit}_ann_0.wav" for digit in range(10)] + ["syllables/cmn-san1.mp3"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            sound = io.BytesIO()
            soundfile.write(sound, 0.1 * np.sin(np.arange(2000)), 8000, format="WAV", subtype="PCM_16")
            member = tarfile.TarInfo(name)
            member.size = sound.tell()
            sound.seek(0)
            tar.addfile(member, sound)
    return path


def test_join_writes_a_recording(archive, tmp_path, capsys):
    import soundfile

    wanted = ["join", "--archive", str(archive), "--speaker", "ann", "--output"]
    assert main([*wanted, str(tmp_path / "a.wav"), "three", "one"]) == 0
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.subtype, info.channels) == (16000, "PCM_16", 1)
    assert 0.5 <= info.duration <= 0.71
    assert main([*wanted, str(tmp_path / "b.wav"), "eleven"]) == 1
    assert "no held-out recording of 'eleven' by 'ann'" in capsys.readouterr().err


def test_evaluate_prints_a_table(archive, tmp_path, capsys):
    model = make_model(tmp_path)
    wanted = ["evaluate", "--model", str(model), "--archive", str(archive), "--strings", "2", "--no-mandarin"]
    assert main(wanted) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| test set |")
    assert lines[2].startswith("| ann, single digits | 10 | 10 |")
    assert lines[3].startswith("| ann, strings of 3-7 | 2 |")
    assert main([*wanted, "--speaker", "bob"]) == 1
    assert "no speaker 'bob'" in capsys.readouterr().err


def test_an_archive_without_one_language_is_refused(tmp_path, archive, capsys):
    import tarfile

    partial = tmp_path / "digits.tar"
    with tarfile.open(archive) as whole, tarfile.open(partial, "w") as tar:
        for member in whole:
            if member.name.endswith(".wav"):
                tar.addfile(member, whole.extractfile(member))
    assert main(["--archive", str(partial), "--output", str(tmp_path / "out")]) == 1
    assert "audio-cmn (its syllables) is not among the archives" in capsys.readouterr().err
