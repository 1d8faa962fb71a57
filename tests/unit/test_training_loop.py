"""The training loop on tiny synthetic data: it learns, stops, goes on bit for bit, and refuses strangers."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr.config import ModelConfig
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.training import checkpoint
from qwen4b_asr.training.batches import Batch
from qwen4b_asr.training.loop import Trainer, learning_rate
from qwen4b_asr.training.recipe import Phase, Recipe, demo_config, write_model

WIDTH = 16
RECIPE = Recipe(phases=(Phase("ctc", 12, 4e-3, 2), Phase("align", 4, 4e-3, 1), Phase("text", 8, 4e-3, 2)))


def tiny_config() -> ModelConfig:
    config = demo_config()
    frontend = replace(config.frontend, num_mel_bins=4, lfr_m=4, lfr_n=2)
    return replace(
        config,
        frontend=frontend,
        encoder=replace(config.encoder, input_size=WIDTH, output_size=WIDTH, linear_units=24, num_blocks=2),
        adaptor=replace(config.adaptor, input_size=WIDTH, hidden_size=WIDTH, output_size=WIDTH, ffn_size=16),
        decoder=replace(config.decoder, hidden_size=WIDTH, intermediate_size=24, head_dim=8, num_hidden_layers=1),
    )


def source(first, count):
    """Batches whose words are plain to see: each word is two rows of its own pattern and a row of nothing."""
    patterns = np.random.default_rng(0).normal(size=(24, WIDTH)).astype(np.float32)
    for number in range(first, first + count):
        rng = np.random.default_rng([7, number])
        lengths = rng.integers(1, 4, 8)
        words = np.full((8, 3), -1)
        features = np.zeros((8, 9, WIDTH), np.float32)
        for i, n in enumerate(lengths):
            words[i, :n] = rng.integers(0, 5, n)
            for u in range(n):
                features[i, 3 * u : 3 * u + 2] = patterns[words[i, u]]
        yield Batch(features, 3 * lengths, words[:, : lengths.max()], lengths, ("auto",) * 8)


def trainer(directory=None, recipe=RECIPE, data=source, every=3, fingerprint="mine"):
    mx.random.seed(5)
    shift, scale = np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32)
    return Trainer(
        SpeechModel(tiny_config()),
        recipe,
        data,
        shift,
        scale,
        state_dir=directory,
        fingerprint=fingerprint,
        checkpoint_every=every,
    )


def bits(model):
    return {name: np.array(value).tobytes() for name, value in tree_flatten(model.parameters())}


def test_every_phase_reduces_its_loss():
    losses: dict[str, list[float]] = {}
    recipe = replace(
        RECIPE, phases=(Phase("ctc", 60, 5e-3, 5), Phase("align", 40, 5e-3, 5), Phase("text", 60, 5e-3, 5))
    )

    def note(report):
        name = {"ctc": "ctc", "align": "loss", "text": "text"}[report.phase]
        losses.setdefault(report.phase, []).append(report.losses[name])

    trainer(recipe=recipe).run(note)
    for phase, values in losses.items():
        assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5]), phase


@pytest.mark.parametrize("stop_after", [1, 7, 13, 20])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stop_after):
    whole = trainer()
    whole.run()

    class Stopped(Exception):
        pass

    steps = []

    def stop(report):
        steps.append(report)
        if len(steps) == stop_after:
            raise Stopped

    first = trainer(tmp_path, every=1)
    with pytest.raises(Stopped):
        first.run(stop)
    if stop_after == 1:  # the step that was stopped in was not saved yet: nothing to go on from
        with pytest.raises(CheckpointError, match="no training state"):
            trainer(tmp_path).resume()
        return
    second = trainer(tmp_path)
    second.resume()
    taken = []
    second.run(taken.append)
    assert len(taken) == sum(p.steps for p in RECIPE.phases) - stop_after + 1
    assert bits(second.model) == bits(whole.model)


def test_phases_leave_alone_what_they_do_not_train():
    run = trainer(recipe=replace(RECIPE, phases=RECIPE.phases[:1]))
    before = bits(run.model)
    run.run()
    after = bits(run.model)
    changed = {name.split(".")[0] for name in before if before[name] != after[name]}
    assert changed == {"audio_encoder"}
    run = trainer(recipe=replace(RECIPE, phases=RECIPE.phases[1:2]))
    run.run()
    after = bits(run.model)
    assert {name.split(".")[0] for name in before if before[name] != after[name]} == {"adaptor"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(CheckpointError, match="other settings or other recordings"):
        trainer(tmp_path, fingerprint="yours").resume()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / checkpoint.FILE_NAME).write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="not a training state"):
        trainer(tmp_path).resume()


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer(tmp_path, recipe=replace(RECIPE, phases=RECIPE.phases[:1])).run()
    kept = (tmp_path / checkpoint.FILE_NAME).read_bytes()
    written = mx.save_safetensors

    def fail(path, arrays, metadata):
        written(path, arrays, metadata)
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer(tmp_path).run()
    assert (tmp_path / checkpoint.FILE_NAME).read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.FILE_NAME]


def test_learning_rate_rises_then_falls():
    phase = Phase("ctc", 100, 1e-3, 10)
    rates = [learning_rate(phase, step) for step in range(100)]
    assert rates[9] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(2e-5, rel=0.1)


def test_average_follows_the_weights(monkeypatch):
    """With a decay of zero the averaged weights are the last ones."""
    recipe = replace(RECIPE, phases=RECIPE.phases[:1], average=0.0)
    run = trainer(recipe=recipe)
    last = {}
    run.run(lambda report: last.update(tree_flatten(run.state.weights)))
    np.testing.assert_array_equal(run.model.audio_encoder.embed.weight, last["audio_encoder.embed.weight"])
    averaged = trainer(recipe=replace(recipe, average=0.9))
    averaged.run()
    assert bits(averaged.model) != bits(run.model)


def test_model_directory_loads_again(tmp_path):
    from qwen4b_asr.weights.load import load_model
    from qwen4b_asr.weights.verify import verify

    model = SpeechModel(tiny_config())
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "training.jsonl").touch()
    for _ in range(2):  # a second run into the same folder replaces the first one's files
        write_model(tmp_path / "demo", tiny_config(), model)
    files = {path.name for path in (tmp_path / "demo").iterdir()}
    assert files == {"training.jsonl", "config.json", "model.safetensors", "tokenizer.json", "checksums.json"}
    loaded, config = load_model(tmp_path / "demo")
    assert config == tiny_config()
    assert bits(loaded) == bits(model)
    assert verify(tmp_path / "demo").problems == ()
    assert not [p for p in (tmp_path / "demo").iterdir() if p.name.startswith(".")]


def test_fast_gradients_are_used_only_while_training():
    ordinary = mx.fast.scaled_dot_product_attention
    seen = []
    run = trainer(recipe=replace(RECIPE, phases=RECIPE.phases[:1]))
    run.run(lambda report: seen.append(mx.fast.scaled_dot_product_attention is ordinary))
    assert mx.fast.scaled_dot_product_attention is ordinary
    assert not any(seen) or mx.default_device() != mx.Device(mx.cpu)
