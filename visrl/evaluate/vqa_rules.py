"""Published scores over several reference answers, to the letter: ANLS, VQA accuracy and relaxed accuracy as lmms-eval
(75571cfe) and VLMEvalKit (e8e78f05) compute them. A reply and its references in, a score in [0, 1] out.

`rewards.metrics` has the same three as they were defined; what is told apart here are the toolkits' own habits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from visrl.rewards.metrics import ANLS_THRESHOLD, RELAXED_TOLERANCE, edit_distance

# --- ANLS -------------------------------------------------------------------------------------------------------------


def anls(reply: str, references: Sequence[str]) -> float:
    """Both toolkits: the distance of the texts in lower case and with single spaces, over the length of the longer one
    as it stands, spaces and all: outer spaces make a wrong letter cheaper."""
    nearest = min(_distance(reply, reference) for reference in references)
    return 1 - nearest if 1 - nearest >= ANLS_THRESHOLD else 0.0


def _distance(reply: str, reference: str) -> float:
    a, b = (" ".join(text.strip().lower().split()) for text in (reference, reply))
    longest = max(len(reference), len(reply))
    if longest == 0:
        return 0.0
    if abs(len(a) - len(b)) > longest * (1 - ANLS_THRESHOLD):
        return 1.0  # too far for any score, and a rambling reply costs no time
    return edit_distance(a, b) / longest


# --- VQA accuracy -----------------------------------------------------------------------------------------------------


def lmms_vqa(reply: str, references: Sequence[str]) -> float:
    """lmms-eval: each person's answer left out in turn, min(1, others that say the same / 3), over texts cleaned as
    EvalAI cleans them."""
    return _left_out(_cleaned(_tokenised(reply)), [_cleaned(_tokenised(one)) for one in references])


def vlmevalkit_vqa(reply: str, references: Sequence[str]) -> float:
    """VLMEvalKit: as `lmms_vqa`, but commas, question marks and a possessive 's are cleaned with the other signs."""
    return _left_out(_cleaned(reply), [_cleaned(one) for one in references])


def _left_out(said: str, references: Sequence[str]) -> float:
    same = sum(one == said for one in references)
    shares = [min(1.0, (same - (one == said)) / 3) for one in references]
    return sum(shares) / len(shares)


def _tokenised(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # the published call gives the flag re.UNICODE where the number of replacements stands
_ARTICLES = ("a", "an", "the")
_WORDS = "none zero one two three four five six seven eight nine ten"
_NUMBERS = dict(zip(_WORDS.split(), ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], strict=True))
# Words whose apostrophe comes back where it is missing; of those with several, where one is.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED.split() for mark in re.finditer("'", word)
}


def _cleaned(text: str) -> str:
    """A text without signs and articles, with number words as digits and apostrophes in their places."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma = _COMMA.search(text) is not None
    plain = text
    for sign in _SIGNS:
        is_apart = has_comma or f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if is_apart else " ")
    plain = _STOP.sub("", plain, count=_MOST_STOPS)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


# --- Relaxed accuracy -------------------------------------------------------------------------------------------------


def lmms_relaxed(reply: str, references: Sequence[str]) -> float:
    """lmms-eval on ChartQA: the one reference alone, the reply as it stands."""
    return float(_is_near(reply, references[0]))


def vlmevalkit_relaxed(reply: str, references: Sequence[str]) -> float:
    """VLMEvalKit on ChartQA: the best over all references, the reply without outer spaces."""
    return float(any(_is_near(reply.strip(), reference) for reference in references))


def _is_near(reply: str, reference: str) -> bool:
    """Numbers within 5 % of a reference that is not 0; else the same text, letter case aside."""
    said, meant = _number(reply), _number(reference)
    if said is not None and meant:
        return abs(said - meant) / abs(meant) <= RELAXED_TOLERANCE
    return reply.lower() == reference.lower()


def _number(text: str) -> float | None:
    """A number as Python reads it; one that ends in percent signs as that part of one."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


VQA_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "anls": anls,
    "lmms-eval-vqa": lmms_vqa,
    "vlmevalkit-vqa": vlmevalkit_vqa,
    "lmms-eval-relaxed": lmms_relaxed,
    "vlmevalkit-relaxed": vlmevalkit_relaxed,
}
