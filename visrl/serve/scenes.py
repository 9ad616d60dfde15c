"""Scenes that the page shows to who has no image at hand: drawn as often as a person asks, whoever asks."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque

from visrl.engines.endpoint import data_url
from visrl.scenes import choose_questions, draw_anew, make_scene

SCENES = 1000  # of which one is drawn
SCENE_S = 0.2  # between two drawings; who asks faster gets one that is drawn already
KEPT_SCENES = 32
QUESTIONS = 6  # that are suggested, of different tags first


class Scenes:
    """Drawn scenes as JSON, a new one as often as `SCENE_S` allows."""

    def __init__(self) -> None:
        self.drawn: deque[bytes] = deque(maxlen=KEPT_SCENES)
        self.drawing: asyncio.Task[None] | None = None
        self.next = 0.0

    async def one(self) -> bytes:
        if self.drawn and time.monotonic() < self.next:
            return secrets.choice(self.drawn)
        if self.drawing is None or self.drawing.done():
            self.drawing = asyncio.ensure_future(self._draw())
        await asyncio.shield(self.drawing)  # who leaves does not stop it for the others
        return self.drawn[-1]

    async def _draw(self) -> None:
        self.drawn.append(await asyncio.to_thread(_draw_scene))
        self.next = time.monotonic() + SCENE_S


def _draw_scene() -> bytes:
    scene = make_scene("test", secrets.randbelow(SCENES))
    questions = [question.text for question in choose_questions(scene, QUESTIONS)]
    shown = {"name": f"scene {scene.index}", "picture": data_url(draw_anew(scene)), "questions": questions}
    return json.dumps(shown).encode()
