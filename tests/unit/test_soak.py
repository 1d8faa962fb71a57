"""tools/soak.py: models of random weights that it can transcribe with, and what it says of their memory."""

import sys
from dataclasses import replace

import pytest

import soak
from tests.helpers.tiny import CONFIG


@pytest.fixture
def tiny(monkeypatch):
    """Shrink the shapes, and leave names, prompt and vocabulary as they are."""
    random_config = soak.random_config

    def shrunk(shape):
        config = random_config(shape)
        decoder = replace(CONFIG.decoder, vocab_size=config.decoder.vocab_size, hidden_size=64, intermediate_size=128)
        adaptor = replace(CONFIG.adaptor, input_size=32, output_size=64)
        encoder = replace(CONFIG.encoder, input_size=config.encoder.input_size, output_size=32)
        return replace(config, encoder=encoder, adaptor=adaptor, decoder=decoder)

    monkeypatch.setattr(soak, "random_config", shrunk)


@pytest.mark.parametrize("recipe", [(), ("--quantize", "4")])
def test_a_model_of_random_weights_is_soaked(tiny, monkeypatch, capsys, recipe):
    budget = ("--utterances", "3", "--seconds", "1", "--max-tokens", "3")
    monkeypatch.setattr(sys, "argv", ["soak.py", "--shape", "0.6b", *budget, *recipe])
    with pytest.raises(SystemExit):  # what other tests hold in this process counts as well
        soak.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("random-0.6b, decoder in float32: planned are ")
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert lines[5].startswith("ok   active memory grew by 0 bytes")
    assert "the peak of arrays was " in lines[7]


def test_growth_is_told(tiny, monkeypatch, capsys):
    import mlx.core as mx

    kept = []
    measure = mx.get_active_memory
    monkeypatch.setattr(mx, "get_active_memory", lambda: kept.append(0) or measure() + 100_000 * len(kept))
    monkeypatch.setattr(sys, "argv", ["soak.py", "--shape", "0.6b", "--utterances", "3", "--seconds", "1"])
    with pytest.raises(SystemExit, match="1"):
        soak.main()
    assert "FAIL active memory grew by " in capsys.readouterr().out
