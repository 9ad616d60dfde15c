"""What a trial found out about the models of a config, as data: kept in a cache, made a family of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

# What a token of an image sees of its image, or of all images of its prompt, beside its ancestors.
Sight = Literal["ancestors", "own image in the window", "own image in sliding layers", "own image", "all images"]
# Along which dimension a processor's output for several images is joined; indices count patches of all images.
Axis = int | Literal["patches"]


@dataclass(frozen=True, slots=True)
class Measured:
    """How far the tree was from the model's own calls: the largest relative errors of log-probabilities and of
    gradients, and by how much a plain causal mask misses."""

    logps: float
    gradients: float
    causal: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """What the models of a config take, as it was held against their own calls.

    `types` are inputs that mark tokens, with the ids that they mark by 1; `counts` say how many images a prompt has;
    `image_ids` are what `mm_token_type_ids` marks, for positions of its own; `numbering` is what a processor writes
    around the number of an image in its prompt, before it.
    """

    takes: tuple[str, ...]
    axes: tuple[tuple[str, Axis], ...]
    positions: Literal["depth", "mrope", "own"]  # "own": as only the model's own method finds them
    sees: Sight
    shares: Literal["all", "pairs"]
    row_per_prompt: bool
    types: tuple[tuple[str, tuple[int, ...]], ...]
    counts: tuple[str, ...]
    image_ids: tuple[int, ...]
    numbering: tuple[str, str] | None
    pixel_limits: bool
    alone_differs: bool
    cached: bool  # whether a KV cache holds what comes before a token
    features: bool  # whether what the vision tower makes of an image by itself may be given in its place
    end_of_turn: str | None
    by_hand: bool  # whether it is an entry by hand that was held, masks and images its own
    measured: Measured

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)

    @staticmethod
    def of_json(values: dict[str, Any]) -> Found:
        """What `as_json` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        named = {field.name: _frozen(values[field.name]) for field in fields(Found)}
        return Found(**{**named, "measured": Measured(**values["measured"])})


@dataclass(frozen=True, slots=True)
class NotFound:
    """Why nothing was found, a sentence's end; and whether the model's own calls speak against all that was tried,
    rather than that it could not be tried."""

    reason: str
    contradicted: bool


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
