"""The table of docs/FAMILIES.md that says what trials find: run as a script, it measures every family and prints it.

python tests/family_table.py
"""

from __future__ import annotations

from typing import Any

import more_families
import tiny_families
import torch

from visrl.models.derive import decoding, found_family
from visrl.models.families import FAMILIES
from visrl.models.probe import NoProof, prove

HEAD = (
    "| family | shares | decoding in this process | known | log-probabilities | gradients | a causal mask | seconds |\n"
    "|---|---|---|---|---|---|---|---|"
)
MADE = {**tiny_families.MAKERS, **more_families.MORE}


def words_of(family: Any) -> str:
    """The columns that say what a family takes, which are the same in every run."""
    shares = "every branch" if family.shares == "all" else "chosen and rejected"
    return f"{shares} | {decoding(family)}"


def row_of(name: str) -> str:
    """A family's row, measured now."""
    torch.manual_seed(0)
    model, processor = MADE[name]()
    try:
        found = prove(processor, model.config)
    except NoProof as error:
        entry = FAMILIES.get(name)
        if entry is None:
            return f"| {name} | – | – | no: {error} | – | – | – | – |"
        return f"| {name} | {words_of(entry)} | by hand | – | – | – | – |"
    known = "by trial, and by hand" if name in FAMILIES else "by trial"
    known = "by hand, held by trial" if found.by_hand else known
    one = found.measured
    figures = f"{one.logps:.0e} | {one.gradients:.0e} | {one.causal:.0e} | {one.seconds:.1f}"
    return f"| {name} | {words_of(found_family(found, model.config))} | {known} | {figures} |"


if __name__ == "__main__":
    print(HEAD)
    for name in sorted(MADE):
        print(row_of(name), flush=True)
