# mypy: disable-error-code="import-not-found,import-untyped,misc,no-any-return,attr-defined,untyped-decorator"
"""The original code, wrapped just enough to be asked for one stage at a time.

Everything here runs torch, funasr and transformers, and nothing of this project:
`make_golden.py` and `full_size_parity.py` record what it answers. The adaptor has
no published module of its own (its checkpoint is the state of the class below);
all other stages are the upstream classes, untouched.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

torch.set_num_threads(int(os.environ.get("REFERENCE_THREADS", "2")))
# The fused encoder-layer path is an optimisation of the same maths that returns zeros at padded rows.
torch.backends.mha.set_fastpath_enabled(False)
logging.disable(logging.WARNING)

with contextlib.redirect_stdout(io.StringIO()):  # funasr announces every optional package that it misses
    from funasr.frontends.wav_frontend import WavFrontend, apply_lfr, load_cmvn
    from funasr.models.sense_voice.model import SenseVoiceSmall
    from transformers import Qwen3Config, Qwen3ForCausalLM

__all__ = [
    "Adaptor",
    "apply_lfr",
    "build_decoder",
    "build_encoder",
    "decoder_config",
    "encode",
    "frontend",
    "generate",
    "load_cmvn",
    "randomise",
    "recorded",
    "run_frontend",
    "versions",
]

PACKAGES = ("torch", "funasr", "kaldi-native-fbank", "transformers", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the version of every package that took part."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@torch.no_grad()
def randomise(module: nn.Module, seed: int, *, gain: float = 1.0, embedding: float = 0.3) -> None:
    """Fill every parameter, norms and biases included, from one seeded stream.

    `nn.TransformerEncoder` deep-copies its layer, so the library's own initialisation would leave all layers alike
    and their order untested; norms start at one and biases at zero, which hides a dropped one.

    Args:
        module: What to fill, in place.
        seed: Seed of the stream.
        gain: Scale of the matrices over 1/sqrt(fan in).
        embedding: Standard deviation of embedding rows.
    """
    stream = torch.Generator().manual_seed(seed)
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=stream, dtype=torch.float32)
        if id(parameter) in embeddings:
            value = embedding * noise
        elif parameter.ndim >= 2:
            value = noise * (gain / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = 1.0 + 0.2 * noise
        parameter.copy_(value)


@contextlib.contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Record the last output of each module by its name while the block runs."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs[name] = first.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def frontend(mvn: bytes | None = None, *, lfr: bool = True, upscale: bool = True) -> Any:
    """Return funasr's front end without dither, with the statistics of an am.mvn text if one is given."""
    options: dict[str, Any] = dict(fs=16000, window="hamming", n_mels=80, frame_length=25, frame_shift=10, dither=0.0)
    options["lfr_m"], options["lfr_n"] = (7, 6) if lfr else (1, 1)
    if mvn is None:
        return WavFrontend(upsacle_samples=upscale, **options)
    with tempfile.NamedTemporaryFile(suffix=".mvn") as handle:
        handle.write(mvn)
        handle.flush()
        return WavFrontend(cmvn_file=handle.name, upsacle_samples=upscale, **options)


@torch.no_grad()
def run_frontend(front: Any, samples: np.ndarray) -> torch.Tensor:
    """Run one recording (N,) through a front end; returns (rows, width)."""
    features, _ = front(torch.from_numpy(samples)[None], torch.tensor([samples.shape[0]]))
    return features[0]


def build_encoder(config: dict[str, Any]) -> Any:
    """Return an evaluation-mode SenseVoiceSmall for a configuration in this project's names."""
    model = SenseVoiceSmall(
        encoder="SenseVoiceEncoderSmall",
        encoder_conf=dict(
            output_size=config["output_size"],
            attention_heads=config["attention_heads"],
            linear_units=config["linear_units"],
            num_blocks=config["num_blocks"],
            tp_blocks=config["tp_blocks"],
            kernel_size=config["kernel_size"],
            sanm_shfit=config["sanm_shift"],
            dropout_rate=0.1,
            positional_dropout_rate=0.1,
            attention_dropout_rate=0.1,
            input_layer="pe",
            selfattention_layer_type="sanm",
            normalize_before=True,
        ),
        input_size=config["input_size"],
        vocab_size=config["vocab_size"],
        length_normalized_loss=True,
    )
    return model.eval()


