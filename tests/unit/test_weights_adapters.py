"""Adapters in files: PEFT directories, adapters within a checkpoint, and what is wrong with some of them."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.lora import LoraConfig, fuse_lora, lora_layers
from qwen4b_asr.quantization import Quantization, Scheme, quantize_modules
from qwen4b_asr.weights.adapters import checkpoint_adapter, load_adapter, lora_config, merged_tensors, read_adapter
from qwen4b_asr.weights.safetensors_file import OutgoingTensor, read_safetensors, write_safetensors
from qwen4b_asr.weights.tensors import dtype_name
from tests.helpers.tiny import CONFIG, randomise
from tests.helpers.weights_parts import write_pt

SIZES = CONFIG.decoder
VALUES = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
LORA = LoraConfig(3, 6, ("q_proj", "v_proj"))
ROOT = "base_model.model."
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def on_the_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def adapted(seed: int = 1) -> Qwen3:
    """A decoder with an adapter beside its layers, noise everywhere."""
    return randomise(Qwen3(replace(SIZES, lora=LORA)), seed)


def factors(model: Qwen3) -> dict[str, mx.array]:
    """The adapter's tensors as PEFT writes them."""
    flat = tree_flatten(model.parameters())
    return {ROOT + n.replace(".default", ""): a for n, a in flat if ".lora_" in n}


