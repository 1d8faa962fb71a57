"""What a model needs of memory, told before it is loaded: weights, key and value cache, workspace.

Everything follows from the configuration. Weights are counted tensor by tensor, so they are exact. The workspace is a
number of arrays of each stage's widest shapes that live at the same time; how many was measured (tools/soak.py shows
how) and rounded up. A stage's workspace is free again when the next begins, so the largest counts.
Shapes: B batch, R audio rows, S prompt rows, C rows of a prefill pass, H heads, V symbols or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import mlx.nn as nn

from .adaptor import AdaptorConfig
from .cache import KVCache
from .config import ModelConfig
from .decoder import DecoderConfig
from .encoder import EncoderConfig
from .errors import ConfigError
from .fastconformer import FastConformerConfig
from .features import FrontendConfig, frame_count
from .generate import GenerationOptions
from .machine import Machine
from .mel import MelConfig
from .model import SpeechModel
from .nano_adaptor import NanoAdaptorConfig
from .quantization import UNPACKED
from .weights.recipes import PARTS, quantized_config, read_recipe, stored_bytes

PROGRAM_BYTES = 300_000_000
"""The interpreter, libraries, the BLAS's buffers, and what allocators keep for themselves; measured: 70 to 290 MB."""

_WITH_CACHE = ("prefill", "decode")
_FLOAT = 4
_PROMPT_ROWS = 64  # text around the audio: the longest profile has 40
# Arrays of a stage's widest shape that live at once.
_FRONTEND_ARRAYS = 8
_LAYER_ARRAYS = 12
_SCORE_ARRAYS = 4
_PREFILL_ARRAYS = 8
_PREFILL_SCORES = 3
_LOGIT_ARRAYS = 8
_CTC_ARRAYS = 4
_UNPACKED_ARRAYS = 3
_IMAGE_ARRAYS = 4  # of the strided convolutions' input, unfolded windows included

# Quantisations that are advised: the recipe, and bits for other parts.
_FORMS: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("8", {}),
    ("6", {}),
    ("4", {}),
    ("4", {"encoder": 8, "adaptor": 8}),
    ("4", {"encoder": 4, "adaptor": 4}),
)


@dataclass(frozen=True)
class Work:
    """What is to be done at once.

    Args:
        seconds: Length of a window.
        batch: Windows that are worked on together.
        max_tokens: Budget of a window; None is the model's own for this length.
    """

    seconds: float = 30.0
    batch: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"[Work] seconds must be positive but got {self.seconds}")
        for name in ("batch", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"[Work] {name} must be at least 1 but got {value}")


@dataclass(frozen=True)
class Plan:
    """The bytes that a model takes.

    Args:
        name: The model's.
        dtype: The decoder's.
        weights: Part -> bytes.
        cache: Keys and values of all layers.
        workspace: Stage -> bytes while it runs.
        reserve: Freed buffers that MLX keeps for the next use.
    """

    name: str
    dtype: str
    weights: Mapping[str, int]
    cache: int = 0
    workspace: Mapping[str, int] = field(default_factory=dict)
    reserve: int = 0

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())

    @property
    def work_bytes(self) -> int:
        """Cache and workspace of the stage that needs most."""
        return max((size + self.cache * (stage in _WITH_CACHE) for stage, size in self.workspace.items()), default=0)

    @property
    def peak(self) -> int:
        """The most that arrays take at any time, as `mx.get_peak_memory` counts."""
        return self.weight_bytes + self.work_bytes

    @property
    def total(self) -> int:
        """What the process takes: the arrays, buffers kept for the next use, and the program itself."""
        return self.peak + self.reserve + PROGRAM_BYTES


