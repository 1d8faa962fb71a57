"""The three parts of a tiny model as users have them on disk, in any of the known namings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen4b_asr.config import ModelConfig
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.weights.load import parameter_shapes
from qwen4b_asr.weights.tensors import dtype_name
from tests.helpers.tiny import CONFIG, byte_tokenizer
from tests.helpers.weights_torch_writer import write_dense

Arrays = dict[str, mx.array]
NAMINGS = ("torch", "split", "split_ffn", "split_bare", "blocks", "blocks_attn")
# 256 bytes and three specials: the ends of text as `byte_tokenizer` numbers them.
PART_CONFIG = replace(CONFIG, name=ModelConfig().name)


def random_parameters(config: ModelConfig = CONFIG, seed: int = 0, scale: float = 1.0) -> Arrays:
    """Values for every parameter of the model, as a converted directory should hold them."""
    shapes = parameter_shapes(SpeechModel(config))
    rng = np.random.default_rng(seed)
    return {name: mx.array(scale * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def encoder_tensors(parameters: Arrays) -> Arrays:
    """SenseVoice's names and layouts: torch keeps a depthwise convolution as (D, 1, K)."""
    inside = {n.removeprefix("audio_encoder."): a for n, a in parameters.items() if n.startswith("audio_encoder.")}
    return {n: a.transpose(0, 2, 1) if n.endswith("fsmn_block.weight") else a for n, a in inside.items()}


def adaptor_tensors(parameters: Arrays, naming: str = "torch") -> Arrays:
    """The adaptor under one of `NAMINGS`."""
    tensors = {n.removeprefix("adaptor."): a for n, a in parameters.items() if n.startswith("adaptor.")}
    if naming == "torch":
        return tensors
    layers, attention, ffn, prefix = {
        "split": ("layers", "", "linear", "adaptor."),
        "split_ffn": ("layers", "", "ffn_linear", ""),
        "split_bare": ("layers", "self_attn.", "linear", ""),
        "blocks": ("adaptor.blocks", "", "linear", ""),
        "blocks_attn": ("blocks", "attn.", "linear", "adaptor."),
    }[naming]
    top = "adaptor." if naming == "blocks" else prefix
    result: Arrays = {}
    for name, array in tensors.items():
        if not name.startswith("transformer.layers."):
            result[top + name] = array
            continue
        number, _, rest = name.removeprefix("transformer.layers.").partition(".")
        start = f"{prefix}{layers}.{number}."
        if rest.startswith("self_attn.in_proj_"):
            kind = rest.removeprefix("self_attn.in_proj_")
            for letter, part in zip("qkv", mx.split(array, 3), strict=True):
                result[f"{start}{attention}{letter}_proj.{kind}"] = part
        elif rest.startswith("self_attn."):
            result[start + attention + rest.removeprefix("self_attn.")] = array
        else:
            result[start + rest.replace("linear", ffn)] = array
    return result


def decoder_tensors(parameters: Arrays) -> Arrays:
    """Qwen3's names."""
    return {n.removeprefix("decoder."): a for n, a in parameters.items() if n.startswith("decoder.")}


def write_pt(path: Path, tensors: Arrays, wrap: tuple[str, ...] = ()) -> Path:
    """Write arrays as a torch file."""
    dense = {
        n: (dtype_name(a.dtype), tuple(a.shape), np.array(mx.contiguous(a).reshape(-1).view(mx.uint8)).tobytes())
        for n, a in tensors.items()
    }
    return write_dense(path, dense, wrap)


def kaldi_text(shift: np.ndarray, scale: np.ndarray) -> str:
    """An am.mvn."""
    blocks = [("AddShift", shift), ("Rescale", scale)]
    n = shift.size
    lines = [f"<{name}> {n} {n}\n<LearnRateCoef> 0 [ {' '.join(repr(float(v)) for v in vs)} ]" for name, vs in blocks]
    return f"<Nnet>\n<Splice> {n} {n}\n[ 0 ]\n" + "\n".join(lines) + "\n</Nnet>\n"


def config_yaml(config: ModelConfig) -> str:
    """FunASR's config.yaml for an encoder, as far as it matters, with things around it that do not."""
    e, f = config.encoder, config.frontend
    return (
        "# made for a test\nencoder: SenseVoiceEncoderSmall\nencoder_conf:\n"
        f"    output_size: {e.output_size}\n    attention_heads: {e.attention_heads}   # heads\n"
        f"    sanm_shfit: {e.sanm_shift}\n\nfrontend: WavFrontend\nfrontend_conf:\n    fs: {f.sample_rate}\n"
        f"    window: hamming\n    n_mels: {f.num_mel_bins}\n    lfr_m: {f.lfr_m}\n    lfr_n: {f.lfr_n}\n"
        "    cmvn_file: null\nspecaug_conf:\n    freq_mask_width_range:\n    - 0\n    - 30\n    attention_heads: 99\n"
    )


@dataclass(frozen=True)
class Parts:
    """Where the parts lie, and what a conversion of them must hold."""

    encoder: Path
    adaptor: Path
    llm: Path
    parameters: Arrays

    def arguments(self, output: Path) -> dict[str, object]:
        """Keyword arguments of ``convert``; the tiny adaptor has other heads than the real one."""
        return {
            "encoder": self.encoder,
            "adaptor": self.adaptor,
            "llm": self.llm,
            "output": output,
            "adaptor_heads": CONFIG.adaptor.num_heads,
        }


def write_parts(
    folder: Path,
    *,
    config: ModelConfig = CONFIG,
    naming: str = "torch",
    adaptor_suffix: str = ".pt",
    llm_dtype: mx.Dtype = mx.float32,
    shards: bool = True,
    lm_head: bool = False,
    seed: int = 0,
    scale: float = 1.0,
) -> Parts:
    """Write the parts of a tiny model with random weights."""
    parameters = random_parameters(config, seed, scale)
    encoder, llm = folder / "sensevoice", folder / "qwen3"
    encoder.mkdir(parents=True)
    llm.mkdir()
    write_pt(encoder / "model.pt", encoder_tensors(parameters), ("state_dict",))
    shift, scale = (np.array(parameters[f"frontend.cmvn_{kind}"]) for kind in ("shift", "scale"))
    (encoder / "am.mvn").write_text(kaldi_text(shift, scale))
    (encoder / "config.yaml").write_text(config_yaml(config))
    adaptor = folder / f"adaptor{adaptor_suffix}"
    tensors = adaptor_tensors(parameters, naming)
    if adaptor_suffix == ".pt":
        write_pt(adaptor, tensors)
    else:
        mx.save_safetensors(str(adaptor), {name: mx.contiguous(array) for name, array in tensors.items()})
    decoder = {name: array.astype(llm_dtype) for name, array in decoder_tensors(parameters).items()}
    if lm_head:
        decoder["lm_head.weight"] = decoder["model.embed_tokens.weight"]
    write_llm(llm, config, decoder, shards)
    return Parts(encoder, adaptor, llm, parameters)


def write_llm(folder: Path, config: ModelConfig, tensors: Arrays, shards: bool) -> None:
    """Write a Hugging Face directory."""
    values = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **asdict(config.decoder)}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "temperature": 0.6}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    if not shards:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        return
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(prod(array.shape) * array.itemsize for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
