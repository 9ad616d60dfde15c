"""Multiple choice: which option a reply names, read strictly. A letter is never cut out of a word, and of two letters
none is taken. Texts in, a letter out; knows no benchmark.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from visrl.rewards.metrics import exact_match
from visrl.zoom.written import between

_LETTER = r"(?:[(\[]\s*([A-Z])\s*[)\]]|([A-Z]))"  # B, (B), [B]
_OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]*(\S.*?)[ \t]*$", re.M)  # a line of a question
_ALONE = re.compile(rf"{_LETTER}\s*[.):]?", re.I)
# A letter that begins a reply counts where a mark sets it apart from what follows: "A red car" names no option.
_FIRST = re.compile(r"(?:[(\[]\s*([A-Z])\s*[)\]][.:]?|([A-Z])[.):])\s+(?!(?:or|and)\b|[/&,(\[])\S.*", re.S)
_NEXT = re.compile(r"(?:^|\b(?:or|and)\s+|[/&,]\s*)(?:[(\[]\s*[A-Z]\s*[)\]]|[A-Z][.):])(?=\s|$)", re.M)
_SAID = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*[:=]?\s*(?:[Oo]ption\s+)?"
    rf"{_LETTER}(?![\w'’-])(?=\s*(?:$|\n|[.,:;!)\]]|because\b|since\b))(?!\s*[,/]\s*[(\[]?[A-Z]\s*(?:$|[.,:;)\]\n]))"
)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}{1,2}")
_MARKUP = str.maketrans(dict.fromkeys('*`"“”$', ""))


def read_choice(reply: str, options: Mapping[str, str] | None = None) -> str | None:
    """The letter of the option that a reply names; None where it names none, or several.

    Reads `B`, `(b)`, `B.`, `B. the red one`, `The answer is (B).`, `Answer: B`, `\\boxed{B}`, what stands between
    `<answer>` tags, and the very text of one of `options` (letter → text). Not read: `BECAUSE`, `A red car`, `A or B`,
    a letter that is no option.
    """
    text = unwrapped(unicodedata.normalize("NFKC", reply).translate(_MARKUP).strip())
    if text is None:
        return None
    letter = _letter_in(text)
    if letter is None and options:
        same = [key for key, option in options.items() if exact_match(text, [option])]
        letter = same[0] if len(same) == 1 else None
    return letter if letter is not None and (not options or letter in options) else None


def unwrapped(text: str) -> str | None:
    """What stands between `<answer>` tags, or in `\\boxed{}`; `text` itself without such, None where they hold several
    things.

    >>> unwrapped("so: <answer> 7 </answer>"), unwrapped("7"), unwrapped(r"\\boxed{7} or \\boxed{8}")
    ('7', '7', None)
    """
    for find in (lambda said: between(said, "answer"), _BOXED.findall):
        inside = {one.strip() for one in find(text)}
        if len(inside) > 1:
            return None
        text = inside.pop() if inside else text
    return text


def _letter_in(text: str) -> str | None:
    if alone := _ALONE.fullmatch(text):
        return _group(alone).upper()
    said = {_group(one) for one in _SAID.finditer(text)}
    if said:
        return said.pop() if len(said) == 1 else None
    first = _FIRST.fullmatch(text)
    return _group(first) if first and len(_NEXT.findall(text)) == 1 else None


def _group(match: re.Match[str]) -> str:
    return match[1] or match[2]


def options_of(question: str, raw: Any = None) -> dict[str, str]:
    """The options of a question by their letters: a list `options` or `choices` in its row, else its lines `A. …` or
    `(A) …` from A on. Empty where there are none."""
    row = raw if isinstance(raw, dict) else {}
    for listed in (row.get("options"), row.get("choices")):
        if isinstance(listed, list) and 1 < len(listed) <= 26 and all(isinstance(one, str) for one in listed):
            return {chr(65 + n): _bare(one) for n, one in enumerate(listed)}
    return split_options(question)[1]


def split_options(question: str) -> tuple[str, dict[str, str]]:
    """What stands before the options that a question holds as lines `A. …` or `(A) …` from A on, and the options by
    their letters; the whole question and none where it holds none."""
    found = list(_OPTION.finditer(question))
    lines = [(_group(one), one[3]) for one in found]
    in_order = [letter for letter, _ in lines] == [chr(65 + n) for n in range(len(lines))]
    return (question[: found[0].start()].rstrip(), dict(lines)) if in_order and len(lines) > 1 else (question, {})


def _bare(option: str) -> str:
    """An option's text without the letter that stands before it."""
    line = _OPTION.fullmatch(option)
    return line[3] if line else option


def choice_score(answer: str, reference: str, options: Mapping[str, str]) -> float | None:
    """1 where an answer names the option that the reference does, else 0; None where the reference names none."""
    meant = read_choice(reference, options)
    return None if meant is None else float(read_choice(answer, options) == meant)
