"""Each stage, copied under another package name, runs in a clean interpreter with only what its note asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwen4b_asr
import vendor
from package_imports import Source

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(qwen4b_asr.__file__).parent

# What the stage needs is all that can be imported; the original package cannot.
ONLY = """
import sys

class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is not in {ALLOWED}", name=name)

ALLOWED = set(sys.argv[3:])
if ALLOWED:
    sys.meta_path.insert(0, Only)
sys.path.insert(0, sys.argv[1])
__package__ = sys.argv[2]
__import__(__package__)
"""

RUNS = {
    "kernels.fsmn": """
import mlx.core as mx
from .kernels import _loader, fsmn
def factory(**options):
    print(options["name"], options["input_names"], len(options["header"]), len(options["source"]))
    return lambda **call: [mx.zeros(shape) for shape in call["output_shapes"]]
arguments = fsmn.CASES[0].arguments("float32")
for backend in ("metal", "cuda"):
    with _loader.override(backend, factory):
        fsmn.fsmn(**arguments)
print(fsmn.OPERATION.sources[0].contract.vjp, (fsmn.fsmn(**arguments) ** 2).sum().item())
""",
    "features": """
import mlx.core as mx
from .features import Frontend, FrontendConfig
rows = Frontend(FrontendConfig(cmvn=False))(mx.sin(mx.arange(16000) * 0.1))
print(rows.shape, rows.sum().item())
""",
    "encoder": """
import mlx.core as mx
from .encoder import EncoderConfig, SenseVoiceEncoder
mx.random.seed(1)
config = EncoderConfig(input_size=28, output_size=16, attention_heads=2, linear_units=24, num_blocks=2, tp_blocks=1,
                       kernel_size=3, vocab_size=9)
encoder = SenseVoiceEncoder(config)
states, mask = encoder(mx.random.normal((2, 5, 28)), mx.array([[True] * 5, [True] * 3 + [False] * 2]))
print(states.shape, mask.tolist(), encoder.ctc_logits(states).shape, mx.where(mask[..., None], states, 0).sum().item())
""",
    "adaptor": """
import mlx.core as mx
from .adaptor import Adaptor, AdaptorConfig
mx.random.seed(1)
adaptor = Adaptor(AdaptorConfig(input_size=16, hidden_size=24, output_size=20, num_layers=2, num_heads=2, ffn_size=32))
rows = adaptor(mx.random.normal((1, 5, 16)), mx.ones((1, 5), mx.bool_))
print(rows.shape, (rows ** 2).sum().item())
""",
    "mel": """
import mlx.core as mx
from .mel import MelConfig, MelFrontend
frames = MelFrontend(MelConfig())(mx.sin(mx.arange(16000) ** 1.5 * 0.01))
print(frames.shape, (frames ** 4).sum().item())
""",
    "fastconformer": """
import mlx.core as mx
from .fastconformer import FastConformerConfig, FastConformerEncoder
mx.random.seed(1)
config = FastConformerConfig(input_size=16, output_size=16, attention_heads=2, linear_units=24, num_blocks=2,
                             kernel_size=3, subsampling_channels=4)
encoder = FastConformerEncoder(config)
states, mask = encoder(mx.random.normal((2, 40, 16)), mx.array([[True] * 40, [True] * 9 + [False] * 31]))
encoder.fold_batch_norms()
print(states.shape, mask.tolist(), mx.where(mask[..., None], mx.abs(states), 0).sum().item())
""",
    "projection": """
import mlx.core as mx
from .projection import Projection, ProjectionConfig
mx.random.seed(1)
rows = Projection(ProjectionConfig(input_size=16, output_size=20))(mx.random.normal((1, 5, 16)))
print(rows.shape, (rows ** 2).sum().item())
""",
    "prompt": """
from .prompt import SPEECH_PROFILES, PromptConfig, prompt_pieces
print([prompt_pieces(PromptConfig(), name) for name in SPEECH_PROFILES])
""",
    "decoder cache": """
import mlx.core as mx
from .cache import KVCache
from .decoder import DecoderConfig, Qwen3
mx.random.seed(1)
decoder = Qwen3(DecoderConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=8))
cache = [KVCache() for _ in decoder.model.layers]
for ids in ([[1, 2, 3]], [[4]]):
    logits = decoder(decoder.embed(mx.array(ids)), cache)
print(logits.shape, cache[0].offset, logits.sum().item())
""",
    "sampling": """
