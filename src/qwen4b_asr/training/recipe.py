"""What the demo is: sizes, phases, and the model directory that comes out."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..adaptor import AdaptorConfig
from ..config import GenerationConfig, ModelConfig
from ..decoder import DecoderConfig
from ..encoder import EncoderConfig
from ..features import FrontendConfig
from ..model import SpeechModel
from ..prompt import PromptConfig
from ..weights.directory import CHECKSUMS_FILE, TOKENIZER_FILE, save_model
from .batches import AugmentConfig, MixConfig
from .vocabulary import END_ID, SPECIALS, WORDS, ctc_symbols, tokenizer_json, vocabulary

DEMO_NAME = "demo-spoken-numbers"


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    Args:
        name: ``ctc``, ``align`` (InfoNCE, the adaptor alone) or ``text`` (cross-entropy and CTC, everything).
        steps: Batches.
        learning_rate: Peak; linear warm-up, cosine decay to a fiftieth.
        warmup: Steps of the warm-up.
    """

    name: str
    steps: int
    learning_rate: float
    warmup: int = 100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the recordings.

    Args:
        seed: Seed of weights, voices and batches.
        phases: In order.
        batch_size: Mean number of strings in a batch.
        weight_decay: Of AdamW.
        clip_norm: Largest gradient norm.
        average: Decay of the moving average of the weights.
        ctc_weight: Weight of CTC beside cross-entropy.
        temperature: Of InfoNCE.
        english_voices: Synthetic English speakers.
        mandarin_voices: Synthetic Mandarin speakers.
        recorded_speeds: Speeds at which each recording is used.
        synthetic_speeds: Speeds at which each synthetic line is used.
        augmentation: How far strings are changed.
        mix: What share of the strings comes from where.
    """

    seed: int = 1
    phases: tuple[Phase, ...] = (
        Phase("ctc", 4000, 1.6e-3, 200),
        Phase("align", 300, 1.5e-3, 50),
        Phase("text", 2400, 8e-4, 150),
    )
    batch_size: int = 32
    weight_decay: float = 0.02
    clip_norm: float = 2.0
    average: float = 0.998
    ctc_weight: float = 0.3
    temperature: float = 0.1
    english_voices: int = 300
    mandarin_voices: int = 160
    recorded_speeds: int = 5
    synthetic_speeds: int = 2
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)

    def fingerprint(self, *others: Any) -> str:
        """Return a hash of the recipe and of whatever else the run depends on."""
        text = json.dumps([asdict(self), *others], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def demo_config() -> ModelConfig:
    """Return the demo's configuration: the full system's classes, small."""
    # The Free Spoken Digit Dataset is telephone band, 8 kHz: nothing above 4 kHz may decide anything.
    frontend = FrontendConfig(num_mel_bins=40, high_freq=4000.0)
    words = len(vocabulary())
    return ModelConfig(
        name=DEMO_NAME,
        frontend=frontend,
        encoder=EncoderConfig(
            input_size=frontend.output_size,
            output_size=128,
            attention_heads=2,
            linear_units=512,
            num_blocks=4,
            tp_blocks=1,
            vocab_size=len(WORDS) + 1,
        ),
        adaptor=AdaptorConfig(
            input_size=128, hidden_size=128, output_size=128, num_layers=1, num_heads=2, ffn_size=256
        ),
        decoder=DecoderConfig(
            vocab_size=words,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            rope_theta=10000.0,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        ),
        prompt=PromptConfig(profile="raw", profiles=("raw",), query_frames="keep"),
        # Digits repeat: a repetition penalty or an n-gram ban would change what was said.
        generation=GenerationConfig(
            stop_token_ids=(END_ID, SPECIALS.index("<|im_end|>")), repetition_penalty=1.0, no_repeat_ngram=0
        ),
        ctc_symbols=tuple(ctc_symbols()),
    )


def write_model(directory: Path, config: ModelConfig, model: SpeechModel) -> None:
    """Write a model directory: configuration, weights, tokenizer, checksums.

    Everything is written aside first and then moved in file by file, checksums last, so that a run that is killed
    never leaves a file cut short.

    Args:
        directory: Made if missing; files of an earlier run are replaced, others kept.
        config: The model's configuration.
        model: The trained model.

    Raises:
        CheckpointError: If the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".partial-") as scratch:
        tokenizer = Path(scratch) / TOKENIZER_FILE
        tokenizer.write_text(tokenizer_json(), encoding="utf-8")
        made = Path(scratch) / "model"
        save_model(made, model, config, tokenizer)
        for file in sorted(made.iterdir(), key=lambda path: path.name == CHECKSUMS_FILE):
            os.replace(file, directory / file.name)
