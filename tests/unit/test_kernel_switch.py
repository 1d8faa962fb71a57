"""Which kernels a user wants: the environment's choice and the program's."""

import pytest

import qwen4b_asr.kernels._switch as switch
from qwen4b_asr.errors import ConfigError
from qwen4b_asr.kernels import use
from tests.helpers.kernel_toy import Spy, W, X, make

pytestmark = pytest.mark.usefixtures("toy")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("", True, True),
        ("", False, False),
        ("on", False, True),
        ("ON", False, True),
        ("off", True, False),
        ("scaled", False, True),
        ("fsmn, scaled", False, True),
        ("fsmn", True, False),
    ],
)
def test_the_environment_chooses(monkeypatch, value, default, expected):
    monkeypatch.setenv(switch.VARIABLE, value)
    operation = make(Spy(), default=default)
    assert operation.ready() is expected
    assert operation.state().status == ("used" if expected else "off")


def test_an_unknown_name_is_an_error_even_without_a_gpu(monkeypatch):
    operation = make(Spy())
    monkeypatch.setenv(switch.VARIABLE, "fsmn,scalde")
    with pytest.raises(ConfigError, match=r"QWEN4B_ASR_KERNELS must be on, off or some of .*scaled.* but got scalde"):
        operation(X, W)
    with pytest.raises(ValueError, match=r"\[kernels\.use\] must be on, off or some of .* but got scalde, offf"):
        use("scalde", "offf")
    with pytest.raises(ValueError, match="but got on"):
        use("fsmn", "on")


@pytest.mark.usefixtures("gpu")
def test_a_program_chooses_for_good_or_for_a_while(monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "off")
    operation = make(Spy())
    with use("scaled"):
        assert operation.ready()
        with use("off"):
            assert not operation.ready()
        assert operation.ready()
        use("fsmn")
        assert not operation.ready()
    assert not operation.ready()
    use("on")
    assert operation.ready()
    use()
    assert not operation.ready()
    monkeypatch.delenv(switch.VARIABLE)
    assert operation.ready()
