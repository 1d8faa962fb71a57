"""The prompts of the 4B system, by name, and the splice of audio rows into text rows.

Four forms of prompt are in use for the same weights; which one a checkpoint was tuned with decides
what it writes, so all four are here and the model's configuration names its own.
Shapes: A audio rows, S prompt rows, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .errors import PromptError

TASKS = ("transcribe", "translate")
QUERY_FRAMES = ("keep", "drop")

# What transformers' Qwen3 chat template appends when thinking is off.
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class PromptProfile:
    """Text before and after the audio rows, per task.

    Args:
        about: One line on where the form comes from.
        forms: Task to (text before the audio, text after it).
    """

    about: str
    forms: dict[str, tuple[str, str]]


def chat_prompt(user: str, *, system: str | None = None) -> str:
    """Return Qwen3's chat template for one user turn, up to where the assistant speaks, thinking off."""
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{EMPTY_THINK}"


def _chat_form(instruction: str) -> tuple[str, str]:
    # No letter of the templates is NUL, so it can stand for the audio.
    before, after = chat_prompt(f"{instruction}\0", system="You are a helpful assistant.").split("\0")
    return before, after


PROFILES: dict[str, PromptProfile] = {
    "plain": PromptProfile(
        "a short instruction, then the audio (the model card's snippet)",
        {"transcribe": ("这是一段中文语音，请转录：", "")},
    ),
    "raw": PromptProfile(
        "the audio alone; the text starts at the last audio position (what the adaptor was trained on)",
        {"transcribe": ("", "")},
    ),
    "instruct": PromptProfile(
        "an instruction on both sides of the audio; also translates to English",
        {
            "transcribe": ("语音转写成中文：", "只输出转写文字，不要分析或解释："),
            "translate": ("Translate the speech to English:", EMPTY_THINK),
        },
    ),
    "chatml": PromptProfile(
        "system, user and assistant turns with the audio in the user turn; also translates to English",
        {
            "transcribe": _chat_form("语音转写成中文："),
            "translate": _chat_form("Translate the speech to English:"),
        },
    ),
    "canary": PromptProfile(
        "Canary-Qwen's user turn, the audio at its end, no system turn and no thought",
        {"transcribe": ("<|im_start|>user\nTranscribe the following: ", "<|im_end|>\n<|im_start|>assistant\n")},
    ),
}

SPEECH_PROFILES = ("plain", "raw", "instruct", "chatml")
"""Those of the 4B system; the others belong to one checkpoint each."""


@dataclass(frozen=True)
class PromptConfig:
    """How a checkpoint wants to be asked.

    Args:
        profile: The profile used when none is named.
        profiles: The profiles that the checkpoint's tokenizer can spell.
        query_frames: ``keep`` gives the decoder the encoder's four query frames before the audio rows, as the
            original inference does; ``drop`` leaves them out.
    """

    profile: str = "plain"
    profiles: tuple[str, ...] = SPEECH_PROFILES
    query_frames: str = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "profiles", tuple(self.profiles))
        for name in (self.profile, *self.profiles):
            if name not in PROFILES:
                raise ValueError(f"[PromptConfig] profile must be one of {', '.join(PROFILES)} but got {name!r}")
        if self.profile not in self.profiles:
            raise ValueError(f"[PromptConfig] profile must be among {self.profiles} but got {self.profile!r}")
        if self.query_frames not in QUERY_FRAMES:
            raise ValueError(f"[PromptConfig] query_frames must be keep or drop but got {self.query_frames!r}")


def prompt_pieces(config: PromptConfig, profile: str | None = None, task: str = "transcribe") -> tuple[str, str]:
    """Return the text before and after the audio rows.

    Args:
        config: The checkpoint's prompts.
        profile: Profile name; None takes the checkpoint's own.
        task: ``transcribe`` or ``translate`` (to English).

    Raises:
        PromptError: If the profile is unknown, not made for this checkpoint, or has no form for the task.
    """
    name = config.profile if profile is None else profile
    if name not in PROFILES:
        raise PromptError(f"unknown prompt profile {name!r}; choose one of {', '.join(PROFILES)}")
    if name not in config.profiles:
        raise PromptError(f"this model has no prompt profile {name!r}; choose one of {', '.join(config.profiles)}")
    forms = PROFILES[name].forms
    if task not in TASKS:
        raise PromptError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if task not in forms:
        able = [p for p in config.profiles if task in PROFILES[p].forms]
        hint = f"use {' or '.join(able)}" if able else "this model has none that can"
        raise PromptError(f"prompt profile {name!r} cannot {task}; {hint}")
    return forms[task]


def spell(encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], text: str) -> list[int]:
    """Tokenise a prompt text and make sure that nothing of it was lost.

    Args:
        encode: Text to token ids, special tokens recognised, none added.
        decode: Token ids to text, special tokens kept.
        text: The prompt text.

    Returns:
        Token ids (S,).

    Raises:
        PromptError: If the vocabulary cannot spell the text.
    """
    ids = list(encode(text))
    if decode(ids) != text:
        raise PromptError(f"this model's vocabulary cannot spell {text!r}")
    return ids


def splice(
    before: Sequence[int],
    audio_embeddings: mx.array,
    after: Sequence[int],
    embed: Callable[[mx.array], mx.array],
) -> mx.array:
    """Put the audio rows between the embedded texts, every row kept, in order.

    The two texts are embedded on their own, as the original code tokenises them apart.

    Args:
        before: Token ids in front of the audio.
        audio_embeddings: (A, H).
        after: Token ids behind the audio.
        embed: Token ids (n,) to embeddings (n, H).

    Returns:
        Prompt rows (S, H) in the dtype of the text embeddings, S = len(before) + A + len(after).

    Raises:
        ValueError: If `audio_embeddings` is not (A, H).
    """
    if audio_embeddings.ndim != 2:
        raise ValueError(f"[splice] audio_embeddings must have shape (A, H) but got {audio_embeddings.shape}")
    rows = [audio_embeddings]
    if before:
        rows.insert(0, embed(mx.array(list(before))))
    if after:
        rows.append(embed(mx.array(list(after))))
    dtype = next((r.dtype for r in rows if r is not audio_embeddings), audio_embeddings.dtype)
    return mx.concatenate([r.astype(dtype) for r in rows], axis=0)