import mlx.core as mx
from .sampling import Sampler, SamplingOptions
sampler = Sampler(SamplingOptions(temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.2, seed=3))
print([sampler.choose(mx.array([0.1, 2.0, 1.9, 1.8, -4.0]), [1]) for _ in range(8)])
""",
    "generate": """
import mlx.core as mx
from .decoder import DecoderConfig, Qwen3
from .generate import Generation, GenerationOptions
mx.random.seed(1)
decoder = Qwen3(DecoderConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=8))
run = Generation(decoder, mx.random.normal((3, 16)), GenerationOptions(max_tokens=6, stop_token_ids=()))
print(list(run), run.finish_reason)
""",
    "audio": """
import io
import numpy as np
import soundfile
from .audio import load_audio
file = io.BytesIO()
soundfile.write(file, np.sin(np.arange(4410) * 0.1).astype(np.float32), 44100, format="WAV")
file.seek(0)
samples = load_audio(file)
print(samples.shape, float((samples ** 2).sum()))
""",
    "weights.kaldi_mvn": """
import pathlib, tempfile
from .weights.kaldi_mvn import read_kaldi_mvn
path = pathlib.Path(tempfile.mkdtemp()) / "am.mvn"
path.write_text("<Nnet>\\n<Splice> 2 2\\n[ 0 ]\\n<AddShift> 2 2\\n<LearnRateCoef> 0 [ 1 2 ]\\n"
                "<Rescale> 2 2\\n<LearnRateCoef> 0 [ 3 4 ]\\n</Nnet>\\n")
try:
    mvn = read_kaldi_mvn(path)
    print(mvn.shift.tolist(), mvn.scale.tolist())
finally:
    path.unlink()
    path.parent.rmdir()
""",
}
MLX_ONLY = {
    "kernels.fsmn",
    "features",
    "mel",
    "encoder",
    "fastconformer",
    "projection",
    "adaptor",
    "prompt",
    "decoder cache",
    "sampling",
    "generate",
}
# What a needed package brings along.
BROUGHT = {"soundfile": ["_soundfile", "_soundfile_data", "cffi", "_cffi_backend", "pycparser", "typing_extensions"]}


def run(script: str, folder: Path, package: str, allowed: list[str]) -> str:
    """What `script` prints, run in a fresh interpreter as if inside `package`; all may be imported if none is given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-I", "-B", "-c", ONLY + script, str(folder), package, *allowed]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(target: Path) -> list[str]:
    """Import names of what the copy's note asks for."""
    requirements = json.loads((target / "VENDORED.json").read_text())["needs"]
    tops = [requirement.partition(">")[0].replace("-", "_") for requirement in requirements]
    return tops + [name for top in tops for name in BROUGHT.get(top, [])]


@pytest.mark.parametrize("stages", RUNS)
def test_a_copied_stage_runs_and_says_the_same(tmp_path, stages):
    target = tmp_path / "strangers" / "speech"
    vendor.vendor(ROOT, target, stages.split())
    assert vendor.check(ROOT, target) == []
    if stages in MLX_ONLY:
        assert needs(target) == ["mlx"]
    copied = run(RUNS[stages], tmp_path, "strangers.speech", ["strangers", *needs(target)])
    assert copied == run(RUNS[stages], INSTALLED.parent, "qwen4b_asr", [])
    assert len(copied) > 5


def test_the_clean_interpreter_is_clean(tmp_path):
    (tmp_path / "stage.py").write_text("import numpy\n")
    with pytest.raises(AssertionError, match="numpy is not in"):
        run("", tmp_path, "stage", ["stage", "mlx"])
    with pytest.raises(AssertionError, match="qwen4b_asr is not in"):
        run("import qwen4b_asr", tmp_path, "json", ["mlx"])


MODULES = sorted(m for m in Source.scan(ROOT / "src/qwen4b_asr").modules if m and not m.endswith("__main__"))
IMPORT_ALL = """
import importlib, pathlib
root = pathlib.Path(sys.argv[1])
for line in (root / "modules.txt").read_text().split():
    importlib.import_module(line)
assert not [name for name in sys.modules if name.partition(".")[0] == "qwen4b_asr"]
print("ok")
"""


def test_every_module_can_be_copied_and_imported(tmp_path):
    lines = []
    for module in MODULES:
        package = "copy_of_" + module.replace(".", "_")
        vendor.vendor(ROOT, tmp_path / package, [module])
        lines.append(f"{package}.{module}")
    (tmp_path / "modules.txt").write_text("\n".join(lines))
    assert run(IMPORT_ALL, tmp_path, "json", []) == "ok\n"
