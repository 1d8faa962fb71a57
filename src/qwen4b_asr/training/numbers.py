"""Random number strings: English digits, Mandarin digits and spoken Mandarin numbers."""

from __future__ import annotations

import random

from .vocabulary import ENGLISH, MANDARIN

_DIGITS = MANDARIN[:10]


def english_string(draw: random.Random, length: int) -> tuple[str, ...]:
    """Draw `length` English digits."""
    return tuple(draw.choices(ENGLISH, k=length))


def mandarin_number(value: int) -> tuple[str, ...]:
    """Spell a number as it is said in Mandarin, without 两 and 亿.

    Args:
        value: 0 .. 99,999,999.

    Returns:
        Its characters, e.g. 10350 as 一 万 零 三 百 五 十.
    """
    if not 0 <= value < 10**8:
        raise ValueError(f"[mandarin_number] the value must be 0..99999999 but got {value}")
    if value == 0:
        return (_DIGITS[0],)
    high, low = divmod(value, 10000)
    out: list[str] = []
    if high:
        out += [*_below_ten_thousand(high, leading=True), "万"]
    if low:
        if high and low < 1000:
            out.append(_DIGITS[0])
        out += _below_ten_thousand(low, leading=not high)
    return tuple(out)


def _below_ten_thousand(value: int, *, leading: bool) -> list[str]:
    out: list[str] = []
    gap = False  # one or more zeros since the last digit: said as a single 零
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // unit % 10
        if digit == 0:
            gap = bool(out)
            continue
        if gap:
            out.append(_DIGITS[0])
            gap = False
        if not (unit == 10 and digit == 1 and not out and leading):  # 十二, but 一百一十二
            out.append(_DIGITS[digit])
        if name:
            out.append(name)
    return out


def mandarin_string(draw: random.Random, length: int) -> tuple[str, ...]:
    """Draw about `length` Mandarin number words: digits one by one, a spoken number, or any words."""
    kind = draw.random()
    if kind < 0.45:
        return tuple(draw.choices(_DIGITS, k=length))
    if kind < 0.8:
        digits = max(1, min(8, (length + 1) // 2 + draw.randint(0, 1)))
        return mandarin_number(draw.randrange(10 ** (digits - 1), 10**digits))[: length + 2]
    return tuple(draw.choices(MANDARIN, k=length))
