"""Comparing a quantised model with its original: the numbers, what is suspicious, and how little is held meanwhile."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.cli.main import main
from qwen4b_asr.errors import ConfigError
from qwen4b_asr.prompt_rows import prompt_rows
from qwen4b_asr.tokenizer import Tokenizer
from qwen4b_asr.transcript import TranscribeOptions
from qwen4b_asr.weights import fidelity
from qwen4b_asr.weights.convert import convert, convert_checkpoint
from qwen4b_asr.weights.fidelity import Fidelity, compare_directories
from qwen4b_asr.weights.load import load_model
from qwen4b_asr.weights.paths import weights_data
from qwen4b_asr.weights.recipes import read_recipe
from tests.helpers.quantised import WIDE, dense_twin, wide_parts

DEMO = weights_data() / "demo"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, and the same under some recipes."""
    folder = tmp_path_factory.mktemp("models")
    parts = wide_parts(folder, tied=False, scale=0.5)  # scores that differ, so that it matters which way is measured
    convert(**parts.arguments(folder / "dense"))
    for name, asked in {
        "8": {"name": "8"},
        "4": {"name": "4"},
        "mxfp4": {"name": "mxfp4"},
        "stages": {"name": "4", "encoder": 8, "adaptor": 6},
        "adaptor": {"name": None, "adaptor": 4},
    }.items():
        convert(**parts.arguments(folder / name), recipe=read_recipe(**asked))
    return folder


def probabilities(decoder, directory, audio):
    """Log probabilities of the text behind the prompt, from a decoder that is whole, in double precision."""
    tokens = Tokenizer(directory / "tokenizer.json")
    text = list(tokens.encode(fidelity._TEXT))[:48]
    before = prompt_rows(WIDE.prompt, TranscribeOptions(), audio, spell=tokens.encode, embed=decoder.embed)
    rows = mx.concatenate([before, decoder.embed(mx.array(text))])
    scores = np.array(decoder(rows[None])[0, before.shape[0] - 1 : -1], dtype=np.float64)
    return (
        scores
        - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - scores.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("recipe", ["8", "4", "mxfp4"])
def test_the_numbers_are_those_of_two_whole_models(models, recipe):
    dense, config = load_model(models / "dense", dtype="float32")
    audio, _ = fidelity._hear(fidelity.StoredWeights(fidelity.plan_checkpoint(models / "dense")), config)
    _, twin = dense_twin(models / recipe)
    old, new = (probabilities(decoder, models / "dense", audio[0]) for decoder in (dense.decoder, twin))
    kl = (np.exp(old) * (old - new)).sum(-1)
    found = compare_directories(models / recipe, models / "dense")
    assert found.positions == kl.size == 48
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-3, abs=1e-6)
    known = (np.exp(old) * old).sum(-1).mean() + np.log(old.shape[-1])
    assert found.lost == pytest.approx(kl.mean() / known, rel=2e-2)
    assert found.agreement == pytest.approx((old.argmax(-1) == new.argmax(-1)).mean(), abs=1.01 / 48)
    assert (found.audio_error, found.ctc_agreement) == (None, None)


def test_fewer_bits_are_further_away(models):
    eight, four = (compare_directories(models / name, models / "dense") for name in ("8", "4"))
    assert 0 < eight.mean_kl < four.mean_kl / 20
    assert compare_directories(models / "dense", models / "dense") == Fidelity(positions=48)


def test_audio_rows_are_the_originals_for_both_and_compared_apart(models):
    plain, staged, adaptor = (compare_directories(models / n, models / "dense") for n in ("4", "stages", "adaptor"))
    assert (staged.mean_kl, staged.agreement) == (plain.mean_kl, plain.agreement)
    assert 0 < staged.audio_error < 0.1
    assert staged.ctc_agreement > 0.9
    assert (adaptor.mean_kl, adaptor.agreement) == (0, 1)
    assert adaptor.audio_error > 0
    assert len(staged.lines()) == 2
    assert staged.lines()[1].startswith(
        f"audio rows changed by {100 * staged.audio_error:.2f} % (rms); same CTC symbol"
    )


def damage(models, target, name, change):
    """Copy a model with one tensor changed."""
    target.mkdir()
    for path in (models / "8").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    arrays = mx.load(str(target / "model.safetensors"))
    arrays[name] = change(arrays[name])
    mx.save_safetensors(str(target / "model.safetensors"), arrays)
    return target


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("decoder.lm_head.scales", lambda a: a[::-1]),
        ("decoder.model.layers.2.mlp.down_proj.scales", lambda a: 40 * a),
        ("decoder.model.embed_tokens.weight", lambda a: a[:, ::-1]),
        ("decoder.model.norm.weight", lambda a: -a),
        ("decoder.model.layers.0.self_attn.v_proj.biases", lambda a: mx.full(a.shape, math.nan, a.dtype)),
    ],
)
def test_a_damaged_model_is_suspicious(models, tmp_path, name, change):
    assert compare_directories(models / "8", models / "dense").problem is None
    found = compare_directories(damage(models, tmp_path / "bad", name, change), models / "dense")
    assert found.problem is not None
    assert "language model is not near its original" in found.problem


def test_suspicion_has_its_reasons():
    assert Fidelity(48, 0.05, 0.3, 0.9).problem is None
    assert "language model" in Fidelity(48, 0.15, 0.3, 0.4).problem
    assert "language model" in Fidelity(48, 1.5, 3.0, 0.9).problem
    assert "language model" in Fidelity(48, 0.05, 0.3, 0.9, lost=0.5).problem
    assert Fidelity(48, 0.05, 0.3, 0.4).problem is None  # flat scores: one token is as good as another
    assert "language model" in Fidelity(48, math.nan, math.nan, 1.0).problem
    assert "encoder or adaptor" in Fidelity(48, 0.0, 0.0, 1.0, 0.0, audio_error=0.5).problem
    assert "encoder or adaptor" in Fidelity(audio_error=math.nan).problem


