"""Configurations: what is written is read back, and nothing unknown slips in."""

import json

import pytest

from qwen4b_asr.config import GenerationConfig, ModelConfig
from qwen4b_asr.errors import ConfigError
from tests.helpers.tiny import CONFIG


def test_a_round_trip_changes_nothing(tmp_path):
    for config in (ModelConfig(), CONFIG):
        config.save(tmp_path)
        assert ModelConfig.load(tmp_path) == config


def edited(**changes):
    values = json.loads(json.dumps(CONFIG.to_dict()))
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = values
        for parent in parents:
            target = target[parent]
        target[last] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 1 is needed but the file has 2"),
        ({"colour": "red"}, r"unknown key colour; known are name, frontend"),
        ({"encoder__depth": 3}, r"encoder: unknown key depth"),
        ({"encoder__attention_heads": 5}, "attention_heads must divide"),
        ({"encoder": 3}, "encoder: a JSON object is needed"),
        ({"adaptor__input_size": 33}, r"encoder.output_size must equal adaptor.input_size but got 32 and 33"),
        ({"adaptor__output_size": 25}, r"must equal decoder.hidden_size"),
        ({"encoder__input_size": 58}, "frontend output must equal"),
        ({"generation__stop_token_ids": [300]}, "stop tokens must lie below 300 but got 300"),
        ({"generation__stop_token_ids": []}, "stop_token_ids must not be empty"),
        ({"ctc_symbols": ["", "a"]}, "ctc_symbols must hold 11 texts but got 2"),
        ({"prompt__profile": "poem"}, "profile must be one of"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(edited(**changes))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a converted model"):
        ModelConfig.load(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object is needed but it holds list"):
        ModelConfig.load(tmp_path)


def test_the_token_budget_grows_with_the_recording():
    config = GenerationConfig(tokens_per_second=10, min_tokens=20)
    assert [config.token_budget(s) for s in (0.0, 1.0, 30.0)] == [20, 30, 320]


def test_query_frames_are_dropped_on_request():
    assert CONFIG.dropped_rows == 0
    assert ModelConfig.from_dict(edited(prompt__query_frames="drop")).dropped_rows == 4