def write_adapter(folder: Path, tensors: dict[str, mx.array], suffix: str = ".safetensors", **changes) -> Path:
    folder.mkdir(exist_ok=True)
    values = {key: value for key, value in {**VALUES, **changes}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    if suffix == ".safetensors":
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    else:
        write_pt(folder / "adapter_model.bin", tensors)
    return folder


def base_of(model: Qwen3) -> Qwen3:
    """The same decoder without the adapter."""
    plain = Qwen3(SIZES)
    flat = {n.replace(".base_layer", ""): a for n, a in tree_flatten(model.parameters()) if ".lora_" not in n}
    plain.load_weights(list(flat.items()), strict=True)
    return plain


def run(model: Qwen3) -> np.ndarray:
    return np.array(model(model.embed(mx.array([[3, 1, 4, 1, 5]]))))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("headless", [False, True])
def test_a_peft_directory_is_put_beside_the_layers(tmp_path, suffix, headless):
    model = adapted()
    tensors = factors(model)
    if headless:  # as trained on the model without its head
        tensors = {n.replace(f"{ROOT}model.", ROOT): a for n, a in tensors.items()}
    plain = base_of(model)
    adapter = load_adapter(plain, write_adapter(tmp_path / "a", tensors, suffix), strength=1.0)
    assert adapter.config == LORA
    assert len(adapter.factors) == len(lora_layers(plain)) == 4
    assert np.array_equal(run(plain), run(model))
    # Once more under the same name replaces it; under another it adds.
    load_adapter(plain, tmp_path / "a", strength=0.5)
    load_adapter(plain, tmp_path / "a", name="again", strength=0.5)
    assert np.allclose(run(plain), run(model), atol=1e-4)


def test_the_factors_take_the_models_type(tmp_path):
    model = adapted()
    folder = write_adapter(tmp_path / "a", factors(model))
    plain = base_of(model)
    plain.set_dtype(mx.bfloat16)
    load_adapter(plain, folder)
    load_adapter(plain, folder, name="again")
    assert {a.weight.dtype for a in lora_layers(plain)[Q].lora_A.values()} == {mx.bfloat16}
    sizes = replace(SIZES, hidden_size=32, intermediate_size=64, lora=LORA)
    model = randomise(Qwen3(sizes), 2)
    folder = write_adapter(tmp_path / "b", factors(model))
    quantised = Qwen3(replace(sizes, lora=None))
    quantised.set_dtype(mx.bfloat16)
    quantize_modules(quantised, Quantization(Scheme(32, 8)))
    load_adapter(quantised, folder)
    assert lora_layers(quantised)[Q].lora_A["default"].weight.dtype == mx.bfloat16
    assert quantised(quantised.embed(mx.array([[1, 2]]))).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA' but is 'IA3'"),
        ({"use_dora": True, "bias": "all"}, "only plain LoRA can be loaded.*use_dora = True, bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changed the base weights"),
        ({"lora_alpha": None}, "lora_alpha must be given; without"),
        ({"r": 0}, "rank of 'rank' must be an integer of at least 1 but got 0"),
        ({"r": True}, "rank of 'rank'"),
        ({"lora_alpha": "6"}, "alpha of 'alpha' must be a finite number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank of 'q_proj'"),
        ({"alpha_pattern": {"q_(": 2}}, r"patterns must be regular expressions but got 'q_\('"),
        ({"rank_pattern": [1]}, "adapter_config.json"),
        ({"rank_pattern": {"1.self_attn.q_proj": 4}}, rf"give '{Q}' rank 4, but its factors are A \[3, 24\]"),
    ],
)
def test_settings_that_are_not_plain_lora_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_adapter(write_adapter(tmp_path / "a", factors(adapted()), **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ROOT}{Q}.lora_B.weight": None}, f"{Q}' has lora_A only"),
        ({f"{ROOT}{Q}.lora_magnitude_vector": mx.ones((32,))}, "lora_magnitude_vector' is no part of plain LoRA"),
        ({f"{ROOT}model.embed_tokens.lora_embedding_A": mx.ones((3, 4))}, "lora_embedding_A' is no part"),
        ({f"{ROOT}{Q}.weight": mx.ones((3, 4))}, r"q_proj\.weight' is no part"),
        ({f"{ROOT}{Q}.lora_A.weight": mx.ones((3,))}, "must be a floating-point matrix, not F32"),
        ({f"{ROOT}{Q}.lora_A.weight": mx.ones((3, 24), dtype=mx.uint32)}, "must be a floating-point matrix, not U32"),
        ({f"{ROOT}{Q}.lora_A.weight": mx.ones((4, 24))}, r"rank 3, but its factors are A \[4, 24\] and B \[32, 3\]"),
        ({f"{ROOT}{Q}.lora_{x}.b.weight": mx.ones((3, 3)) for x in "AB"}, r"must hold one adapter.*\['b', 'default'\]"),
    ],
)
def test_tensors_that_are_not_plain_lora_are_named(tmp_path, change, message):
    tensors = {n: a for n, a in {**factors(adapted()), **change}.items() if a is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(write_adapter(tmp_path / "a", tensors))
    assert "adapter_model.safetensors" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing; this is not a PEFT adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(VALUES))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors or adapter_model\.bin"):
        read_adapter(tmp_path)
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), {})
    with pytest.raises(CheckpointError, match="must hold one adapter but holds none"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_leaves_this_one_as_it_is(tmp_path):
    other = randomise(Qwen3(replace(SIZES, num_hidden_layers=3, num_key_value_heads=4, lora=LORA)), 1)
    folder = write_adapter(tmp_path / "a", factors(other))
    model = base_of(adapted())
    before = run(model)
    with pytest.raises(CheckpointError, match="is not an adapter of this model") as caught:
        load_adapter(model, folder)
    assert "model.layers.2.self_attn.q_proj is no layer" in str(caught.value)
    assert "model.layers.0.self_attn.v_proj [16, 24] at rank 3 has A [3, 24] and B [32, 3]" in str(caught.value)
    assert not lora_layers(model)
    assert np.array_equal(run(model), before)


# A checkpoint that holds base weights and adapter together, under a prefix, beside other parts.


def write_checkpoint(folder: Path, model: Qwen3, change: dict[str, mx.array | None] | None = None, dtype=mx.float32):
    flat = {f"llm.{ROOT}{n}": a.astype(dtype) for n, a in tree_flatten(model.parameters())}
    flat |= {"perception.encoder.layers.0.q_proj.weight": mx.ones((4, 4)), **(change or {})}
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), {n: a for n, a in flat.items() if a is not None})
    return read_safetensors(path)


def test_an_adapter_within_a_checkpoint_is_kept_apart(tmp_path):
    refs = write_checkpoint(tmp_path, adapted())
    config = checkpoint_adapter(refs, VALUES, file="f")
    assert config == LORA
    plain = {n: ref for n, ref in refs.items() if ".lora_" not in n and ".base_layer" not in n}
    assert checkpoint_adapter(plain, VALUES, file="f") is None


