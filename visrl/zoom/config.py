"""The keys of several looks, which evaluation, generation and online reinforcement share. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from pydantic import Field, model_validator

from visrl.config import Config
from visrl.zoom.protocols import MOST_LOOKS, ZOOM_PROTOCOLS, Fault


class LooksConfig(Config):
    """How often a model may look, and by which protocol."""

    protocol: str | None = None
    """"visrl", the published one, or a public protocol of several looks (deepeyes, mini_o3, …)."""
    protocol_faults: list[Fault] = Field(default_factory=list)
    """Faults of a public protocol's own code that are to be followed, by name (docs/EVALUATION.md)."""
    max_looks: int | None = Field(None, ge=0, le=MOST_LOOKS)
    """protocol=visrl and viscot: as many looks as the model wants, up to so many; one look, always, if left out."""

    @model_validator(mode="after")
    def _looks_together(self) -> Self:
        if self.max_looks is not None and self.protocol not in (None, "visrl", "viscot"):
            raise ValueError(f"max_looks is for protocol=visrl and viscot; {self.protocol} has its own limits")
        if self.protocol not in ZOOM_PROTOCOLS:
            if self.protocol_faults:
                raise ValueError(f"protocol_faults needs one of the protocols {', '.join(ZOOM_PROTOCOLS)}")
            return self
        if getattr(self, "crop_rule", None) is not None:
            raise ValueError(f"crop_rule: {self.protocol} says itself what is cropped")
        try:
            ZOOM_PROTOCOLS[self.protocol].with_faults(*self.protocol_faults)
        except ValueError as error:
            raise ValueError(f"protocol_faults: {error}") from error
        return self

    def check_protocol(self) -> None:
        """Refuse what is neither `visrl` nor a public protocol, where nothing else is known how to ask by.

        Raises:
            ValueError: it is.
        """
        if self.protocol is not None and self.protocol != "visrl" and self.protocol not in ZOOM_PROTOCOLS:
            raise ValueError(f"protocol: Input should be 'visrl', {', '.join(map(repr, ZOOM_PROTOCOLS))}")

    @property
    def looks_several_times(self) -> bool:
        """Whether the model says how often it looks, where one look was the rule."""
        return self.max_looks is not None or self.protocol in ZOOM_PROTOCOLS


class SampledLooksConfig(LooksConfig):
    """How looks are sampled to be compared: many first turns, several turns after each of the first looks, then one."""

    num_forks: int = Field(1, ge=0, le=MOST_LOOKS)
    """After so many looks, one after the other, several next turns are sampled; later ones go on once."""

    @model_validator(mode="after")
    def _forks_together(self) -> Self:
        self.check_protocol()
        if not self.looks_several_times and self.num_forks != 1:
            raise ValueError("num_forks: one look is always taken; set max_looks or a protocol, or leave the key out")
        return self

    @property
    def most_looks(self) -> int:
        """How many turns there can be after the first."""
        row = ZOOM_PROTOCOLS.get(self.protocol or "")
        return row.max_turns - 1 if row else self.max_looks or 0

    def check_forks(self, width: str, has_width: bool) -> None:
        """Refuse forks that no look allows. `width` is the key that says how many turns are sampled after a look, and
        `has_width` whether it says anything.

        Raises:
            ValueError: so it is; the message names the key.
        """
        if self.num_forks > max(self.most_looks, 1):
            raise ValueError(f"num_forks: there are at most {self.most_looks} turns after the first; give no more")
        if has_width and not min(self.num_forks, self.most_looks):
            raise ValueError(f"{width}: no look is gone on from several times; raise num_forks, or leave the key out")

    def recorded(self, exclude: Iterable[str] = ()) -> dict[str, Any]:
        """As `Config.recorded`; manifests from before there were several looks name no protocol."""
        return super().recorded({*exclude, "protocol"} if self.protocol is None else exclude)


class LookPriceConfig(Config):
    """What a look costs."""

    look_price: float = Field(0.0, ge=0, le=1)
    """The share that every look takes off what is left of its answer's reward."""


class ForkedLooksConfig(SampledLooksConfig, LookPriceConfig):
    """How looks are sampled, and what one costs."""

    @model_validator(mode="after")
    def _price_of_several(self) -> Self:
        if not self.looks_several_times and self.look_price:
            raise ValueError("look_price: one look is always taken; set max_looks or a protocol, or leave the key out")
        return self
