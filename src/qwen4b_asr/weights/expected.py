"""The configuration that a published model will have once it is converted, from the catalog alone.

Encoders and adaptors have the sizes that are their configurations' defaults; a language model has its manifest's.
"""

from __future__ import annotations

from ..config import GenerationConfig, ModelConfig
from ..decoder import DecoderConfig
from ..encoder import EncoderConfig
from ..errors import ConfigError
from ..fastconformer import FastConformerConfig
from ..features import FrontendConfig
from ..lora import LoraConfig
from ..mel import MelConfig
from ..nano_adaptor import NanoAdaptorConfig, NanoCtcConfig
from ..nano_prompt import NanoPromptConfig
from ..projection import ProjectionConfig
from ..prompt import PromptConfig
from .catalog import KnownModel
from .manifest import load_manifest

_MIN_TOKENS = 128  # of Canary-Qwen's authors


def expected_config(known: KnownModel) -> ModelConfig:
    """Return the configuration of a model of the catalog; Fun-ASR-Nano's with its CTC branch, which not all files have.

    Raises:
        ConfigError: If it is no recogniser, or its manifest is damaged.
    """
    if known.recipe == "funasr-qwen4b":
        manifest = known.parts["llm"].manifest
        assert manifest is not None  # the catalog's test sees to it
        return ModelConfig(name=known.name, decoder=_decoder(manifest))
    if known.recipe == "sensevoice":
        return ModelConfig(name=known.name, adaptor=None, decoder=None, prompt=None)
    if known.recipe == "fun-asr-nano":
        return ModelConfig(
            name=known.name,
            frontend=FrontendConfig(cmvn=False),
            encoder=EncoderConfig(num_queries=0, vocab_size=0),
            adaptor=NanoAdaptorConfig(),
            decoder=_decoder("qwen3-0.6b"),
            ctc=NanoCtcConfig(),
            prompt=NanoPromptConfig(),
        )
    if known.recipe == "canary-qwen":
        told = load_manifest("canary-qwen-2.5b").config
        lora = LoraConfig(told["lora_r"], told["lora_alpha"], tuple(told["lora_modules"]))
        return ModelConfig(
            name=known.name,
            frontend=MelConfig(),
            encoder=FastConformerConfig(),
            adaptor=ProjectionConfig(),
            decoder=_decoder(told["decoder"], lora),
            prompt=PromptConfig(profile="canary", profiles=("canary",)),
            generation=GenerationConfig(min_tokens=_MIN_TOKENS),
        )
    raise ConfigError(f"{known.name}: a language model, no recogniser; it can be a part of one")


def _decoder(manifest: str, lora: LoraConfig | None = None) -> DecoderConfig:
    values = load_manifest(manifest).config
    config = DecoderConfig.from_huggingface(values)
    return DecoderConfig(**{**vars(config), "lora": lora})