def plan_memory(config: ModelConfig, dtype: str, work: Work | None = None, *, reserve: int = 0) -> Plan:
    """Add up what a model takes.

    Args:
        config: The model's.
        dtype: The decoder's type, ``float32`` or ``bfloat16``.
        work: What is to be done at once; one window of 30 s by default.
        reserve: Limit of MLX's cache of buffers.
    """
    work = work or Work()
    frames, rows = _rows(config, work.seconds)
    stages = {"features": _frontend(config, frames), "encoder": work.batch * _encoder(config, frames, rows)}
    if config.ctc_size:
        stages["ctc"] = work.batch * _ctc(config, rows)
    cache = 0
    if config.decoder is not None:
        kept = rows - config.dropped_rows
        stages["adaptor"] = work.batch * _adaptor(config, kept)
        if isinstance(config.adaptor, NanoAdaptorConfig):
            kept = config.adaptor.rows_kept(kept)
        prompt = kept + _PROMPT_ROWS
        budget = work.max_tokens or config.generation.token_budget(work.seconds)
        width = 2 if dtype == "bfloat16" else _FLOAT
        step = KVCache().step
        cache = work.batch * cache_bytes(config.decoder, -(-(prompt + budget) // step) * step, width)
        cache += cache_bytes(config.decoder, _PROMPT_ROWS, width)  # the text before the audio is kept for the next
        stages["prefill"] = work.batch * _prefill(config.decoder, prompt, width)
        stages["decode"] = work.batch * _LOGIT_ARRAYS * config.decoder.vocab_size * _FLOAT
    if dtype == "float32":  # on a GPU codes are multiplied as they are
        for stage, size in _unpacked(config).items():
            stages[stage] += size
    return Plan(config.name, dtype, stored_bytes(config, decoder_dtype=dtype), cache, stages, reserve)


def cache_bytes(config: DecoderConfig, positions: int, width: int) -> int:
    """Return the bytes of keys and values of all layers, in a type of `width` bytes."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions * width


def _rows(config: ModelConfig, seconds: float) -> tuple[int, int]:
    """Return the 10-ms frames of a window, and the encoder's rows R with its query frames."""
    front = config.frontend
    samples = max(int(seconds * front.sample_rate), front.frame_length)
    if isinstance(front, FrontendConfig):
        frames = frame_count(samples, front)
        return frames, -(-frames // front.lfr_n) + config.query_frames
    frames = max(front.frames(samples), 1)
    rows = config.encoder.rows(frames) if isinstance(config.encoder, FastConformerConfig) else frames
    return frames, rows


def _frontend(config: ModelConfig, frames: int) -> int:
    front = config.frontend
    fft = front.fft_size if isinstance(front, MelConfig) else 1 << (front.frame_length - 1).bit_length()
    return _FRONTEND_ARRAYS * frames * max(front.frame_length, fft + 2) * _FLOAT


def _layers(rows: int, widest: int, heads: int) -> int:
    """Return the workspace of transformer layers over `rows` whose scores are written out, as MLX does on a CPU."""
    return _FLOAT * (_LAYER_ARRAYS * rows * widest + _SCORE_ARRAYS * heads * rows * rows)


def _encoder(config: ModelConfig, frames: int, rows: int) -> int:
    encoder = config.encoder
    if isinstance(encoder, EncoderConfig):
        widest = max(encoder.linear_units, 3 * encoder.output_size, encoder.input_size)
        return _layers(rows, widest, encoder.attention_heads)
    # After the first convolution: half the frames, half the bins, all channels. Relative scores are twice as wide.
    image = -(-frames // 2) * -(-encoder.input_size // 2) * encoder.subsampling_channels
    widest = max(encoder.linear_units, 3 * encoder.output_size)
    return max(_IMAGE_ARRAYS * image * _FLOAT, _layers(rows, widest, 2 * encoder.attention_heads))


def _adaptor(config: ModelConfig, rows: int) -> int:
    adaptor = config.adaptor
    if isinstance(adaptor, AdaptorConfig):
        return _layers(rows, max(adaptor.ffn_size, 3 * adaptor.hidden_size, adaptor.output_size), adaptor.num_heads)
    if isinstance(adaptor, NanoAdaptorConfig):
        return _layers(rows, max(adaptor.hidden_size, 3 * adaptor.output_size, adaptor.ffn_size), adaptor.num_heads)
    return 2 * rows * config.decoder.hidden_size * _FLOAT if config.decoder is not None else 0


def _ctc(config: ModelConfig, rows: int) -> int:
    scores = _CTC_ARRAYS * rows * config.ctc_size * _FLOAT
    if config.ctc is None:
        return scores
    branch = config.ctc.transformer
    return max(scores, _layers(rows, max(branch.hidden_size, 3 * branch.output_size), branch.num_heads))


def _prefill(config: DecoderConfig, rows: int, width: int) -> int:
    chunk = min(rows, GenerationOptions(1, (0,)).prefill_chunk)
    heads = config.num_attention_heads
    widest = max(config.intermediate_size, (heads + 2 * config.num_key_value_heads) * config.head_dim)
    layer = _PREFILL_ARRAYS * chunk * widest + _PREFILL_SCORES * heads * chunk * rows
    return width * (layer + rows * config.hidden_size)


def _unpacked(config: ModelConfig) -> dict[str, int]:
    """Return the workspace of stages' largest quantised matrix times many rows; see `UnpackingLinear`."""
    most: dict[str, int] = {}
    for path, module in SpeechModel(config).named_modules():  # lazy arrays: nothing is computed
        if type(module) is not nn.QuantizedLinear or module.mode != "affine":
            continue
        part, name = PARTS[path.partition(".")[0]], path.rpartition(".")[2]
        # Steps of drafts and batches have many rows as well; of a prompt only the last has scores.
        stages = (part,) if part != "decoder" else ("decode",) if name == "lm_head" else _WITH_CACHE
        for stage in stages:
            most[stage] = max(most.get(stage, 0), min(UNPACKED, prod(module.scales.shape) * module.group_size))
    return {stage: _UNPACKED_ARRAYS * count * _FLOAT for stage, count in most.items()}


def dense(config: ModelConfig) -> ModelConfig:
    """Return the configuration of the same model with nothing quantised."""
    decoder = None if config.decoder is None else replace(config.decoder, quantization=None)
    return replace(config, decoder=decoder, quantized_stages={})


def smaller_forms(config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yield the advised quantisations of a model, the one that loses least first.

    Yields:
        The options of ``qwen4b-asr convert`` that make it, and its configuration.
    """
    config, seen = dense(config), set()
    have = {"encoder": config.encoder, "adaptor": config.adaptor}
    for recipe, bits in _FORMS:
        name = recipe if config.decoder is not None else None
        parts = {part: count for part, count in bits.items() if have[part] is not None}
        options = [f"--quantize {name}"] if name else []
        options += [f"--quantize-{part} {count}" for part, count in parts.items()]
        words = " ".join(options)
        if not words or words in seen:
            continue
        seen.add(words)
        try:
            yield words, quantized_config(config, read_recipe(name, **parts))
        except ConfigError:  # a part that is too small for any group
            continue


def advise(config: ModelConfig, plan: Plan, limit: int, work: Work | None = None, *, model: str = "MODEL") -> str:
    """Say which quantisation of a model fits into so many bytes, and how to make it."""
    totals = []
    for options, form in smaller_forms(config):
        small = plan_memory(form, plan.dtype, work, reserve=plan.reserve)
        if small.weight_bytes >= plan.weight_bytes:  # it is quantised further already
            continue
        if small.total <= limit:
            source = model if config == dense(config) else "WHAT_IT_WAS_MADE_FROM"
            return (
                f"with {options} it needs {size_text(small.total)}: "
                f"qwen4b-asr convert --checkpoint {source} {options} --output SMALLER"
            )
        totals.append(small.total)
    if not totals:
        return "no quantisation makes it smaller"
    return f"no quantisation fits: the smallest needs {size_text(min(totals))}"


def require_room(
    config: ModelConfig,
    plan: Plan,
    machine: Machine,
    limit: int | None = None,
    *,
    work: Work | None = None,
    model: str = "MODEL",
) -> str | None:
    """Make sure that a model fits.

    Args:
        config: The model's.
        plan: What it takes.
        machine: What there is.
        limit: What it may take; without it the machine's memory counts.
        work: What `plan` was made for.
        model: What the user calls the model, for the command that is advised.

    Returns:
        A warning where the machine has the memory but not to spare; None if all is well.

    Raises:
        ConfigError: If it needs more than the limit or, without one, more than the machine has.
    """
    most = machine.total if limit is None else limit
    parts = f"weights {size_text(plan.weight_bytes)}, at work {size_text(plan.total - plan.weight_bytes)}"
    needs = f"{plan.name}: needs {size_text(plan.total)} of memory ({parts})"
    if most is not None and plan.total > most:
        whose = "this machine has" if limit is None else "the limit is"
        raise ConfigError(
            f"{needs}, but {whose} {size_text(most)}; {advise(config, plan, most, work, model=model)}"
            + ("; --memory-limit tries all the same" if limit is None else "")
        )
    usable = machine.usable
    if limit is None and usable is not None and plan.total > usable:
        return (
            f"{needs}, but this machine has only {size_text(usable)} for it and may slow down or stop the program; "
            f"{advise(config, plan, usable, work, model=model)}"
        )
    return None


def size_text(count: int) -> str:
    """Write a number of bytes for a person, in powers of 1000: ``8.04 GB``, ``936 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"
