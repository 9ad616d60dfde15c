"""What a model's reply says: thinking is no part of it, and no text of it can break a file. Knows no engine, no score.

Everything that reads a reply (box text, answers, scores of critics and judges) reads it through here.
"""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"

# How models mark what they think aloud: Qwen3, DeepSeek, GLM and others; Magistral; Kimi-VL.
_MARK = re.compile(r"<(/?)(?:think|thinking)>|\[(/?)THINK\]|◁(/?)think▷")
_SURROGATE = re.compile("[\ud800-\udfff]")


def spoken(text: str) -> str:
    """`text` without what the model thought aloud; as it is where it holds no such mark.

    Thinking runs from a mark to the next closing one. One that is never closed takes all that follows it (the reply was
    cut short), one that was never opened all that comes before it (chat templates open it in the prompt).

    >>> spoken("<think>The red one? 8?</think> 7"), spoken("so it is 7.</think> 7"), spoken("<think>7")
    ('7', '7', '')
    """
    kept: list[str] = []
    start, thinks, marked = 0, False, False
    for mark in _MARK.finditer(text):
        marked = True
        closes = any(mark.groups())
        if closes and not thinks:
            kept.clear()
        elif not closes and not thinks:
            kept.append(text[start : mark.start()])
        thinks, start = not closes, mark.end()
    if not marked:
        return text
    if not thinks:
        kept.append(text[start:])
    return "".join(kept).strip()


def whole_text(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair, which no file in UTF-8 can hold."""
    return _SURROGATE.sub(REPLACEMENT, text)
