"""String metrics that need no judge, each a column of its own: they are never mixed. Texts in, a score in [0, 1] out.

Every metric takes the references as a sequence and gives the best score over them, but for VQA accuracy, which counts
how many people gave the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

ANLS_THRESHOLD = 0.5  # Biten et al. 2019 (arXiv 1905.13648), section 3: further away than this scores 0
RELAXED_TOLERANCE = 0.05  # Methani et al. 2020 (PlotQA) and Masry et al. 2022 (ChartQA): within 5 % of the truth

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*|\d*)(?:\.\d+)?")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction is a reference, letter case, outer and repeated spaces and a last full stop aside."""
    return float(_plain(prediction) in {_plain(reference) for reference in _some(references)})


def relaxed_numeric(prediction: str, references: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: numbers count within 5 % of the reference, everything else by exact match.

    Thousands' commas, a currency sign before and a percent sign after a number are read past.
    """
    return max(_relaxed(prediction, reference) for reference in _some(references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019): 1 − distance / longer length.

    0 from a normalised distance of 0.5 on. Letter case and repeated spaces do not count.
    """
    return max(_similarity(_spaced(prediction), _spaced(reference)) for reference in _some(references))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015, arXiv 1505.00468): min(1, people who said it / 3), each person left out in turn.

    Articles, punctuation and apostrophes are dropped and number words up to ten become digits. With fewer than three
    other answers than the one left out (one reference, say) it is whether any reference is the answer.
    """
    answer = _vqa_plain(prediction)
    same = sum(answer == _vqa_plain(reference) for reference in _some(references))
    if len(references) < 4:
        return float(same > 0)
    others = len(references) - same
    return (same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)) / len(references)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "relaxed": relaxed_numeric,
    "anls": anls,
    "vqa": vqa_accuracy,
}


def string_scores(prediction: str | None, references: Sequence[str]) -> dict[str, float | None]:
    """Every string metric by name; None throughout where there is no prediction (a failed one is no wrong one).

    Raises:
        ValueError: no references.
    """
    return {name: None if prediction is None else metric(prediction, references) for name, metric in METRICS.items()}


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def _some(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ValueError("a metric needs a list of at least one reference answer")
    return references


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _plain(text: str) -> str:
    return _spaced(text).removesuffix(".").rstrip()


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if longer == 0:
        return 1.0
    if abs(len(a) - len(b)) >= ANLS_THRESHOLD * longer:
        return 0.0  # the distance is at least the difference in length: a rambling answer costs no time
    distance = edit_distance(a, b) / longer
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _number_in(text: str) -> float | None:
    text = _plain(text).lstrip("$€£¥ ").removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(text) or not any(letter.isdigit() for letter in text):
        return None
    return float(text.replace(",", ""))


def _relaxed(prediction: str, reference: str) -> float:
    said, meant = _number_in(prediction), _number_in(reference)
    if said is None or meant is None:
        return exact_match(prediction, [reference])
    return float(abs(said - meant) <= RELAXED_TOLERANCE * abs(meant))


def _vqa_plain(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold()).replace("'", "").replace("’", "")
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.:]", " ", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)
