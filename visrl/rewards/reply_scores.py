"""Reading the score in a judge's or critic's reply: to the letter of the published scorer, and as a person would.

A number is never cut out of another number, a range, a version or a date, and a score is never guessed: what is not
plainly one score between 0 and 1, or so much out of so much, is not read.
"""

from __future__ import annotations

import re
import unicodedata

from visrl.replies import spoken

_PUBLISHED = re.compile(r"score: ([\d.]+)")

_NUMBER = r"[-+]?(?:[0-9]+(?:[.,][0-9]+)?|\.[0-9]+)(?:e[-+]?[0-9]+)?"
# Where a number ends: not before a letter or digit, another separator with a digit (0.8.1, 0-1, 0·8) or a percent sign.
_END = r"(?!\w|[^\s\w/]+\d|[ \t]*[%‰])"
_WHOLE = rf"[ \t]*(?:/|out of|of)[ \t]*({_NUMBER}){_END}(?!/)"
# What stands between the word and the number: colons, arrows, table bars, brackets after a colon, a tag's own brackets.
_BETWEEN = r"(?P<between>(?:\s|[:=|→—–-]|[=-]>|is\b|(?:(?<=[:=])|(?<=[:=]\s))[(\[{]|<(?=[^<>\n]{1,20}>)){1,10}?)"
_MENTION = re.compile(
    r"score[ \t]*(?:[(\[](?P<scale>[^()\[\]\n]{1,60})[)\]])?"
    rf"{_BETWEEN}(?<![\w.,])(?P<value>{_NUMBER})(?P<ends>{_END})?"
)
_ALONE = re.compile(rf"({_NUMBER}){_END}(?:{_WHOLE})?")
_OUT_OF = re.compile(_WHOLE)
# The number is the first of several: a range, a list, a value with its uncertainty, digits with blanks between them,
# scores of several things.
_GOES_ON = re.compile(
    r"[ \t]*(?:[-–—~,;|&±…/]|\+/-|\.{2,}|to\b|or\b|and\b|through\b)[ \t]*[-+]?\.?\d|[ \t]+[-+]?\.?\d"
    rf"|[ \t]*(?:for|on|in)\b[^.;,\n]{{1,60}}(?:[;,][ \t]*(?:and[ \t]+)?|\band[ \t]+){_NUMBER}[ \t]+(?:for|on|in)\b"
)
# It is out of something that is not read here, or the sentence says what scores mean and gives none.
_NOT_MEANT = re.compile(
    r"[ \t]*(?:/|of\b|if\b|when\b|means?\b|is\b|would\b|being\b)|.{0,60}?(?:out of\b|\bscale\b|\bper ?cent\b)"
)
_LIST_ITEM = re.compile(r"[.)](?:\s|$)")
_FROM_ZERO = re.compile(rf"\D*\b0(?:\.0+)?[ \t]*(?:-|–|—|to|\.\.+|…|,|and)[ \t]*({_NUMBER})\D*")
_AT_MOST = re.compile(rf"\D*(?:out of|of|max(?:imum)?\.?:?|/)[ \t]*({_NUMBER})\D*")
_TAG = re.compile(r"<score>([^<>\n]{1,40})</score>")
_QUOTES = str.maketrans({**dict.fromkeys("*`\"'“”„‘’$", ""), "−": "-", "⁄": "/", "∕": "/"})


def read_published_score(reply: str | None) -> float:
    """The score in a reply, to the letter of the published scorer.

    In lower case it must hold `score: ` followed by digits and dots exactly once, else 0; more than 1 is 1. The
    published scorer stops with an error at digits and dots that are no number (`score: 0.8.`): 0 here.
    """
    found = _PUBLISHED.findall((reply or "").lower())
    if len(found) != 1:
        return 0.0
    try:
        return min(float(found[0]), 1.0)
    except ValueError:
        return 0.0


def read_score(reply: str | None) -> float | None:
    """The score in a reply as a person would read it, or None where there is none or more than one.

    Reads `score: 0.8`, `Score = **0,8**.`, `{"score": "0.8"}`, `score: 8/10`, `Score (0-10): 8`, `0.8` alone; what a
    model thinks aloud is no part of its reply. Two different scores, one outside [0, 1], a range, a percentage or a
    scale that is not said are not read: a score is never guessed.
    """
    text = unicodedata.normalize("NFKC", spoken(reply or "")).lower().translate(_QUOTES).strip()
    text = _TAG.sub(r"score: \1\n", text.replace("\\boxed{", "{"))
    scores = {_mentioned(text, mention) for mention in _MENTION.finditer(text)}
    alone = _ALONE.fullmatch(text.strip("{}. "))
    if not scores and alone:
        scores = {_fraction(alone[1], alone[2] or "1")}
    score = scores.pop() if len(scores) == 1 else None
    return score if score is not None and 0 <= score <= 1 else None


def is_score(value: object) -> bool:
    """Whether `value`, from a file, is a number between 0 and 1."""
    return isinstance(value, (bool, int, float)) and 0 <= value <= 1


def _mentioned(text: str, mention: re.Match[str]) -> float | None:
    """The score that one mention of the word gives, None where its number is part of something else."""
    rest = text[mention.end() : mention.end() + 100]
    if mention["ends"] is None or ("\n" in mention["between"] and _LIST_ITEM.match(rest)):
        return None
    whole = "1"
    if mention["scale"] is not None:
        scale = _FROM_ZERO.fullmatch(mention["scale"]) or _AT_MOST.fullmatch(mention["scale"])
        if scale is None and re.search(r"\d", mention["scale"]):
            return None
        whole = scale[1] if scale else "1"
    out_of = _OUT_OF.match(rest)
    if out_of is not None:
        if mention["scale"] is not None and whole != out_of[1]:
            return None
        whole, rest = out_of[1], rest[out_of.end() :]
    elif _NOT_MEANT.match(rest):
        return None
    return None if _GOES_ON.match(rest) else _fraction(mention["value"], whole)


def _fraction(value: str, whole: str) -> float | None:
    numbers = _number(value), _number(whole)
    if numbers[0] is None or not numbers[1] or numbers[1] < 0:
        return None
    return numbers[0] / numbers[1]


def _number(text: str) -> float | None:
    """The number in `text`, whose comma is a decimal one; None where it may as well mark thousands (1,000)."""
    whole, comma, digits = text.partition(",")
    if comma and len(digits) == 3 and whole.strip("+-0"):
        return None
    return float(text.replace(",", "."))
