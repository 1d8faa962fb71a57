"""The same goldens as a user meets them: files of the original, `convert`, `load`, `transcribe`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import qwen4b_asr
from qwen4b_asr.transcribe import Transcriber
from qwen4b_asr.weights.convert import convert

from . import checks
from .support import DATA, compare, golden


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory) -> Transcriber:
    """Lay the golden weights out like the published files and convert them."""
    root = tmp_path_factory.mktemp("parts")
    encoder, llm = root / "encoder", root / "llm"
    encoder.mkdir()
    llm.mkdir()
    save_file(golden("encoder").weights(), encoder / "model.safetensors")
    (encoder / "am.mvn").write_bytes(golden("features")["source/am_mvn"].tobytes())
    save_file(golden("adaptor").weights(), root / "adaptor.safetensors")
    save_file(golden("generation").weights(), llm / "model.safetensors")
    (llm / "config.json").write_text(json.dumps({"model_type": "qwen3", **golden("generation").fact("config")}))
    shutil.copy(DATA / "tokenizer.json", llm)
    convert(
        encoder=encoder,
        adaptor=root / "adaptor.safetensors",
        llm=llm,
        output=root / "model",
        encoder_heads=golden("encoder").fact("config")["attention_heads"],
        adaptor_heads=golden("adaptor").fact("config")["num_heads"],
    )
    return qwen4b_asr.load(root / "model", dtype="float32")


def test_statistics_are_those_funasr_reads(transcriber: Transcriber) -> None:
    front = transcriber.model.frontend
    compare(front.cmvn_shift, golden("features")["cmvn/shift"], "exact", "shift")
    compare(front.cmvn_scale, golden("features")["cmvn/scale"], "exact", "scale")


@pytest.mark.parametrize("clip", ["long", "short"])
def test_encode_audio(transcriber: Transcriber, clip: str) -> None:
    found = transcriber.encode_audio(np.asarray(checks.clip_samples(clip)), 16000)
    compare(found[0], golden("generation")[f"{clip}/audio"], "whole", f"audio embeddings of {clip}")


@pytest.mark.parametrize("name", checks.run_names())
def test_transcribe(transcriber: Transcriber, name: str) -> None:
    profile, task, clip = name.split("/")
    ids = golden("generation").fact("runs")[name]["ids"]
    # The recorded run had no stop token; the converted model has the tokenizer's two.
    stops = [step for step, token in enumerate(ids) if token in transcriber.config.generation.stop_token_ids]
    wanted = ids[: stops[0]] if stops else ids
    found = transcriber.transcribe(
        np.asarray(checks.clip_samples(clip)), 16000, prompt_profile=profile, task=task, max_tokens=len(ids)
    )
    assert list(found.tokens) == wanted
    assert found.finish_reason == ("stop" if stops else "length")
