"""How far a quantised model is from its original: both read the same recording and text, and their scores are compared.

One layer of one model is in memory at a time, dense and in float32, so that a model of any size can be compared on a
machine that could not hold it; and what is compared are the weights, not the kernels that a device has for packed ones.
The recording is the demo model's sample. Both language models are given the original's audio rows, in the model's own
prompt, and the same text behind it, whose positions are counted.
Shapes: P positions, V vocabulary, H decoder width, A audio rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..audio import load_audio
from ..config import ModelConfig
from ..decoder import DecoderConfig, Qwen3
from ..errors import AsrError, CheckpointError, ConfigError
from ..listen import Listener, Stopwatch
from ..model import SpeechModel
from ..prompt_rows import prompt_rows
from ..quantization import Scheme
from ..tokenizer import Tokenizer
from ..transcript import TranscribeOptions
from .conversion import Conversion
from .directory import TOKENIZER_FILE
from .families import plan_checkpoint
from .keymap import Assignment
from .paths import weights_data
from .recipes import PARTS, stored_bytes
from .tensors import TensorRef

Progress = Callable[[str, int, int], None]

_TEXT = (
    "three one four one five. The weather was fine this morning, so we walked along the river to the old market and "
    "bought bread and apples. 今天早上天气很好，我们沿着河走到老市场，买了面包和苹果。"
)
_POSITIONS = 48
_TABLE_ROWS = 8192
# A sound 4-bit model stays far within these; one with a damaged layer does not. Where all tokens are nearly as likely,
# as in a model that was never trained, no divergence is large and the most likely token says little: agreement counts
# from some divergence on, and besides there is how much of what the original knows is lost.
_MOST_KL, _MOST_LOST = 1.0, 0.4
_LEAST_AGREEMENT, _SOME_KL = 0.6, 0.1
_MOST_AUDIO_ERROR = 0.3


@dataclass(frozen=True)
class Fidelity:
    """How near two models are.

    Args:
        positions: Positions of the language model that were compared, 0 if there is none.
        mean_kl: Mean over positions of the Kullback-Leibler divergence of the tokens' probabilities, original to
            quantised, in nats.
        max_kl: The largest.
        agreement: Share of positions at which both find the same token most likely.
        lost: The mean divergence over that of the original from all tokens being as likely.
        audio_error: Root mean square of the change of the audio rows over that of the rows; None where encoder and
            adaptor are not quantised.
        ctc_agreement: Share of frames at which both CTC heads find the same symbol most likely; None as above, or
            where there is no CTC head.
    """

    positions: int = 0
    mean_kl: float = 0.0
    max_kl: float = 0.0
    agreement: float = 1.0
    lost: float = 0.0
    audio_error: float | None = None
    ctc_agreement: float | None = None

    @property
    def problem(self) -> str | None:
        """What makes the model suspicious, if anything does."""
        # Written so that a value that is not a number is one, too.
        agrees = self.agreement >= _LEAST_AGREEMENT or self.mean_kl <= _SOME_KL
        if not (self.mean_kl <= _MOST_KL and self.lost <= _MOST_LOST and agrees):
            return (
                "the quantised language model is not near its original; few bits do that to a small model, and so does "
                "a damaged file: compare more bits"
            )
        if self.audio_error is not None and not self.audio_error <= _MOST_AUDIO_ERROR:
            return "the quantised encoder or adaptor is not near its original: give it more bits, or leave it as it is"
        return None

    def lines(self) -> list[str]:
        """Return what was found, in words."""
        found = []
        if self.positions:
            found.append(
                f"KL divergence mean {self.mean_kl:.4f}, max {self.max_kl:.4f} nats; same first token at "
                f"{100 * self.agreement:.1f} % of {self.positions} positions"
            )
        if self.audio_error is not None:
            found.append(f"audio rows changed by {100 * self.audio_error:.2f} % (rms)")
        if self.ctc_agreement is not None:
            found[-1] += f"; same CTC symbol at {100 * self.ctc_agreement:.1f} % of frames"
        return found


class StoredWeights:
    """A model's parameters as dense float32 arrays, read one at a time.

    Args:
        conversion: Says where each lies.
    """

    def __init__(self, conversion: Conversion) -> None:
        self.config = conversion.config
        self._vectors = conversion.vectors
        self._assignments: dict[str, tuple[Assignment, Any]] = {
            f"{fill.prefix}{assignment.target}": (assignment, fill.refs)
            for fill in conversion.fills
            for assignment in fill.plan.assignments
        }

    def dense(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """Return a parameter under the name, and in the shape, that it has in a model that is not quantised."""
        if name in self._vectors:
            return mx.array(self._vectors[name]).reshape(shape)
        scheme = self._scheme(name)
        if scheme is None:
            return self._stored(name).astype(mx.float32).reshape(shape)
        stem = name.removesuffix(".weight")
        return _dequantize(scheme, [self._matrix(f"{stem}.{part}") for part in scheme.shapes(*shape)])

    def rows(self, name: str, chosen: list[int]) -> mx.array:
        """Return rows (n, C) of a matrix, reading no others."""
        scheme = self._scheme(name)
        parts = [name]
        if scheme is not None:
            parts = [f"{name.removesuffix('.weight')}.{part}" for part in scheme.shapes(1, scheme.group_size)]
        picked = [self._ref(part).rows(chosen) for part in parts]
        return picked[0].astype(mx.float32) if scheme is None else _dequantize(scheme, picked)

    def _scheme(self, name: str) -> Scheme | None:
        attribute, _, path = name.partition(".")
        stem, _, last = path.rpartition(".")
        if last != "weight" or f"{attribute}.{stem}.scales" not in self._assignments:
            return None
        form = self.config.quantization(PARTS[attribute])
        return None if form is None else form.scheme(stem.removesuffix(".base_layer"))

    def _ref(self, name: str) -> TensorRef:
        assignment, refs = self._assignments[name]
        if len(assignment.sources) != 1:
            raise CheckpointError(f"{refs[assignment.sources[0]].file}: {name} must be one tensor to be compared")
        ref: TensorRef = refs[assignment.sources[0]]
        return ref

    def _stored(self, name: str) -> mx.array:
        assignment, refs = self._assignments[name]
        return mx.concatenate([block for source in assignment.sources for block in refs[source].blocks()])

    def _matrix(self, name: str) -> mx.array:
        return self._stored(name).reshape(self._ref(name).shape)


def _dequantize(scheme: Scheme, parts: list[mx.array]) -> mx.array:
    sizes: Any = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}
    if scheme.mode == "affine":
        weight, scales, biases = parts
        return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **sizes)
    weight, scales = parts
    return mx.dequantize(weight, scales, **sizes).astype(mx.float32)


def compare_directories(
    directory: str | Path, original: str | Path, *, on_progress: Progress | None = None
) -> Fidelity:
    """Compare a model directory with the one, or the published checkpoint, that it was made from.

    Raises:
        CheckpointError: If one of them cannot be read.
        ConfigError: If they are not the same model.
    """
    directory, original = (Path(path).expanduser() for path in (directory, original))
    # Canary-Qwen is published without its tokenizer.
    lacking = original.is_dir() and not any(original.rglob(TOKENIZER_FILE))
    old = plan_checkpoint(original, directory if lacking else None)
    return compare(old, plan_checkpoint(directory), on_progress=on_progress)


def compare(original: Conversion, quantised: Conversion, *, on_progress: Progress | None = None) -> Fidelity:
    """Compare two models of the same sizes.

    Args:
        original: Where the original's weights lie.
        quantised: Where the other's do.
        on_progress: Called with what was read, how much of it, and how much there is.

    Raises:
        ConfigError: If they are not the same model.
    """
    old, new = (_dense_config(conversion.config) for conversion in (original, quantised))
    _check_same(old, new)
    weights = StoredWeights(original), StoredWeights(quantised)
    stages = bool(quantised.config.quantized_stages)
    sizes = stored_bytes(old, decoder_dtype="F32")
    written = sizes.pop("decoder", 0)
    heard = sum(sizes.values())
    total, done = (1 + stages) * heard + 2 * written, 0

    def report(what: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(what, done, total)

    audio, symbols = _hear(weights[0], old)
    report("audio", heard)
    found = Fidelity()
    if stages:
        other, others = _hear(weights[1], new)
        report("audio", heard)
        error = mx.sqrt(mx.mean(mx.square(other - audio)) / mx.mean(mx.square(audio)))
        same = None if symbols is None or others is None else mx.mean((symbols == others).astype(mx.float32))
        found = replace(found, audio_error=float(error), ctc_agreement=None if same is None else float(same))
    if old.decoder is None or new.decoder is None:
        return found
    tokens = Tokenizer(original.copies[TOKENIZER_FILE])
    hidden = [_hidden(w, config, tokens, audio, report) for w, config in zip(weights, (old, new), strict=True)]
    scores = [_log_probabilities(w, h, old.decoder) for w, h in zip(weights, hidden, strict=True)]
    report("scores", total - done)
    kl = mx.maximum(mx.sum(mx.exp(scores[0]) * (scores[0] - scores[1]), axis=-1), 0.0)
    same = mx.mean((mx.argmax(scores[0], axis=-1) == mx.argmax(scores[1], axis=-1)).astype(mx.float32))
    known = mx.mean(mx.sum(mx.exp(scores[0]) * scores[0], axis=-1)) + math.log(scores[0].shape[-1])
    mx.eval(kl, same, known)
    return replace(
        found,
        positions=kl.size,
        mean_kl=float(mx.mean(kl)),
        max_kl=float(mx.max(kl)),
        agreement=float(same),
        lost=float(mx.mean(kl)) / max(float(known), 1e-6),
    )


def _dense_config(config: ModelConfig) -> ModelConfig:
    decoder = None if config.decoder is None else replace(config.decoder, quantization=None)
    return replace(config, decoder=decoder, quantized_stages={})


def _check_same(old: ModelConfig, new: ModelConfig) -> None:
    plain = [None if c.decoder is None else replace(c.decoder, lora=None) for c in (old, new)]
    for what, a, b in (
        ("encoder", old.encoder, new.encoder),
        ("adaptor", old.adaptor, new.adaptor),
        ("decoder", *plain),
    ):
        if a != b:
            raise ConfigError(f"{new.name} and {old.name} are not the same model: they differ in the {what}'s sizes")


def _fill(module: nn.Module, weights: StoredWeights, prefix: str) -> None:
    """Fill a module with dense parameters, and nothing but it."""
    flat: Any = tree_flatten(module.parameters())
    module.update(tree_unflatten([(name, weights.dense(f"{prefix}{name}", array.shape)) for name, array in flat]))
    module.eval()


def _hear(weights: StoredWeights, config: ModelConfig) -> tuple[mx.array, mx.array | None]:
    """Return the rows (1, A, H) that the language model gets of the sample, and the most likely CTC symbols (R,).

    Without a language model the rows are the encoder's.
    """
    model = SpeechModel(config)
    for attribute in PARTS:
        if attribute in model and attribute != "decoder":
            _fill(model[attribute], weights, f"{attribute}.")
    samples = load_audio(weights_data() / "demo" / "sample.wav")
    states = Listener(model, config).audio_states(samples, "auto", False, Stopwatch())
    rows = states if config.adaptor is None else model.adaptor(states[:, config.dropped_rows :])
    symbols = mx.argmax(model.ctc_logits(states)[0], axis=-1) if config.ctc_size else None
    mx.eval(rows, symbols)
    return rows, symbols


def _hidden(
    weights: StoredWeights, config: ModelConfig, tokens: Tokenizer, audio: mx.array, report: Callable[[str, int], None]
) -> mx.array:
    """Return the final hidden states (P, H) of the text's positions; one layer is held at a time."""
    assert config.decoder is not None
    table = "decoder.model.embed_tokens.weight"

    def embed(ids: mx.array) -> mx.array:
        flat: Any = ids.reshape(-1).tolist()
        return weights.rows(table, flat).reshape(*ids.shape, -1)

    text = _text_ids(tokens, config.decoder.vocab_size)
    before = prompt_rows(config.prompt, TranscribeOptions(), audio[0], spell=tokens.encode, embed=embed)
    x = mx.concatenate([before.astype(mx.float32), embed(mx.array(text))])[None]
    decoder = Qwen3(config.decoder)  # yet to be filled: nothing is computed
    layers: Any = decoder.model.layers
    norms = [*(layer.input_layernorm for layer in layers), decoder.model.norm]  # small; a layer needs the next one's
    for number, norm in enumerate(norms[:-1]):
        _fill(norm, weights, f"decoder.model.layers.{number}.input_layernorm.")
    _fill(norms[-1], weights, "decoder.model.norm.")
    normed = norms[0](x)
    for number, layer in enumerate(layers):
        _fill(layer, weights, f"decoder.model.layers.{number}.")
        x, normed = layer(x, normed, None, None, norms[number + 1])
        mx.eval(x, normed)
        held: Any = tree_flatten(layer.parameters())
        nbytes = sum(array.nbytes for _, array in held)
        layers[number] = None
        del layer, held
        mx.clear_cache()
        report(f"layer {number}", nbytes)
    hidden: mx.array = normed[0, -len(text) - 1 : -1]
    return hidden


def _text_ids(tokens: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of the text, as many as are compared; a vocabulary that cannot spell it gets tokens of its own."""
    try:
        ids = [i for i in tokens.encode(_TEXT) if i < vocab_size][:_POSITIONS]
    except AsrError:
        ids = []
    if len(ids) == _POSITIONS and len(set(ids)) >= _POSITIONS // 4:
        return ids
    return [(7919 * number + 13) % vocab_size for number in range(_POSITIONS)]


def _log_probabilities(weights: StoredWeights, hidden: mx.array, config: DecoderConfig) -> mx.array:
    """Return log probabilities (P, V); the output matrix is read some rows at a time."""
    name = "decoder.model.embed_tokens.weight" if config.tie_word_embeddings else "decoder.lm_head.weight"
    logits = []
    for first in range(0, config.vocab_size, _TABLE_ROWS):
        some = weights.rows(name, list(range(first, min(first + _TABLE_ROWS, config.vocab_size))))
        logits.append(hidden @ some.T)
        mx.eval(logits[-1])
    scores = mx.concatenate(logits, axis=-1)
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)