def test_targets_are_spelled_out_where_a_layer_lacks_the_adapter(tmp_path):
    change: dict[str, mx.array | None] = {f"llm.{ROOT}{Q}.lora_{x}.default.weight": None for x in "AB"}
    change |= {f"llm.{ROOT}{Q}.base_layer.weight": None, f"llm.{ROOT}{Q}.weight": mx.ones((32, 24))}
    config = checkpoint_adapter(write_checkpoint(tmp_path, adapted(), change), VALUES, file="f")
    assert config is not None
    assert config.target_modules == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    )
    assert set(lora_layers(Qwen3(replace(SIZES, lora=config)))) == set(config.target_modules)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_merging_while_reading_equals_merging_in_memory(tmp_path, dtype, block):
    model = adapted()
    bias = {f"llm.{ROOT}{Q}.base_layer.bias": mx.ones((32,))}
    refs = write_checkpoint(tmp_path, model, bias, dtype=dtype)
    merged = merged_tensors(refs, VALUES, file="f")
    assert merged.pop(f"llm.{ROOT}{Q}.bias").shape == (32,)
    model.set_dtype(dtype)
    fuse_lora(model)
    wanted = {f"llm.{ROOT}{n}": a for n, a in tree_flatten(model.parameters())}
    assert merged.keys() == wanted.keys() | {"perception.encoder.layers.0.q_proj.weight"}
    for name, array in wanted.items():
        ref = merged[name]
        assert (ref.shape, ref.dtype) == (array.shape, dtype_name(dtype))
        whole = mx.concatenate(list(ref.blocks(block))).reshape(ref.shape).astype(dtype)
        assert float(mx.abs(whole - array).max()) <= (1e-6 if dtype == mx.float32 else 0.0), name
        assert mx.array_equal(ref.read().astype(dtype), whole)


def test_a_merged_tensor_can_be_written(tmp_path):
    model = adapted()
    merged = merged_tensors(write_checkpoint(tmp_path, model), VALUES, file="f")
    (tmp_path / "out").mkdir()
    outgoing = [OutgoingTensor(n, ref.shape, "F32", ref.blocks) for n, ref in merged.items()]
    write_safetensors(tmp_path / "out", outgoing)
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    fuse_lora(model)
    for name, array in tree_flatten(model.parameters()):
        assert np.allclose(np.array(written[f"llm.{ROOT}{name}"]), np.array(array), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.base_layer.weight": None}, "the tensor '.base_layer.weight' of .*q_proj' is missing"),
        ({f"{Q}.lora_{x}.default.weight": None for x in "AB"}, "the adapter of .*q_proj' is missing"),
        ({f"{Q}.lora_A.default.weight": None}, "q_proj' has lora_B only"),
        ({f"{Q}.lora_{x}.b.weight": mx.ones((3, 3)) for x in "AB"}, "must hold one adapter but holds b, default"),
        ({f"{Q}.lora_B.default.weight": mx.ones((32, 2))}, "rank 3, but its factors"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, change, message):
    refs = write_checkpoint(tmp_path, adapted(), {f"llm.{ROOT}{n}": a for n, a in change.items()})
    for read in (checkpoint_adapter, merged_tensors):
        with pytest.raises(CheckpointError, match=message):
            read(refs, VALUES, file="f")


def test_merging_refuses_what_it_cannot_do(tmp_path):
    name = f"llm.{ROOT}{Q}.base_layer.weight"
    refs = write_checkpoint(tmp_path, adapted(), {name: mx.ones((32, 6), dtype=mx.uint32)})
    with pytest.raises(CheckpointError, match="cannot be merged into quantised weights; keep it apart"):
        merged_tensors(refs, VALUES, file="f")
    refs = write_checkpoint(tmp_path, adapted(), {name: mx.ones((32, 25))})
    with pytest.raises(CheckpointError, match=r"does not fit its adapter: \[32, 25\], A \[3, 24\] and B \[32, 3\]"):
        merged_tensors(refs, VALUES, file="f")


def test_a_regular_expression_for_targets_is_left_to_the_tensors():
    assert lora_config({**VALUES, "target_modules": ".*proj"}, file="f").target_modules == ()
