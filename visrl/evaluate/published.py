"""What others published, as data: the benchmark's make-up and the scores that ours are shown beside.

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

JUDGE = "gpt-3.5-turbo-1106"
JUDGE_NOTE = (
    "Published scores were given by gpt-3.5-turbo-1106. Scores of another judge are not on the same scale: "
    "compare rows with one judge only, and see the agreement between judges before reading anything into a gap."
)


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """One cell of a published table: the unweighted mean over the 11 data sets, a fraction of 1."""

    base: str
    method: str
    score: float
    judge: str = JUDGE
    source: str = "VisRL, arXiv 2503.07523"


METHODS: tuple[str, ...] = ("base, no box", "SFT 30k", "RL stage 1", "RL stage 2")
_VISCOT: dict[str, tuple[float, float, float, float]] = {
    "LLaVA-1.5-7B": (0.444, 0.538, 0.568, 0.605),
    "LLaVA-NeXT-7B": (0.459, 0.556, 0.593, 0.628),
    "Llama-3.2-V-11B": (0.635, 0.724, 0.749, 0.786),
    "MiniCPM-o-2.6": (0.428, 0.519, 0.544, 0.591),
    "PaliGemma2-10B": (0.377, 0.479, 0.507, 0.562),
    "Yi-VL-6B": (0.389, 0.492, 0.523, 0.573),
    "Qwen2.5-VL-7B": (0.640, 0.730, 0.763, 0.796),
}
VISCOT_SCORES: tuple[PublishedScore, ...] = tuple(
    PublishedScore(base, method, score)
    for base, scores in _VISCOT.items()
    for method, score in zip(METHODS, scores, strict=True)
)

# Score after iterations 0 to 4 of generating anew and training again.
ITERATIONS: dict[str, tuple[float, ...]] = {
    "Qwen2.5-VL-7B": (0.796, 0.801, 0.808, 0.812, 0.815),
    "LLaVA-1.5-7B": (0.605, 0.616, 0.625, 0.631, 0.635),
}
# RefCOCO accuracy at IoU > 0.5 of LLaVA-1.5 trained with VisRL, fractions of 1.
REFCOCO_SCORES: dict[str, float] = {
    "REC_refcoco_unc_val": 0.9272,
    "REC_refcoco_unc_testA": 0.9618,
    "REC_refcoco_unc_testB": 0.9021,
}


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
