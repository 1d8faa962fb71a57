"""The words that the demo knows, and the small tokenizer file made from them."""

from __future__ import annotations

import json
from typing import Any

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MANDARIN = tuple("零一二三四五六七八九十百千万")
WORDS = ENGLISH + MANDARIN
"""Every word; a word's place here + 1 is its CTC symbol (0 is the blank)."""

PINYIN = ("ling2", "yi1", "er4", "san1", "si4", "wu3", "liu4", "qi1", "ba1", "jiu3", "shi2", "bai3", "qian1", "wan4")
"""The citation syllable of each word of `MANDARIN`."""

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>")
END_ID = 0
"""Token that ends a transcript."""

_FIRST_PIECE = len(SPECIALS)


def piece(word: str) -> str:
    """Return the text of a word inside a transcript: English words carry the space before them."""
    return f" {word}" if word in ENGLISH else word


def ctc_symbols() -> list[str]:
    """Return the text of every CTC symbol, the blank (an empty string) first."""
    return ["", *(piece(w) for w in WORDS)]


def token_of(symbol: int) -> int:
    """Return the text token of a CTC symbol (1 .. number of words)."""
    if not 1 <= symbol <= len(WORDS):
        raise ValueError(f"[token_of] the symbol must be 1..{len(WORDS)} but got {symbol}")
    return _FIRST_PIECE + symbol - 1


def vocabulary() -> dict[str, int]:
    """Return every token's id: specials, words as in transcripts, English words without their space.

    The last group only serves `encode` of a text that starts with a letter; the model never writes it.
    """
    tokens = [*SPECIALS, *(piece(w) for w in WORDS), *ENGLISH]
    return {token: i for i, token in enumerate(tokens)}


def tokenizer_json() -> str:
    """Return a `tokenizer.json` for the tokenizers library: one token a word, decoding is joining."""
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": " ?[a-z]+|[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary(), "unk_token": SPECIALS[-1]},
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"