def test_another_model_is_refused(models):
    with pytest.raises(ConfigError, match="are not the same model: they differ in the encoder's sizes"):
        compare_directories(models / "4", DEMO)


def test_one_layer_of_one_model_is_held_at_a_time(models):
    held = []
    mx.clear_cache()
    compare_directories(
        models / "4", models / "dense", on_progress=lambda what, done, total: held.append(mx.get_active_memory())
    )
    assert len(held) == 1 + 2 * WIDE.decoder.num_hidden_layers + 1
    layers = np.array(held[1:-1])
    layer = 4 * (64 * 32 * 2 + 2 * 64 * 16 + 3 * 64 * 96)
    assert layers[0] > 0
    assert np.abs(layers - layers[0]).max() < layer


def test_progress_ends_at_the_whole(models):
    seen = []
    compare_directories(models / "stages", models / "dense", on_progress=lambda *args: seen.append(args))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]


def test_a_vocabulary_that_cannot_spell_the_text_gets_its_own_tokens():
    ids = fidelity._text_ids(Tokenizer(DEMO / "tokenizer.json"), 38)
    assert len(ids) == 48
    assert all(0 <= i < 38 for i in ids)
    assert len(set(ids)) == 38


# --- The command line ----------------------------------------------------------------------------------------------


def run(capsys, *words):
    status = main(list(map(str, words)))
    found = capsys.readouterr()
    return status, found.out, found.err


def test_convert_compares_by_itself_and_verify_when_asked(tmp_path, capsys):
    out = tmp_path / "4"
    status, _, err = run(capsys, "convert", "--checkpoint", "demo", "--quantize", "4", "--output", out)
    assert status == 0
    assert f"{out}: KL divergence mean 0.0" in err
    assert "warning" not in err
    status, text, _ = run(capsys, "verify", out, "--against", "demo")
    assert status == 0
    assert [line.split(":")[1][:3] for line in text.splitlines()] == [" ok", " KL"]
    assert text.splitlines()[1] in err
    status, text, _ = run(capsys, "info", out)
    assert "packed   group_size 64, bits 4, mode affine; 1 tensors otherwise\n           by recipe 4\n" in text
    (line,) = run(capsys, "info", out, "--json")[1].splitlines()
    assert json.loads(line)["recipe"] == "4"


def test_the_comparison_can_be_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "compare", lambda *args, **options: pytest.fail("compared"))
    words = ("convert", "--checkpoint", "demo", "--quantize", "4", "--output", tmp_path / "a", "--no-check")
    assert run(capsys, *words)[0] == 0
    words = ("convert", "--checkpoint", "demo", "--dtype", "bfloat16", "--output", tmp_path / "b")
    assert run(capsys, *words)[0] == 0


def test_what_cannot_be_compared_is_still_a_model(tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise ConfigError("no such prompt")

    monkeypatch.setattr(fidelity, "compare", fail)
    status, _, err = run(capsys, "convert", "--checkpoint", DEMO, "--quantize", "8", "--output", tmp_path / "8")
    assert status == 0
    assert "not compared with its original: no such prompt" in err
    assert (tmp_path / "8" / "config.json").is_file()


def test_suspicion_is_a_warning_after_converting_and_a_failure_of_verify(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "_MOST_KL", -1.0)
    status, _, err = run(capsys, "convert", "--checkpoint", DEMO, "--quantize", "8", "--output", tmp_path / "8")
    assert status == 0
    assert "warning: the quantised language model is not near" in err
    status, _, err = run(capsys, "verify", tmp_path / "8", "--against", DEMO)
    assert status == 1
    assert "is not near its original" in err


def test_verify_compares_nothing_that_is_damaged(tmp_path, capsys, monkeypatch):
    convert_checkpoint(DEMO, tmp_path / "8", recipe=read_recipe("8"))
    (tmp_path / "8" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(fidelity, "compare_directories", lambda *args, **options: pytest.fail("compared"))
    assert run(capsys, "verify", tmp_path / "8", "--against", "demo")[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quantize", "9"), "quantisation '9': choose one of 8, 6, 5, 4"),
        (("--group-size", "32"), "--group-size is for --quantize"),
        (("--quantize", "none.json"), "none.json: cannot be read as a recipe"),
    ],
)
def test_options_that_say_nothing_sensible(tmp_path, capsys, words, message):
    status, _, err = run(capsys, "convert", "--checkpoint", DEMO, "--output", tmp_path / "out", *words)
    assert status != 0
    assert message in err
    assert not (tmp_path / "out").exists()


def test_parts_of_the_model_besides_the_decoder(tmp_path, capsys):
    words = ("--quantize-encoder", "8", "--quantize-adaptor", "6", "--group-size", "32", "--output", tmp_path / "out")
    status, _, err = run(capsys, "convert", "--checkpoint", DEMO, *words)
    assert status == 0
    assert "KL divergence mean 0.0000, max 0.0000" in err
    assert "audio rows changed by" in err
    text = run(capsys, "info", tmp_path / "out")[1]
    assert "packed   audio_encoder: group_size 32, bits 8, mode affine\n" in text
    assert "by recipe g32-encoder8-adaptor6" in text
    counts = {line.split()[0]: line.split()[2] for line in text.splitlines() if line.strip()[:5] in ("audio", "total")}
    assert run(capsys, "info", DEMO)[1].count(counts["total"]) == 1
