"""Reading the archives: names, streams, and everything that can be wrong with a file."""

import io
import tarfile

import numpy as np
import pytest
import soundfile

from qwen4b_asr.training.archives import TrainingDataError, parse_name, read_archive


def wav(seconds=0.1, rate=8000, value=0.25):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(int(seconds * rate), value, np.float32), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recordings/3_theo_7.wav", (("three",), "theo", 7, True)),
        ("0_george_0.wav", (("zero",), "george", 0, True)),
        ("audio-cmn/syllables/cmn-san1.mp3", (("三",), "audio-cmn-syllables", 1, True)),
        ("audio-cmn/syllables/cmn-san4.mp3", (("三",), "audio-cmn-syllables", 4, False)),
        ("audio-cmn/syllables/cmn-ling2.mp3", (("零",), "audio-cmn-syllables", 2, True)),
        ("audio-cmn/words/cmn-千万.mp3", (("千", "万"), "audio-cmn-words", 0, True)),
        ("audio-cmn/words/cmn-一定.mp3", None),
        ("audio-cmn/syllables/cmn-ma1.mp3", None),
        ("recordings/3_theo_7.txt", None),
        ("recordings/13_theo_7.mp3", None),
    ],
)
def test_names_say_what_is_spoken(name, expected):
    assert parse_name(name) == expected


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_recordings_come_sorted_and_decoded(tmp_path, mode):
    members = [("r/9_theo_1.wav", wav()), ("r/metadata.py", b"x"), ("r/1_lucas_0.wav", wav(0.2, 16000))]
    first, second = read_archive(write_tar(tmp_path / "a.tar", members, mode))
    assert (first.words, first.speaker, first.rate, first.samples.size) == (("one",), "lucas", 16000, 3200)
    assert (second.words, second.index) == (("nine",), 1)
    np.testing.assert_allclose(second.samples, 0.25, atol=1e-4)


def test_paths_that_lead_outside_are_only_names(tmp_path):
    target = tmp_path / "deep" / "a.tar"
    target.parent.mkdir()
    write_tar(target, [("../../1_theo_0.wav", wav()), ("/tmp/2_theo_0.wav", wav())])
    assert [r.words for r in read_archive(target)] == [("one",), ("two",)]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "deep"]


def test_a_link_is_not_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("1_theo_0.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(TrainingDataError, match="no recordings of number words"):
        read_archive(path)


def test_a_missing_archive_names_itself(tmp_path):
    with pytest.raises(TrainingDataError, match=r"nowhere\.tar: no such archive"):
        read_archive(tmp_path / "nowhere.tar")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"not an archive" * 100)
    with pytest.raises(TrainingDataError, match="not a readable tar archive"):
        read_archive(path)


def test_an_archive_cut_short_is_refused(tmp_path):
    path = write_tar(
        tmp_path / "a.tar.gz", [(f"{i}_theo_0.wav", np.random.default_rng(i).bytes(20000)) for i in range(9)]
    )
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(TrainingDataError, match=r"a\.tar\.gz"):
        read_archive(path)


def test_an_archive_of_something_else_is_refused(tmp_path):
    with pytest.raises(TrainingDataError, match="no recordings of number words"):
        read_archive(write_tar(tmp_path / "a.tar", [("cat.jpg", b"meow")]))


@pytest.mark.parametrize("data", [b"", b"RIFF nonsense", wav(0.0)])
def test_a_damaged_recording_names_archive_and_member(tmp_path, data):
    with pytest.raises(TrainingDataError, match=r"a\.tar: 4_theo_2\.wav"):
        read_archive(write_tar(tmp_path / "a.tar", [("4_theo_2.wav", data)]))


def test_an_oversized_member_is_refused_unread(tmp_path):
    with pytest.raises(TrainingDataError, match="too many for one word"):
        read_archive(write_tar(tmp_path / "a.tar", [("4_theo_2.wav", bytes(5 << 20))]))
