"""The three losses: CTC on the encoder, InfoNCE on the adaptor, cross-entropy on the decoder.

Shapes: B batch, R rows (query frames included), V symbols, U words, A audio rows, H decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..encoder import NUM_QUERY_FRAMES
from ..model import SpeechModel
from .batches import Batch
from .ctc import CtcResult, Floats, Integers, ctc
from .vocabulary import END_ID, token_of


@dataclass(frozen=True)
class Inputs:
    """A batch as the model takes it.

    Args:
        features: Normalised rows (B, L, m · F).
        mask: (B, L), True on real rows.
        rows: Real rows of each item, without query frames (B,).
        symbols: CTC symbols (B, U), 0 after the end.
        tokens: Text tokens (B, U), `END_ID` after the end.
        lengths: Words of each item (B,).
        languages: Language query of each item.
    """

    features: mx.array
    mask: mx.array
    rows: Integers
    symbols: Integers
    tokens: Integers
    lengths: Integers
    languages: tuple[str, ...]


def inputs_of(batch: Batch, shift: Floats, scale: Floats) -> Inputs:
    """Normalise a batch and number its words for CTC and for the decoder."""
    features = (batch.features + shift) * scale
    mask = np.arange(features.shape[1]) < batch.rows[:, None]
    features *= mask[:, :, None]
    symbols = batch.words + 1  # -1 after the end becomes the blank
    tokens = np.where(batch.words >= 0, batch.words + token_of(1), END_ID)
    return Inputs(mx.array(features), mx.array(mask), batch.rows, symbols, tokens, batch.lengths, batch.languages)


def encode(model: SpeechModel, inputs: Inputs) -> tuple[mx.array, mx.array]:
    """Run the encoder; returns states (B, R, D) and mask (B, R)."""
    return model.audio_encoder(inputs.features, inputs.mask, language=inputs.languages)


def ctc_loss(model: SpeechModel, states: mx.array, inputs: Inputs) -> tuple[mx.array, float, CtcResult]:
    """CTC over the feature rows; the query frames carry no words.

    Returns:
        A scalar whose *gradient* is that of the mean loss per word (its value means nothing), the mean loss per
        word, and the alignment.
    """
    logits = model.audio_encoder.ctc_logits(states)[:, NUM_QUERY_FRAMES:]
    result = ctc(np.array(logits), inputs.rows, inputs.symbols, inputs.lengths)
    possible = np.isfinite(result.losses)
    words = max(1, int(inputs.lengths[possible].sum()))
    surrogate = (mx.stop_gradient(mx.array(result.gradient)) * logits).sum() / words
    return surrogate, float(result.losses[possible].sum() / words), result


def info_nce(audio: mx.array, text: mx.array, labels: mx.array, temperature: float) -> mx.array:
    """Symmetric InfoNCE (van den Oord et al., 2018; both directions as in CLIP) on cosine similarities.

    Row i of `audio` belongs to row i of `text`. Other pairs of the same label say the same word, so they are
    neither positives nor negatives: they are left out of the sums.

    Args:
        audio: (N, H).
        text: (N, H).
        labels: (N,), integers.
        temperature: Divides the cosines.

    Returns:
        The mean loss of both directions.
    """
    audio = audio * mx.rsqrt(mx.square(audio).sum(axis=1, keepdims=True) + 1e-8)
    text = text * mx.rsqrt(mx.square(text).sum(axis=1, keepdims=True) + 1e-8)
    scores = audio @ text.T / temperature
    same = labels[:, None] == labels[None, :]
    same = same & ~mx.eye(labels.size).astype(mx.bool_)
    scores = mx.where(same, mx.array(-1e9, dtype=scores.dtype), scores)
    own = mx.diag(scores)
    forth = mx.logsumexp(scores, axis=1) - own
    back = mx.logsumexp(scores, axis=0) - own
    return (forth.mean() + back.mean()) / 2


def alignment_loss(
    model: SpeechModel, states: mx.array, mask: mx.array, inputs: Inputs, alignment: Floats, temperature: float
) -> mx.array:
    """InfoNCE between the adaptor's rows of each word and the word's text embedding.

    A word's rows are pooled with the CTC alignment's probabilities as weights.

    Args:
        model: The model.
        states: Audio states (B, R, D).
        mask: (B, R).
        inputs: The batch.
        alignment: Probability that feature row r carries word u (B, L, U).
        temperature: Of the InfoNCE loss.
    """
    rows = model.adaptor(states, mask)[:, NUM_QUERY_FRAMES:]
    weights = alignment / np.maximum(alignment.sum(axis=1, keepdims=True), 1e-6)
    pooled = mx.array(weights.astype(np.float32)).swapaxes(1, 2) @ rows
    heard = (np.arange(inputs.tokens.shape[1]) < inputs.lengths[:, None]) & (alignment.sum(axis=1) > 1e-3)
    picked = np.flatnonzero(heard.reshape(-1))
    labels = mx.array(inputs.tokens.reshape(-1)[picked])
    audio = pooled.reshape(-1, pooled.shape[-1])[mx.array(picked)]
    return info_nce(audio, model.decoder.embed(labels), labels, temperature)


def text_loss(model: SpeechModel, states: mx.array, mask: mx.array, inputs: Inputs) -> mx.array:
    """Cross-entropy of the text behind the audio, profile ``raw``: the last audio row predicts the first word.

    The audio rows of every item are moved to the right, next to its text, so that the real rows are contiguous
    and the padding in front of them takes no part in attention.

    Returns:
        Mean loss per token, the end token included.
    """
    audio = model.adaptor(states, mask)
    batch, total, _ = audio.shape
    real = inputs.rows + NUM_QUERY_FRAMES
    source = np.arange(total)[None, :] - (total - real)[:, None]
    audio = mx.take_along_axis(audio, mx.array(np.maximum(source, 0))[:, :, None], axis=1)
    words = inputs.tokens.shape[1]
    rows = mx.concatenate([audio, model.decoder.embed(mx.array(inputs.tokens))], axis=1)
    present = mx.array(np.concatenate([source >= 0, np.ones((batch, words), dtype=bool)], axis=1))
    hidden = model.decoder.hidden(rows, mask=present)[:, total - 1 :]
    logits = model.decoder.logits(hidden)
    # Position u of `hidden` has read u words; its target is word u, or the end behind the last one.
    targets = np.concatenate([inputs.tokens, np.full((batch, 1), END_ID)], axis=1)
    counted = np.arange(words + 1) <= inputs.lengths[:, None]
    losses = nn.losses.cross_entropy(logits, mx.array(targets), reduction="none")
    return (losses * mx.array(counted)).sum() / float(counted.sum())
