"""am.mvn: blocks are found by name, and a damaged file says which one is wrong."""

from pathlib import Path

import numpy as np
import pytest

from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.weights.kaldi_mvn import read_kaldi_mvn

REAL = Path(__file__).parents[1] / "data" / "am.mvn"  # SenseVoiceSmall's own, see NOTICE
GOOD = """<Nnet>
<Splice> 2 2
[ 0 ]
<AddShift> 2 2
<LearnRateCoef> 0 [ -8.5 1e1 ]
<Rescale> 2 2
<LearnRateCoef> 0 [ 0.25 .5 ]
</Nnet>
"""


def test_the_real_file():
    mvn = read_kaldi_mvn(REAL)
    assert mvn.shift.shape == mvn.scale.shape == (560,)
    assert mvn.shift.dtype == mvn.scale.dtype == np.float32
    assert mvn.shift[:3] == pytest.approx([-8.311879, -8.600912, -9.615928])
    assert mvn.shift.max() < 0 < mvn.scale.min()  # log-mel means are positive here, so shifts negative
    assert 0.1 < mvn.scale.min() <= mvn.scale.max() < 0.3


def read(tmp_path, text):
    path = tmp_path / "am.mvn"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_kaldi_mvn(path)


def test_blocks_are_found_by_name_in_any_order(tmp_path):
    head, shift, scale = GOOD[: GOOD.index("<AddShift>")], "<AddShift> 2 2 [ 1 2 ]\n", "<Rescale> 2 2\n[ 3\n4 ]\n"
    for text in (GOOD.replace("[ 0 ]", "[ 0 1 ]"), head + scale + shift, shift + scale):
        mvn = read(tmp_path, text)
        want = ([-8.5, 10], [0.25, 0.5]) if "-8.5" in text else ([1, 2], [3, 4])
        assert (mvn.shift.tolist(), mvn.scale.tolist()) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no complete block <AddShift>"),
        (GOOD.replace("<AddShift>", "<Shift>"), "no complete block <AddShift>"),
        (GOOD.replace("<Rescale>", "<Scale>"), "no complete block <Rescale>"),
        (GOOD[: GOOD.index(".5 ]")], "no complete block <Rescale> .* cut short"),
        (GOOD.replace("-8.5", ""), "<AddShift> announces 2 values but holds 1"),
        (GOOD.replace("-8.5", "x"), "<AddShift> holds something that is not a number"),
        (GOOD.replace("-8.5", "nan"), "<AddShift> holds a value that is not finite"),
        (GOOD.replace("-8.5", "1e39"), "<AddShift> holds a value that is not finite"),
        (GOOD.replace("<Rescale> 2 2", "<Rescale> 1 1").replace("0.25 ", ""), "has 2 values but <Rescale> has 1"),
        (GOOD + GOOD, "occurs twice"),
        (b"\xff\xfe\x00", "no Kaldi text"),
        ("x" * (4 << 20) + "yy", "more than"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, text)
    assert "am.mvn" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"am\.mvn: cannot be read \(No such file"):
        read_kaldi_mvn(tmp_path / "am.mvn")