class _Pieces:
    """Stands in for the sentencepiece model, whose text nobody reads here."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@torch.no_grad()
def encode(
    model: Any, features: torch.Tensor, lengths: Sequence[int], *, language: str = "auto", use_itn: bool = False
) -> torch.Tensor:
    """Run SenseVoiceSmall.inference on features and return what its encoder gave, query frames first.

    Taking the output with a hook is how the 4B system's own inference reads it.

    Args:
        model: From `build_encoder`.
        features: (B, L, F).
        lengths: Rows of each item that are real.
        language: A key of the model's language table.
        use_itn: Ask for inverse text normalisation.

    Returns:
        (B, L + 4, D).
    """
    with recorded({"encoder": model.encoder}) as outputs:
        model.inference(
            features.clone(),
            torch.tensor(lengths),
            key=[str(i) for i in range(len(lengths))],
            tokenizer=_Pieces(),
            data_type="fbank",
            device="cpu",
            language=language,
            use_itn=use_itn,
        )
    return outputs["encoder"]


class Adaptor(nn.Module):
    """The adaptor of the 4B system: torch's post-norm transformer encoder between two projections."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int,
        num_heads: int,
        ffn_size: int,
        norm_eps: float = 1e-5,
    ) -> None:
        """Build the module with the tensor names of the published file."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, ffn_size, dropout=0.1, activation="gelu", layer_norm_eps=norm_eps, batch_first=True
        )
        self.input_proj = nn.Linear(input_size, hidden_size)
        self.transformer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.output_proj = nn.Linear(hidden_size, output_size)
        self.norm = nn.LayerNorm(output_size, eps=norm_eps)
        self.eval()

    def forward(self, states: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Map encoder rows (B, R, D) to decoder rows (B, R, H); `padding` (B, R) is True where a row is no row."""
        hidden = self.transformer(self.input_proj(states), src_key_padding_mask=padding)
        return self.norm(self.output_proj(hidden))


def decoder_config(config: dict[str, Any], **changes: Any) -> Any:
    """Return transformers' configuration for one in Hugging Face names."""
    settings = {"attention_bias": False, "use_sliding_window": False, "attention_dropout": 0.0, **config, **changes}
    theta = settings.pop("rope_theta")
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return Qwen3Config(attn_implementation="eager", bos_token_id=None, eos_token_id=None, pad_token_id=None, **settings)


def build_decoder(config: dict[str, Any]) -> Any:
    """Return an evaluation-mode Qwen3ForCausalLM."""
    return Qwen3ForCausalLM(decoder_config(config)).eval()


@torch.no_grad()
def generate(
    model: Any,
    inputs_embeds: torch.Tensor | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    max_tokens: int,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    stop: Sequence[int] = (),
) -> tuple[list[int], float]:
    """Run transformers' greedy generate.

    Args:
        model: From `build_decoder`.
        inputs_embeds: (1, S, H), or None to give `input_ids` (1, S).
        input_ids: Token prompt; the processors then see it too, unlike with embeddings.
        max_tokens: Cap on new tokens.
        repetition_penalty: 1 turns it off.
        no_repeat_ngram: 0 turns it off.
        stop: Ids that end the sequence.

    Returns:
        The new ids, and the smallest distance over all steps between the chosen score and the next one.
    """
    name, rows = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if rows is None:
        raise ValueError("[generate] one of inputs_embeds and input_ids is needed but got neither")
    result = model.generate(
        **{name: rows},
        attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = result.sequences[0].tolist()
    if inputs_embeds is None:
        ids = ids[rows.shape[1] :]
    best = torch.stack(result.scores)[:, 0].topk(2, dim=-1).values
    return ids, float((best[:, 0] - best[:, 1]).min())
