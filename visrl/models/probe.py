"""Which family a checkpoint's model is of, and whether its models take a prefix tree: by its entry, else in the plain
form."""

from __future__ import annotations

from typing import Any

from visrl.models.families import Family, family_of


def find_family(processor: Any, config: Any) -> Family:
    """The family of a processor and a config. `Family.plain` says why its models take no prefix tree, where they take
    none: such a model trains and decodes in the plain form."""
    return family_of(config)
