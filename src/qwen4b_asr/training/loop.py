"""The training loop: phases, schedule, AdamW, averaged weights, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..model import SpeechModel
from .batches import Batch
from .checkpoint import TrainingState, load_state, save_state
from .ctc import Floats
from .fast import cpu_gradients
from .losses import Inputs, alignment_loss, ctc_loss, encode, inputs_of, text_loss
from .recipe import Phase, Recipe

BatchSource = Callable[[int, int], Iterator[Batch]]
"""Called with the first batch's number and the count; yields the batches in order."""


def learning_rate(phase: Phase, step: int) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, cosine decay to a fiftieth of the peak."""
    if step < phase.warmup:
        return phase.learning_rate * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    return phase.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass
class Report:
    """What the loop tells after a step; losses that the phase has not are left out."""

    phase: str
    step: int
    losses: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Runs the phases of a recipe over a model.

    Args:
        model: Changed in place; at the end it holds the averaged weights.
        recipe: What to do.
        source: Gives the batches.
        shift: Normalisation of the features (m · F,); goes into the model.
        scale: Likewise.
        state_dir: Where checkpoints go; None writes none.
        fingerprint: See `checkpoint.save_state`.
        checkpoint_every: Steps between checkpoints.
    """

    def __init__(
        self,
        model: SpeechModel,
        recipe: Recipe,
        source: BatchSource,
        shift: Floats,
        scale: Floats,
        *,
        state_dir: Path | None = None,
        fingerprint: str = "",
        checkpoint_every: int = 200,
    ) -> None:
        self.model, self.recipe, self.source = model, recipe, source
        self.shift, self.scale = shift, scale
        self.state_dir, self.fingerprint, self.checkpoint_every = state_dir, fingerprint, checkpoint_every
        model.frontend.cmvn_shift = mx.array(shift)
        model.frontend.cmvn_scale = mx.array(scale)
        self.state = TrainingState(0, 0, model.parameters(), model.parameters(), {})

    def resume(self) -> None:
        """Take up the run that the checkpoint in `state_dir` was made by.

        Raises:
            CheckpointError: If there is none or it does not belong to this run.
        """
        assert self.state_dir is not None
        self.state = load_state(self.state_dir, self.fingerprint)

    def run(self, on_step: Callable[[Report], None] | None = None) -> None:
        """Train to the end of the recipe; the model then holds the averaged weights."""
        first = sum(p.steps for p in self.recipe.phases[: self.state.phase])
        while self.state.phase < len(self.recipe.phases):
            phase = self.recipe.phases[self.state.phase]
            with cpu_gradients():
                self._run_phase(phase, first, on_step)
            first += phase.steps
            # The next phase starts from the averaged weights, with a fresh optimiser.
            average = self.state.average
            self.state = TrainingState(self.state.phase + 1, 0, average, average, {})
            self._save()
        self.model.update(self.state.weights)
        self.model.unfreeze()
        self.model.eval()

    def _run_phase(self, phase: Phase, first: int, on_step: Callable[[Report], None] | None) -> None:
        model, recipe, state = self.model, self.recipe, self.state
        model.update(state.weights)
        model.train()
        _freeze(model, phase.name)
        optimizer = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.98], weight_decay=recipe.weight_decay)
        optimizer.init(model.trainable_parameters())
        if state.optimizer:
            optimizer.state = state.optimizer
        reported: dict[str, float] = {}
        gradient_of = nn.value_and_grad(model, lambda inputs: self._loss(phase.name, inputs, reported))
        average = dict(tree_flatten(state.average))
        for step, batch in enumerate(self.source(first + state.step, phase.steps - state.step), start=state.step):
            inputs = inputs_of(batch, self.shift, self.scale)
            reported.clear()
            loss, gradients = gradient_of(inputs)
            gradients, _ = optim.clip_grad_norm(gradients, recipe.clip_norm)
            optimizer.learning_rate = mx.array(learning_rate(phase, step))
            optimizer.update(model, gradients)
            decay = min(recipe.average, (1 + step) / (10 + step))
            trained: Any = tree_flatten(model.trainable_parameters())
            for name, value in trained:
                average[name] = decay * average[name] + (1 - decay) * value
            mx.eval(loss, model.parameters(), optimizer.state, average)
            self.state = TrainingState(
                state.phase, step + 1, model.parameters(), tree_unflatten(list(average.items())), optimizer.state
            )
            if on_step is not None:
                on_step(Report(phase.name, step + 1, {**reported, "loss": loss.item()}))
            if (step + 1) % self.checkpoint_every == 0:
                self._save()

    def _loss(self, phase: str, inputs: Inputs, reported: dict[str, float]) -> mx.array:
        model, recipe = self.model, self.recipe
        states, mask = encode(model, inputs)
        surrogate, value, result = ctc_loss(model, states, inputs)
        reported["ctc"] = value
        if phase == "ctc":
            return surrogate
        if phase == "align":
            states = mx.stop_gradient(states)
            return alignment_loss(model, states, mask, inputs, result.alignment, recipe.temperature)
        text = text_loss(model, states, mask, inputs)
        reported["text"] = float(mx.stop_gradient(text).item())  # type: ignore[arg-type]
        return text + recipe.ctc_weight * surrogate

    def _save(self) -> None:
        if self.state_dir is not None:
            save_state(self.state, self.state_dir, self.fingerprint)


def _freeze(model: SpeechModel, phase: str) -> None:
    """Leave trainable what the phase trains; the normalisation is measured, never trained."""
    model.unfreeze()
    model.frontend.freeze()
    if phase == "ctc":
        model.adaptor.freeze()
        model.decoder.freeze()
    elif phase == "align":
        model.audio_encoder.freeze()
        model.decoder.freeze()
