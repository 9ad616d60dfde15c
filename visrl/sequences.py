"""What is done with any list, whatever is in it. Python 3.12 has `itertools.batched`; 3.11 does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

Items = TypeVar("Items", bound=Sequence[Any])


def batched(items: Items, size: int) -> list[Items]:
    """`items` in batches of `size` with fixed members, in order; the last one may hold fewer."""
    return [cast(Items, items[start : start + size]) for start in range(0, len(items), size)]
