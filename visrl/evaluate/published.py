"""What others published of Visual-CoT and RefCOCO, as data: their make-up and the scores that ours are shown beside.

Sources: VisRL (arXiv 2503.07523) and Visual-CoT (arXiv 2403.16999). Knows no files and computes nothing but the two
ways to average over data sets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

# Questions of each data set of the Visual-CoT benchmark, in the order of its tables.
VISCOT_QUESTIONS: dict[str, int] = {
    "docvqa": 888,
    "textcap": 853,
    "textvqa": 526,
    "dude": 603,
    "sroie": 686,
    "infographicsvqa": 360,
    "flickr30k": 1546,
    "gqa": 978,
    "openimages": 945,
    "vsr": 404,
    "cub": 492,
}
REFCOCO_SPLITS: tuple[str, ...] = (
    "REC_refcoco_unc_val",
    "REC_refcoco_unc_testA",
    "REC_refcoco_unc_testB",
    "REC_refcoco+_unc_val",
    "REC_refcoco+_unc_testA",
    "REC_refcoco+_unc_testB",
    "REC_refcocog_umd_val",
    "REC_refcocog_umd_test",
)

NOT_SAID = "not said"
Figures = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """Scores in percent, by model: the first of `columns` is the one that ranks, None is what the source lacks.

    `reading`, `judge` and `limit` (how large images were shown) say how they came about; `is_ranked` is false where the
    rows of one table did not come about alike.
    """

    benchmark: str
    source: str
    columns: tuple[str, ...]
    scores: Mapping[str, Figures]
    reading: str = NOT_SAID
    judge: str = NOT_SAID
    limit: str = NOT_SAID
    is_ranked: bool = True


_VISRL = "VisRL, arXiv 2503.07523"
_METHODS: tuple[str, ...] = ("base, no box", "SFT 30k", "RL stage 1", "RL stage 2")
_VISCOT: dict[str, tuple[float, float, float, float]] = {
    "LLaVA-1.5-7B": (44.4, 53.8, 56.8, 60.5),
    "LLaVA-NeXT-7B": (45.9, 55.6, 59.3, 62.8),
    "Llama-3.2-V-11B": (63.5, 72.4, 74.9, 78.6),
    "MiniCPM-o-2.6": (42.8, 51.9, 54.4, 59.1),
    "PaliGemma2-10B": (37.7, 47.9, 50.7, 56.2),
    "Yi-VL-6B": (38.9, 49.2, 52.3, 57.3),
    "Qwen2.5-VL-7B": (64.0, 73.0, 76.3, 79.6),
}
VISCOT_TABLE = PublishedTable(
    "viscot",
    _VISRL,
    ("mean",),
    {
        f"{base}, {method}": (score,)
        for base, scores in _VISCOT.items()
        for method, score in zip(_METHODS, scores, strict=True)
    },
    reading="a failed or unread judgement counts 0",
    judge="gpt-3.5-turbo-1106",
)
REFCOCO_TABLE = PublishedTable(
    "refcoco", _VISRL, ("val", "testA", "testB"), {"LLaVA-1.5, VisRL": (92.72, 96.18, 90.21)},
    reading="IoU above 0.5 by Visual-CoT's script", judge="none",
)  # fmt: skip


def missing_datasets(names: Collection[str]) -> list[str]:
    """The data sets of the Visual-CoT benchmark that are not among `names`."""
    return [name for name in VISCOT_QUESTIONS if name not in names]


def average(scores: Mapping[str, float]) -> float:
    """The unweighted mean over data sets, zeros included.

    Raises:
        ValueError: no data set.
    """
    if not scores:
        raise ValueError("an average over data sets needs at least one data set")
    return sum(scores.values()) / len(scores)


def average_published_detection(accuracies: Mapping[str, float]) -> float | None:
    """The detection average as published: data sets that score exactly 0 fall out of it. None where all do."""
    kept = [accuracy for accuracy in accuracies.values() if accuracy]
    return sum(kept) / len(kept) if kept else None


def average_published_answers(scores: Mapping[str, float]) -> float:
    """The answer average as published: each of the 11 data sets counts, a missing one as 0."""
    return sum(scores.get(name, 0.0) for name in VISCOT_QUESTIONS) / len(VISCOT_QUESTIONS)
