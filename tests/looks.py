"""Questions whose every turn of several looks is given: forks at every depth, leaves of different depths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from test_families import picture

from visrl.box import Box, Size
from visrl.codecs import Codec
from visrl.conversation import Conversation, View
from visrl.models.encode import Encoder
from visrl.prompts import IMAGE
from visrl.train.items import Item, TrainingRow
from visrl.zoom.episode import Episode, advance, begin
from visrl.zoom.protocols import ZOOM_PROTOCOLS, ZoomProtocol, visrl_looks

WIDTH, HEIGHT = 120, 80  # of the picture
Looks = Callable[[int, int], str]  # of depth and child: the turn that looks


def box_at(depth: int, child: int) -> Box:
    return Box(0.05 * depth + 0.3 * child, 0.1, 0.05 * depth + 0.3 * child + 0.35, 0.55 + 0.05 * depth)


def visrl_look(codec: Codec, shown: Size) -> Looks:
    return lambda depth, child: codec.format(box_at(depth, child), (WIDTH, HEIGHT), shown)


def mini_o3_look(depth: int, child: int) -> str:
    """Every second turn looks into the crop of the turn before it."""
    source = f"observation_{depth}" if depth % 2 else "original_image"
    box = [round(value, 2) for value in box_at(depth, child).as_list()]
    return f'<think>{depth}</think><grounding>{{"bbox_2d": {box}, "source": "{source}"}}</grounding>'


def turns(episode: Episode, look: Looks, shown: Size, depth: int) -> list[tuple[Conversation, tuple[str, ...]]]:
    """What is said in every state that follows `episode` down to `depth` looks: an answer, and two looks, one of which
    is answered at once, while the other goes on."""
    done, ends = len(episode.looks), "</answer>" if episode.protocol.keeps_turns else ""
    answer = f"<answer>{done}{ends}" if ends else f"{done} of 7"
    if done == depth:
        return [(episode.conversation, (answer,))]
    on, aside = (advance(episode, look(done, child), shown) for child in (0, 1))
    assert [len(one.looks) for one in (on, aside)] == [done + 1] * 2, (on.errors, on.end)
    said = (answer, look(done, 0), look(done, 1))
    return [(episode.conversation, said), (aside.conversation, (answer,)), *turns(on, look, shown, depth)]


def items_of(encoder: Encoder, protocol: str, depths: tuple[int, ...] = (6, 1)) -> list[Item]:
    """A question each, in the `visrl` protocol or a public one, with that many looks."""
    shown = encoder.processed_size((WIDTH, HEIGHT))
    items = []
    for number, depth in enumerate(depths):
        whole = View(f"whole {number}", picture(number, WIDTH, HEIGHT))
        how: ZoomProtocol
        if protocol == "visrl":
            how = visrl_looks(encoder.codec, (WIDTH, HEIGHT), shown, "exact", depth)
            look = visrl_look(encoder.codec, shown)
        else:
            row = ZOOM_PROTOCOLS[protocol]  # its long texts left out: a token of tiny models is a letter
            how = replace(row, system=None, observe=lambda crop: f"Observation {crop.number}: {IMAGE}")
            look = mini_o3_look
        said = turns(begin(how, "Which number is larger?", whole), look, shown, depth)
        rows = tuple(
            TrainingRow(
                f"{number}/{place}", "box" if len(texts) > 1 else "answer", talk,
                tuple(zip(("target", "chosen", "rejected"), texts, strict=False)),
            )
            for place, (talk, texts) in enumerate(said)
        )  # fmt: skip
        items.append(Item(str(number), rows))
    return items
