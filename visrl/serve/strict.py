"""What the parts of a request have in common: what they do not know is refused, and a fault names its place."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def fault(message: str, *at: str | int) -> PydanticCustomError:
    """What a validator raises; `at` leads from where it stands to the field that is wrong."""
    return PydanticCustomError("fault", "{message}", {"message": message, "at": at})


class Strict(BaseModel):
    """A part of a request: what it does not know is refused, unless it says nothing."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _knows_all(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, ""):
                raise fault("not supported by this server; leave it out", name)
        return self
