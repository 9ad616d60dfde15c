"""What a crop is worth, over result rows: grounded × right, and what crops gain and harm. Counts; knows no policy.

An answer is grounded where its crop holds the evidence (`grounding.is_grounded`). Crop gain and harm compare a run with
one of the same questions without a crop (mode "no_box" or "no_crop"): answers right with the crop alone, and right
without it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from visrl.rewards.results import RIGHT_BY, Row, applies, group_of, is_right, key_of
from visrl.statistics import paired

BASELINES = ("no_box", "no_crop")  # modes without a crop
QUADRANTS = ("grounded_right", "grounded_wrong", "ungrounded_right", "ungrounded_wrong")


def quadrants(rows: Iterable[Row], right_by: str = "correct") -> dict[str, int]:
    """How many answers are grounded and right, grounded and wrong, and so on: `QUADRANTS`, which sum to `n`.

    `left_out` counts rows of which it is not known whether their crop holds the evidence, for it was never asked for or
    no reply came. Empty where that is not known of any row.
    """
    rows = [row for row in rows if not row.get("skipped")]
    known = [row for row in rows if row.get("grounded") is not None]
    cells = Counter(_quadrant(row, right_by) for row in known)
    return (
        {**{name: cells[name] for name in QUADRANTS}, "n": len(known), "left_out": len(rows) - len(known)}
        if known
        else {}
    )


def _quadrant(row: Row, right_by: str) -> str:
    return f"{'grounded' if row['grounded'] else 'ungrounded'}_{'right' if is_right(row, right_by) else 'wrong'}"


def gain_and_harm(without: Iterable[Row], with_crop: Iterable[Row], seed: int = 0) -> dict[str, Any]:
    """What `with_crop` gains and harms over `without`, question by question; `{}` where they share no question that
    both say to be right or wrong.

    `{"right_by", "n", "both", "gain", "harm", "neither", "with", "without", "difference", "low", "high", "p_mcnemar"}`:
    `gain` counts the questions right with the crop alone, `harm` those right without it alone, and
    `(gain − harm) / n` is the difference of the two accuracies, exactly. A question without a reply counts as wrong.
    The interval is that of `statistics.paired`, over whole questions where one has several rows.
    """
    before = {key_of(row): row for row in without if not row.get("skipped")}
    pairs = [(before[key_of(row)], row) for row in with_crop if not row.get("skipped") and key_of(row) in before]
    right_by = next((name for name in RIGHT_BY if _is_known(pairs, name)), None)
    if right_by is None:
        return {}
    a, b = ([float(is_right(row, right_by)) for row in side] for side in zip(*pairs, strict=True))
    groups = [group_of(row) or key_of(row) for _, row in pairs]
    cells = Counter(zip(a, b, strict=True))
    return {
        "right_by": right_by,
        "n": len(pairs),
        "both": cells[1, 1],
        "gain": cells[0, 1],
        "harm": cells[1, 0],
        "neither": cells[0, 0],
        "without": sum(a) / len(a),
        "with": sum(b) / len(b),
        **paired(a, b, seed, groups=groups),
    }


def _is_known(pairs: Sequence[tuple[Row, Row]], column: str) -> bool:
    """Whether both sides have values in a column."""
    return all(
        any(applies(pair[side], column) and pair[side].get(column) is not None for pair in pairs) for side in (0, 1)
    )
