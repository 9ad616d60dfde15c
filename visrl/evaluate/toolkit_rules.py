"""How VLMEvalKit and lmms-eval read the letter of a reply, where they differ from a benchmark's authors.

See rules.py for what a rule is and for the table. Read at VLMEvalKit e8e78f05 and lmms-eval 75571cfe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Options = Mapping[str, str]

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SAID = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
LAST_WORDS = 4  # the letter must be one of so many last words: its place is above their number less five
REFUSED = "Z"


# --- VLMEvalKit -------------------------------------------------------------------------------------------------------


def vlmevalkit(reply: str, options: Options, truth: str) -> float | None:
    """VLMEvalKit on V*, HR-Bench and other choices: a lone letter among the last words, else a lone option's text, else
    its judge (`--judge exact_matching` counts those as wrong; an unreadable judge is drawn by lot)."""
    letter = vlmevalkit_option(reply, options) or one_option_text(reply, options, is_short=True)
    return None if letter is None else float(letter == truth)


def vlmevalkit_option(reply: str, options: Iterable[str]) -> str | None:
    """VLMEvalKit's `can_infer_option`: the letter, "Z" for a refusal, None where it finds neither."""
    letter = _lone_letter(reply, options, LAST_WORDS)
    if letter is not None or _NO_ANSWER in reply:
        return letter
    said = _SAID.search(reply)
    return said[1].upper() if said and said[1].upper() in options else None


def one_option_text(reply: str, options: Options, is_short: bool) -> str | None:
    """The one option whose text is in a reply, letter case aside (`can_infer_text`); None where there are none or more.

    With `is_short` a reply longer than twice all options together is not looked at.
    """
    said = reply.lower()
    if is_short and len(said) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in said]
    return found[0] if len(found) == 1 else None


def vlmevalkit_letter(reply: str, options: Options, truth: str) -> float:
    """VLMEvalKit on MME-RealWorld and TreeBench: in the first `<answer>`, where there is one, the first capital A to E.

    "Because" is B, an empty reply is A, and an F is never read.
    """
    tagged = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    return float(first_capital(tagged[1] if tagged else reply, _PREFIXES, _LETTERS) == truth)


# --- lmms-eval --------------------------------------------------------------------------------------------------------

_CASCADE = (
    r"^([A-D])\s*[.)\]]*",
    r"(?:THE\s+)?(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]]",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


def lmms_vstar(reply: str, options: Options, truth: str) -> float:
    """lmms-eval on V*: the first of five patterns that is found in the reply in capitals; then the only letter A to D.

    "Because" is B, "Answer: C" is A.
    """
    text = reply.strip().upper()
    found = next((match[1] for pattern in _CASCADE if (match := re.search(pattern, text))), None)
    letters = re.findall("[A-D]", text)
    if found is None and len(letters) == 1:
        found = letters[0]
    return float(found == truth.strip().upper())


def lmms_hrbench(reply: str, options: Options, truth: str) -> float | None:
    """lmms-eval on HR-Bench: the only letter anywhere, else the only option's text; else its judge."""
    said = reply.strip()
    letter = _lone_letter(said, options, None) or one_option_text(said, options, is_short=False)
    return None if letter is None else float(letter.lower() == truth.lower())


def lmms_mme_realworld(reply: str, options: Options, truth: str) -> float:
    """lmms-eval on MME-RealWorld: the first capital A to E, as the authors have it but with their list of phrases
    mended; an empty reply is A."""
    return float(truth == first_capital(reply, _PREFIXES, _LETTERS))


# --- Both -------------------------------------------------------------------------------------------------------------

_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
_LETTERS = ("(A)", "(B)", "(C)", "(D)", "(E)")


def first_capital(reply: str, prefixes: Sequence[str], choices: Sequence[str]) -> str:
    """The first capital A to E in a reply without these phrases; where there is none, the letter of the first choice
    that holds the reply, letter case aside. "" where nothing is found, or in more than ten words no capital."""
    text = reply.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    found = re.search("[ABCDE]", text)
    if found:
        return found[0]
    if len(text.split()) > 10:
        return ""
    return next((choice[1] for choice in choices if text.lower() in choice.lower()), "")


def _lone_letter(reply: str, options: Iterable[str], last: int | None) -> str | None:
    """The only option letter that is a word of the reply, punctuation aside, its first place among the `last` words."""
    if _NO_ANSWER in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return REFUSED
    words = reply.translate(_TO_SPACES).split()
    found = [letter for letter in options if letter in words]
    if not found:
        return REFUSED if REFUSED in words else None
    if len(found) > 1:
        return None
    return found[0] if last is None or words.index(found[0]) >= len(words) - last else None
