"""A protocol for models that write no boxes: every text is one. So a random model looks as often as it may."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import replace

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.zoom.calls import ZoomCall, ZoomTurn
from visrl.zoom.protocols import ZoomProtocol, visrl_looks

STOPS = tuple(string.ascii_letters + string.digits)  # so that a turn that is cut short has come to its end


def looking_anywhere(max_looks: int) -> Callable[[Codec, Size, Size, CropRule], ZoomProtocol]:
    """`visrl` with up to `max_looks` looks, where each text means a box of its own; one in four answers."""

    def read(text: str) -> ZoomTurn:
        chance = random.Random(text)
        if chance.random() < 0.25:
            return ZoomTurn(answer=text)
        x, y = chance.uniform(0, 0.6), chance.uniform(0, 0.6)
        return ZoomTurn((ZoomCall((x, y, x + 0.4, y + 0.4)),))

    def zoom(codec: Codec, original: Size, shown: Size, crop_rule: CropRule) -> ZoomProtocol:
        return replace(visrl_looks(codec, original, shown, crop_rule, max_looks), read=read, stop=STOPS)

    return zoom
