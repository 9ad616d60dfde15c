"""When a run is no success: too large a share of what it asked for failed. One rule for every verb that asks models.

A failure is what the software, a server or a file did not give: no reply, no image. A reply that is wrong, a box that
cannot be read, or a control for which there is no true box is a result. A sample that the model cannot be shown
(`prompt`) fails whenever it is asked: no share of such samples makes a run a failed one, unless they are all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from visrl.errors import UserError

MAX_FAILED = 0.2  # the default of the key `max_failed`: the share that may fail in a run that counts as a success
_RESULTS = ("box", "no_room", "control")  # first words of errors that are results (see rollout/rollout.py)


class FailedRun(UserError, RuntimeError):
    """A run of which too much failed; the message says how much, of what, why first, and what to do."""


def is_failure(error: str | None) -> bool:
    """Whether the error of a rollout or of a result row is a failure, and not the model's own doing."""
    return error is not None and error.split(":")[0] not in _RESULTS


@dataclass(slots=True)
class Tally:
    """How much of a run failed so far. `what` names one thing asked for, in the plural ("trajectories")."""

    what: str
    max_failed: float
    seen: int = 0
    failed: int = 0
    refused: int = 0  # of those, what the model cannot be shown
    first: str = ""  # the first failure, in words

    def count(self, errors: Iterable[str | None]) -> None:
        """Count things that were done: None for a success, else what went wrong."""
        for error in errors:
            self.seen += 1
            if error is not None:
                self.failed += 1
                self.refused += error.startswith("prompt:")
                self.first = self.first or error

    def is_hopeless(self, total: int | None = None) -> bool:
        """Whether a run of `total` things (None: those seen) cannot be a success any more, whatever is left of it."""
        whole = max(self.seen, total or 0)
        return self.failed > 0 and (self.failed - self.refused > self.max_failed * whole or self.failed == whole)

    def sentence(self) -> str:
        """How much failed, and why the first did."""
        share = "all" if self.failed == self.seen else f"more than max_failed={self.max_failed:g}"
        return f"{self.failed:,} of {self.seen:,} {self.what} failed ({share}), the first with: {self.first}"

    def refuse(self, kept: str) -> FailedRun:
        """The error to raise; `kept` says what is kept of the run."""
        return FailedRun(
            f"{self.sentence()}\nThis run is not complete; {kept}. Mend the cause and give the same command again, "
            "which tries again what failed; max_failed is the share that may fail"
        )
