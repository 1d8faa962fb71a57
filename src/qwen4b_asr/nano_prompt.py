"""The prompt of Fun-ASR-Nano: instruction with hot words and language, earlier turns with their audio.

Source: FunASR's ``funasr/models/fun_asr_nano/model.py`` (``get_prompt``, ``generate_chatml``, ``data_load_speech``).
Each turn's texts around its audio are tokenised on their own there, and so are the answers; a token never spans two
pieces, so the pieces are kept apart here too.
Shapes: A audio rows, S prompt rows, H decoder width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx

from .errors import PromptError

KIND = "nano"
_SILENCE = "/sil"
SYSTEM = "You are a helpful assistant."
CONTEXT = "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n**上下文信息：**\n\n\n"
EMPTY_THINK = "<think>\n\n</think>\n\n"

# The names that the models were trained with, as their model cards list them, by ISO code.
LANGUAGES: Mapping[str, str] = MappingProxyType({
    "zh": "中文", "en": "英文", "yue": "粤语", "ja": "日文", "ko": "韩文", "vi": "越南语", "id": "印尼语",
    "th": "泰语", "ms": "马来语", "fil": "菲律宾语", "ar": "阿拉伯语", "hi": "印地语", "bg": "保加利亚语",
    "hr": "克罗地亚语", "cs": "捷克语", "da": "丹麦语", "nl": "荷兰语", "et": "爱沙尼亚语", "fi": "芬兰语",
    "el": "希腊语", "hu": "匈牙利语", "ga": "爱尔兰语", "lv": "拉脱维亚语", "lt": "立陶宛语", "mt": "马耳他语",
    "pl": "波兰语", "pt": "葡萄牙语", "ro": "罗马尼亚语", "sk": "斯洛伐克语", "sl": "斯洛文尼亚语", "sv": "瑞典语",
})  # fmt: skip
NANO_LANGUAGES = ("zh", "en", "ja")
MLT_NANO_LANGUAGES = tuple(LANGUAGES)

_CHAT_TOKENS = re.compile(r"<\|[^|<>]*\|>")


@dataclass(frozen=True)
class NanoPromptConfig:
    """How a checkpoint of the Fun-ASR-Nano family wants to be asked.

    Args:
        kind: ``nano``, which tells it from other prompts in a model's configuration.
        languages: Codes of the languages it knows, of `LANGUAGES`.
        system: The system turn.
        empty_think: Put an empty thought before each answer, for weights that were trained so (FunASR's
            ``dataset_conf.do_think: false``); the published ones were not.
        max_turns: Turns of a prompt, the one asked about included; older ones fall out.
    """

    kind: str = KIND
    languages: tuple[str, ...] = NANO_LANGUAGES
    system: str = SYSTEM
    empty_think: bool = False
    max_turns: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        if self.kind != KIND:
            raise ValueError(f"[NanoPromptConfig] kind must be {KIND!r} but got {self.kind!r}")
        for code in self.languages:
            if code not in LANGUAGES:
                raise ValueError(f"[NanoPromptConfig] languages must be among {', '.join(LANGUAGES)} but got {code!r}")
        if self.max_turns < 1:
            raise ValueError(f"[NanoPromptConfig] max_turns must be at least 1 but got {self.max_turns}")


@dataclass(frozen=True)
class NanoTurn:
    """An earlier turn: what was asked about which audio, and the answer.

    Args:
        answer: What the model wrote, or should have written.
        audio: Audio embeddings (A, H); None for a turn of text alone.
        instruction: What it was asked, from `instruction`.
    """

    answer: str
    audio: mx.array | None = None
    instruction: str = "语音转写："


def instruction(
    config: NanoPromptConfig, *, hotwords: Sequence[str] = (), language: str = "auto", use_itn: bool = True
) -> str:
    """Return what the user says before the audio.

    Args:
        config: The checkpoint's prompt.
        hotwords: Words and names that are likely to be heard.
        language: ``auto``, a code of `config.languages`, or the name that the model was trained with (``中文``).
        use_itn: Let the model write digits and symbols as they are read; otherwise it is asked not to.

    Raises:
        PromptError: If the checkpoint does not know the language, or a hot word would break the prompt.
    """
    words = [word.strip() for word in hotwords]
    for word in words:
        if not word or "\n" in word or _CHAT_TOKENS.search(word):
            raise PromptError(f"hot word {word!r}: must be some text on one line, without chat tokens")
    text = f"{CONTEXT}热词列表：[{', '.join(words)}]\n" if words else ""
    text += "语音转写"
    if language != "auto":
        text += f"成{_language_name(config, language)}"
    return f"{text}{'' if use_itn else '，不进行文本规整'}："


def _language_name(config: NanoPromptConfig, language: str) -> str:
    for code in config.languages:
        if language in (code, LANGUAGES[code]):
            return LANGUAGES[code]
    other = next((code for code, name in LANGUAGES.items() if language in (code, name)), None)
    hint = "; Fun-ASR-MLT-Nano does" if other else ""
    known = ", ".join(("auto", *config.languages))
    raise PromptError(f"this model does not know the language {language!r}{hint}; choose one of {known}")


def nano_prompt(
    config: NanoPromptConfig,
    request: str,
    *,
    history: Sequence[NanoTurn] = (),
    prefix: str = "",
) -> list[str | None]:
    """Return the pieces of a prompt in order, each text to be tokenised on its own.

    Where FunASR counts turns from the first and would drop the one that is asked about, the oldest fall out here.

    Args:
        config: The checkpoint's prompt.
        request: The instruction for the audio in question, from `instruction`.
        history: Earlier turns, oldest first.
        prefix: Text that the answer is to begin with, as after an interruption.

    Returns:
        Texts, and None where audio rows go: those of the earlier turns that have some, then those in question.

    Raises:
        PromptError: If a text brings chat tokens of its own.
    """
    for text in (request, prefix, *(part for turn in history for part in (turn.instruction, turn.answer))):
        if _CHAT_TOKENS.search(text):
            raise PromptError(f"{text!r}: a prompt's text must not hold chat tokens of its own")
    kept = recent(config, history)
    ending = "<|im_end|>\n<|im_start|>assistant\n" + (EMPTY_THINK if config.empty_think else "")
    pieces: list[str | None] = []
    for index, turn in enumerate((*kept, None)):
        head = f"<|im_start|>system\n{config.system}<|im_end|>\n" if index == 0 else ""
        head += f"<|im_start|>user\n{request if turn is None else turn.instruction}"
        if turn is None:
            pieces += [head, None, ending + prefix]
        elif turn.audio is None:
            pieces += [head + ending, f"{turn.answer}<|im_end|>"]
        else:
            pieces += [head, None, ending, f"{turn.answer}<|im_end|>"]
    return pieces


def recent(config: NanoPromptConfig, history: Sequence[NanoTurn]) -> Sequence[NanoTurn]:
    """Return the turns of `history` that a prompt has room for, beside the one asked about."""
    return history[max(0, len(history) - (config.max_turns - 1)) :]


def nano_rows(
    config: NanoPromptConfig,
    request: str,
    audio_embeddings: mx.array,
    *,
    spell: Callable[[str], Sequence[int]],
    embed: Callable[[mx.array], mx.array],
    history: Sequence[NanoTurn] = (),
    prefix: str = "",
) -> mx.array:
    """Build a prompt and put the audio rows, all of them and in order, into their places.

    Args:
        config: The checkpoint's prompt.
        request: As in `nano_prompt`.
        audio_embeddings: (A, H), of the audio in question.
        spell: Text to token ids, special tokens recognised, none added.
        embed: Token ids (n,) to embeddings (n, H).
        history: As in `nano_prompt`.
        prefix: As in `nano_prompt`.

    Returns:
        Prompt rows (S, H) in the dtype of the text embeddings.

    Raises:
        PromptError: As `nano_prompt`.
        ValueError: If audio embeddings are not (A, H).
    """
    audio = iter([*(turn.audio for turn in recent(config, history) if turn.audio is not None), audio_embeddings])
    rows = []
    for piece in nano_prompt(config, request, history=history, prefix=prefix):
        if piece is not None:
            rows.append(embed(mx.array(list(spell(piece)))))
            continue
        rows.append(next(audio))
        if rows[-1].ndim != 2:
            raise ValueError(f"[nano_rows] audio embeddings must have shape (A, H) but got {rows[-1].shape}")
    dtype = rows[0].dtype  # the first piece is always text
    return mx.concatenate([r.astype(dtype) for r in rows], axis=0)


def nano_text(text: str) -> str:
    """Return what the model wrote without its mark for silence, each run of white space as one space.

    As FunASR's ``inference_llm`` does; spaces at the ends go too.
    """
    stream = NanoTextStream()
    return stream.push(text) + stream.flush()


class NanoTextStream:
    """`nano_text` for text that comes in pieces: what it returns, joined, equals the cleaned whole.

    White space is held back until something follows it, and so is what may become the mark for silence.
    """

    def __init__(self) -> None:
        self._held = ""
        self._started = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that is certain now, often empty."""
        text = self._held + piece
        begun = next(n for n in reversed(range(len(_SILENCE))) if text.endswith(_SILENCE[:n]))
        spaced = re.sub(r"\s+", " ", text[: len(text) - begun].replace(_SILENCE, " "))
        certain = spaced.rstrip()
        self._held = spaced[len(certain) :] + text[len(text) - begun :]
        if not self._started:
            certain = certain.lstrip()
            self._started = bool(certain)
        return certain

    def flush(self) -> str:
        """Return what is left at the end."""
        rest = self._held.rstrip()
        self._held = ""
        return rest if self._started else rest.lstrip()
