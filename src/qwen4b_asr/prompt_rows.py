"""The rows that the language model reads: the texts that a model wants around the audio, and the audio itself.

Shapes: A audio rows, S prompt rows, H decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from .errors import PromptError
from .nano_prompt import NanoPromptConfig, NanoTurn, instruction, nano_prompt, nano_rows
from .prompt import PromptConfig, prompt_pieces, splice
from .transcript import TranscribeOptions

Spell = Callable[[str], list[int]]
Embed = Callable[[mx.array], mx.array]


def prompt_rows(
    config: PromptConfig | NanoPromptConfig | None,
    options: TranscribeOptions,
    audio: mx.array,
    *,
    spell: Spell,
    embed: Embed,
    history: Sequence[tuple[str, mx.array]] = (),
) -> mx.array:
    """Put audio rows into a model's prompt.

    Args:
        config: The model's prompt.
        options: What is asked.
        audio: (A, H).
        spell: Turns text into token ids.
        embed: Looks up token ids.
        history: Text and audio rows (A, H) of earlier turns, oldest first.

    Returns:
        Rows (S, H).

    Raises:
        PromptError: If the model cannot be asked so.
    """
    if isinstance(config, NanoPromptConfig):
        if options.prompt_profile not in (None, config.kind):
            raise PromptError(f"this model has no prompt profile {options.prompt_profile!r}; it has its own")
        if options.task != "transcribe":
            raise PromptError(f"this model cannot {options.task}")
        request = _request(config, options)
        turns = [NanoTurn(text, rows) for text, rows in history]
        return nano_rows(config, request, audio, spell=spell, embed=embed, history=turns)
    if config is None:
        raise PromptError("this model has no prompt: nothing says how its language model is asked")
    for name in ("hotwords", "history"):
        if getattr(options, name):
            raise PromptError(f"this model's prompt has no place for {name}; Fun-ASR-Nano's has")
    before, after = prompt_pieces(config, options.prompt_profile, options.task)
    return splice(spell(before), audio, spell(after), embed)


def leading_ids(
    config: PromptConfig | NanoPromptConfig | None, options: TranscribeOptions, *, spell: Spell
) -> list[int]:
    """Return the token ids of the text with which a prompt begins, the same for every recording.

    None after earlier turns, with which no two prompts begin alike. Arguments as in `prompt_rows`, which has accepted
    them.
    """
    if config is None or options.history:
        return []
    if isinstance(config, NanoPromptConfig):
        return spell(nano_prompt(config, _request(config, options))[0] or "")
    return spell(prompt_pieces(config, options.prompt_profile, options.task)[0])


def _request(config: NanoPromptConfig, options: TranscribeOptions) -> str:
    return instruction(
        config, hotwords=options.hotwords, language=options.language, use_itn=options.use_itn is not False
    )
