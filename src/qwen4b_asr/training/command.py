"""The command lines ``train`` and ``evaluate``, also mounted by ``qwen4b-asr train``. MLX starts only in `run`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from .loop import Report

WORK_DIR_VARIABLE = "QWEN4B_ASR_WORK_DIR"


def default_work_dir() -> Path:
    """Return where synthetic speech and clips are kept: the variable, else the user's cache."""
    if os.environ.get(WORK_DIR_VARIABLE):
        return Path(os.environ[WORK_DIR_VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qwen4b-asr" / "training"


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archive",
        action="append",
        required=True,
        type=Path,
        metavar="TAR",
        help="the Free Spoken Digit Dataset and audio-cmn, as tar archives; give it once for each",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=None,
        help=f"where synthetic voices and clips are kept (${WORK_DIR_VARIABLE}; the user's cache by default)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of everything drawn (1)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train`` to a parser."""
    _add_common(parser)
    parser.add_argument("--output", type=Path, required=True, help="model directory to write; also holds checkpoints")
    parser.add_argument("--leave-out", metavar="SPEAKER", help="never hear this English speaker, to test on")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output directory")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every phase (1)")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate`` to a parser."""
    _add_common(parser)
    parser.add_argument("--model", required=True, help="model directory, or demo")
    parser.add_argument("--speaker", action="append", help="English speaker to test on; all by default")
    parser.add_argument("--strings", type=int, default=40, help="strings of 3 to 7 digits per speaker (40)")
    parser.add_argument(
        "--takes",
        type=int,
        default=5,
        help="takes of every digit (5; all 50 only for a speaker whom training left out)",
    )
    parser.add_argument("--no-mandarin", action="store_true", help="leave the Mandarin tests out (no espeak-ng needed)")


def add_join_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``join`` to a parser."""
    _add_common(parser)
    parser.add_argument("--speaker", required=True, help="English speaker")
    parser.add_argument("--output", type=Path, required=True, help="WAV file to write, 16 kHz, 16 bit")
    parser.add_argument("words", nargs="+", metavar="WORD", help="digits to say: three one four")


def _progress(description: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    from tqdm import tqdm

    def wrap(items: Iterable[Any], total: int) -> Iterable[Any]:
        wrapped: Iterable[Any] = tqdm(items, total=total, desc=description, disable=None)
        return wrapped

    return wrap


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit status.

    Raises:
        AsrError: If an archive, a voice, a checkpoint or an option cannot be used.
    """
    from .._blas import preload_openblas

    preload_openblas()
    from dataclasses import replace

    import mlx.core as mx
    from tqdm import tqdm

    from ..features import FrontendConfig
    from ..model import SpeechModel
    from .batches import Sampler
    from .corpus import read_corpus, training_bank
    from .loader import Loader
    from .loop import Trainer
    from .recipe import Recipe, demo_config, write_model

    if args.scale <= 0 or args.checkpoint_every < 1:
        raise ConfigError("--scale must be above 0 and --checkpoint-every at least 1")
    recipe = Recipe(seed=args.seed)
    recipe = replace(
        recipe,
        phases=tuple(
            replace(p, steps=max(1, round(p.steps * args.scale)), warmup=max(1, round(p.warmup * min(1, args.scale))))
            for p in recipe.phases
        ),
    )
    started = time.time()
    corpus = read_corpus(args.archive)
    if args.leave_out and args.leave_out not in corpus.speakers:
        raise ConfigError(f"no speaker {args.leave_out!r}; the archives have {', '.join(corpus.speakers)}")
    config = demo_config()
    assert isinstance(config.frontend, FrontendConfig)
    work_dir = args.work_dir or default_work_dir()
    bank = training_bank(corpus, recipe, config.frontend, work_dir, _progress)
    excluded = frozenset({args.leave_out} if args.leave_out else ())
    sampler = Sampler(
        bank,
        config.frontend,
        recipe.seed,
        excluded=excluded,
        batch_size=recipe.batch_size,
        augmentation=recipe.augmentation,
        mix=recipe.mix,
    )
    shift, scale = sampler.statistics()
    fingerprint = recipe.fingerprint(config.to_dict(), sorted(excluded), bank.digest)
    mx.random.seed(recipe.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "training.jsonl"
    with Loader(sampler) as loader:
        trainer = Trainer(
            SpeechModel(config),
            recipe,
            loader,
            shift,
            scale,
            state_dir=args.output,
            fingerprint=fingerprint,
            checkpoint_every=args.checkpoint_every,
        )
        if args.resume:
            trainer.resume()
        done = sum(p.steps for p in recipe.phases[: trainer.state.phase]) + trainer.state.step
        total = sum(p.steps for p in recipe.phases)
        with (
            tqdm(total=total, initial=done, desc="training", disable=None) as bar,
            open(log, "a" if args.resume else "w", encoding="utf-8") as file,
        ):
            smooth: dict[str, float] = {}

            def on_step(report: Report) -> None:
                for name, value in report.losses.items():
                    key = f"{report.phase} {name}"
                    smooth[key] = 0.98 * smooth.get(key, value) + 0.02 * value
                bar.update()
                if report.step % 50 == 0:
                    current = {k: round(v, 4) for k, v in smooth.items() if k.startswith(report.phase)}
                    bar.set_postfix(current)
                    seconds = round(time.time() - started, 1)
                    print(json.dumps({"step": report.step, "seconds": seconds, **current}), file=file, flush=True)

            trainer.run(on_step)
        write_model(args.output, config, trainer.model)
    print(f"{args.output}: trained in {(time.time() - started) / 60:.1f} minutes", file=sys.stderr)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the table of word errors; returns the exit status."""
    from .._blas import preload_openblas

    preload_openblas()
    from ..loading import load
    from ..transcribe import Transcriber
    from .corpus import read_corpus
    from .evaluate import TABLE_HEAD, evaluate

    transcriber = load(args.model)
    if not isinstance(transcriber, Transcriber):
        raise ConfigError(f"{args.model}: has no language model, so it is not one of these")
    corpus = read_corpus(args.archive)
    for speaker in args.speaker or ():
        if speaker not in corpus.speakers:
            raise ConfigError(f"no speaker {speaker!r}; the archives have {', '.join(corpus.speakers)}")
    work_dir = None if args.no_mandarin else args.work_dir or default_work_dir()
    scores = evaluate(
        transcriber,
        corpus,
        speakers=args.speaker,
        strings=args.strings,
        takes=args.takes,
        seed=args.seed,
        work_dir=work_dir,
        progress=_progress,
    )
    print(TABLE_HEAD)
    for one in scores:
        print(one.row())
    return 0


def run_join(args: argparse.Namespace) -> int:
    """Join held-out recordings of one speaker to a string in a WAV file, as ``sample.wav`` was made."""
    import random

    import soundfile

    from .._blas import preload_openblas

    preload_openblas()
    from .corpus import HELD_OUT_TAKES, join, read_corpus, sixteen_kilohertz

    draw = random.Random(args.seed)
    digits = [r for r in read_corpus(args.archive).digits if r.speaker == args.speaker and r.index < HELD_OUT_TAKES]
    chosen = []
    for word in args.words:
        takes = [r for r in digits if r.words == (word,)]
        if not takes:
            raise ConfigError(f"no held-out recording of {word!r} by {args.speaker!r}")
        chosen.append(draw.choice(takes))
    soundfile.write(args.output, sixteen_kilohertz(join(chosen, draw)), 16000, subtype="PCM_16")
    return 0
