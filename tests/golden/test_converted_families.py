"""Whole checkpoints as their users have them: laid out as published, converted, loaded, from sound to ids."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

import qwen4b_asr
from qwen4b_asr.cli.main import main
from qwen4b_asr.recognise import Recogniser
from qwen4b_asr.transcribe import Transcriber
from qwen4b_asr.transcript import Turn
from qwen4b_asr.weights.convert import convert, convert_checkpoint
from qwen4b_asr.weights.verify import verify
from tests.helpers import nano_files

from . import canary, checks, checks_nano
from .support import DATA, golden

Model = Transcriber | Recogniser
SYMBOLS = 29  # of the golden CTC branch, the blank last


def load_converted(source: Path, output: Path, **options: Any) -> Model:
    """Convert a directory, verify the result, load it."""
    convert_checkpoint(source, output, **options)
    verify(output).raise_if_bad()
    return qwen4b_asr.load(output, dtype="float32")


# --- SenseVoiceSmall ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensevoice(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sensevoice")
    data, wanted = golden("sensevoice"), golden("sensevoice").fact("sound")
    source = folder / "published"
    source.mkdir()
    save_file(golden("encoder").weights() | data.weights("sound/"), source / "model.safetensors")
    (source / "am.mvn").write_bytes(golden("features")["source/am_mvn"].tobytes())
    (source / "config.yaml").write_text(f"encoder_conf:\n    attention_heads: {wanted['config']['attention_heads']}\n")
    (source / "chn_jpn_yue_eng_ko_spectok.bpe.model").write_bytes(data["vocabulary/speech"].tobytes())
    return load_converted(source, folder / "model")


@pytest.mark.parametrize("decoder", [None, "ctc"])
def test_sensevoice_writes_what_funasr_does(sensevoice: Model, decoder: str | None) -> None:
    wanted = golden("sensevoice").fact("sound")
    heard: list[str] = []
    found = sensevoice.transcribe(np.asarray(checks.waveform("speech")), decoder=decoder, on_token=heard.append)
    assert list(found.tokens) == wanted["ids"]
    assert f"<|zh|><|NEUTRAL|><|Speech|><|woitn|>{found.text}" == wanted["text"]
    assert (found.language, found.emotion, found.events) == ("zh", "neutral", ("speech",))
    assert "".join(heard) == found.text
    assert [word.text for word in found.words] == wanted["words"]
    assert json.loads(json.dumps(found.to_dict()))["words"][0]["text"] == wanted["words"][0]


# --- Fun-ASR-Nano -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("nano")
    source, llm = folder / "published", folder / "published" / "Qwen3-0.6B"
    llm.mkdir(parents=True)
    data = golden("nano")
    save_file(data.weights(), source / "model.safetensors")
    heads = data.fact("encoder")["attention_heads"]
    (source / "config.yaml").write_text(
        f"audio_encoder_conf:\n    attention_heads: {heads}\nfrontend_conf:\n    n_mels: {data.fact('mel_bins')}\n"
    )
    (llm / "config.json").write_text(json.dumps({"model_type": "qwen3", **data.fact("decoder")}))
    shutil.copy(DATA / "tokenizer.json", llm)
    letters = (base64.b64encode(bytes([ord("a") + place])).decode() for place in range(26))
    (source / "multilingual.tiktoken").write_text(
        "".join(f"{letter} {place}\n" for place, letter in enumerate(letters))
    )
    return load_converted(source, folder / "model")


def test_nano_without_the_text_of_its_symbols_says_so(nano: Model) -> None:
    assert isinstance(nano, Transcriber)
    bare = Transcriber(nano.model, nano.config, nano.tokenizer)
    with pytest.raises(qwen4b_asr.ConfigError, match="nothing says what its symbols read as"):
        bare.transcribe(np.asarray(checks_nano.clip("long")), decoder="ctc")


def ask(case: dict[str, Any]) -> dict[str, Any]:
    """Return the options that ask what a golden case asked."""
    languages = {"中文": "zh", "英文": "en", "日文": "ja"}
    return {
        "language": languages.get(case.get("language", ""), "auto"),
        "hotwords": tuple(case.get("hotwords", ())),
        "use_itn": case.get("itn"),
    }


@pytest.mark.parametrize("name", ["plain", "short", "no_itn", "hotwords"])
def test_nano_writes_what_funasr_does(nano: Model, name: str) -> None:
    case = golden("nano").fact("cases")[name]
    ids = case["ids"]
    stops = [step for step, token in enumerate(ids) if token in nano.config.generation.stop_token_ids]
    found = nano.transcribe(np.asarray(checks_nano.clip(case["clip"])), max_tokens=len(ids), **ask(case))
    assert list(found.tokens) == (ids[: stops[0]] if stops else ids)


@pytest.mark.parametrize("layout", nano_files.LAYOUTS)
def test_every_published_layout_of_nano_becomes_the_same_model(layout: str, tmp_path: Path) -> None:
    models = []
    for place, name in enumerate(("funasr", layout)):
        source = tmp_path / f"published-{place}"
        nano_files.write_nano(source, name)
        models.append(load_converted(source, tmp_path / f"converted-{place}"))
    one, other = (dict(tree_flatten(model.model.parameters())) for model in models)
    shared = one.keys() & other.keys()
    assert shared >= {name for name in one if not name.startswith("ctc.")}
    assert all(mx.array_equal(one[name], other[name]).item() for name in shared)


@pytest.mark.parametrize("branch", [False, True])
def test_a_conversion_says_when_nano_has_no_ctc_branch(
    branch: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nano_files.write_nano(tmp_path / "published", "funasr", ctc=branch)
    arguments = ["convert", "--checkpoint", str(tmp_path / "published"), "--output", str(tmp_path / "model")]
    assert main(arguments) == 0
    assert ("no CTC branch" in capsys.readouterr().err) is not branch


def test_nano_reads_earlier_turns(nano: Model) -> None:
    long, short = (np.asarray(checks_nano.clip(name)) for name in ("long", "short"))
    alone = nano.transcribe(short, max_tokens=8)
    after = nano.transcribe(short, max_tokens=8, history=[Turn(long, "滨海新区")])
    assert alone.tokens != after.tokens


def test_nano_can_give_every_row(nano: Model) -> None:
    long = np.asarray(checks_nano.clip("long"))
    assert isinstance(nano, Transcriber)
    assert (
        nano.transcribe(long, max_tokens=8).tokens != nano.transcribe(long, max_tokens=8, low_frame_rate=False).tokens
    )


def test_nano_spells_its_ctc_symbols(nano: Model) -> None:
    wanted = golden("nano")["long/ctc_logits"].argmax(axis=-1)
    collapsed = [int(b) for a, b in zip([-1, *wanted], wanted, strict=False) if a != b and b != SYMBOLS - 1]
    found = nano.transcribe(np.asarray(checks_nano.clip("long")), decoder="ctc")
    assert list(found.tokens) == collapsed
    assert found.text == "".join(chr(ord("a") + token) for token in collapsed if token < 26).strip()
    assert found.words


def test_the_encoder_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_file(golden("nano").weights(), tmp_path / "model.safetensors")
    (tmp_path / "am.mvn").write_bytes(golden("features")["source/am_mvn"].tobytes())
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(DATA / "tokenizer.json", tmp_path)
    adaptor = tmp_path / "adaptor.safetensors"
    save_file(golden("adaptor").weights(), adaptor)
    with pytest.raises(
        qwen4b_asr.CheckpointError, match=r"this is Fun-ASR-Nano .* not SenseVoiceSmall: their encoders"
    ):
        convert(encoder=tmp_path, adaptor=adaptor, llm=tmp_path, output=tmp_path / "out")


def test_a_checkpoint_that_nobody_knows_says_what_is_known(tmp_path: Path) -> None:
    save_file({"some.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(qwen4b_asr.CheckpointError, match=r"none of the checkpoints .*sensevoice.* some\.weight"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(qwen4b_asr.CheckpointError, match="must be the directory of a checkpoint"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Canary-Qwen --------------------------------------------------------------------------------------------------


def lay_out_canary(folder: Path) -> tuple[Path, Path]:
    """Write the golden Canary-Qwen and its tokenizer as they are published."""
    source, tokenizer = folder / "published", folder / "tokenizer"
    source.mkdir()
    tokenizer.mkdir()
    data = golden("canary")
    front = {"fb": data["mel/fb"][None], "window": np.asarray(canary.build_frontend().window)}
    tensors = {f"perception.preprocessor.featurizer.{name}": value for name, value in front.items()}
    tensors["perception.encoder.layers.0.conv.batch_norm.num_batches_tracked"] = np.array(7)  # as the original has it
    save_file({**data.weights(), **tensors}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"lora": data.fact("lora")}))
    shutil.copy(DATA / "tokenizer.json", tokenizer)
    return source, tokenizer


@pytest.fixture(scope="module", params=["keep", "merge"])
def canary_qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("canary")
    source, tokenizer = lay_out_canary(folder)
    return load_converted(source, folder / "model", tokenizer=tokenizer, lora=request.param)


@pytest.fixture(scope="module")
def canary_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canary")
    source, tokenizer = lay_out_canary(folder)
    convert_checkpoint(source, folder / "model", tokenizer=tokenizer)
    return folder / "model"


def test_canary_writes_what_the_original_does(canary_qwen: Model) -> None:
    data = golden("canary")
    first, last = data["speech/range"].tolist()
    ids = data.fact("run")["ids"]
    found = canary_qwen.transcribe(np.asarray(checks.waveform("speech"))[first:last], max_tokens=len(ids))
    stops = [step for step, token in enumerate(ids) if token in canary_qwen.config.generation.stop_token_ids]
    assert list(found.tokens) == (ids[: stops[0]] if stops else ids)


def test_adapters_are_merged_when_loading(canary_directory: Path) -> None:
    from qwen4b_asr.lora import lora_layers

    apart, merged = (qwen4b_asr.load(canary_directory, dtype="float32", lora=lora) for lora in ("keep", "merge"))
    assert lora_layers(apart.model.decoder)
    assert not lora_layers(merged.model.decoder)
    samples = np.asarray(checks.waveform("speech"))
    assert apart.transcribe(samples, max_tokens=8).tokens == merged.transcribe(samples, max_tokens=8).tokens
    with pytest.raises(qwen4b_asr.ConfigError, match="choose keep or merge"):
        qwen4b_asr.load(canary_directory, lora="melt")


def test_canary_has_no_ctc_head(canary_qwen: Model) -> None:
    with pytest.raises(qwen4b_asr.ConfigError, match="no CTC branch"):
        canary_qwen.transcribe(np.asarray(checks.waveform("speech")), decoder="ctc")
