"""Draws house.svg: the rooms of the package in their order, and three journeys through them.

    python docs/images/house.py

The test of the order (tests/test_architecture.py) holds the rooms against the package and the picture against this
file.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path

# A line of the picture: the rooms that share it, and what they are for. Who stands lower uses who stands higher.
ROOMS: list[tuple[tuple[str, ...], str]] = [
    (
        ("callable_package", "errors", "yaml_text", "redact", "foreign", "plugins", "failures", "config"),
        "keys, and how a run ends",
    ),
    (
        ("prompts", "replies", "sequences", "statistics", "progress", "codecs", "box", "records"),
        "boxes, records, box ↔ text",
    ),
    (("data_url", "image_files", "image_modes", "image_rows", "scenes", "pages", "images"), "what is seen"),
    (("manifest", "conversation"), "what made a folder; what is said to a model"),
    (("zoom",), "several looks: one table of protocols"),
    (("data",), "one table of formats: rows → samples, preferences"),
    (("models",), "families, encoding, loading, adapters"),
    (("packing",), "prefix trees as one packed sequence"),
    (("engines",), "continuous batching over a prefix KV cache"),
    (("rollout",), "box → crop → answer, as pure steps"),
    (("rewards", "policy"), "critics, metrics, judges; results; a policy at work"),
    (("train",), "losses, trainer, reference, export"),
    (("evaluate",), "one table of benchmarks; judging, comparing"),
    (("report",), "a run as one page"),
    (("evolve",), "generate → filter → train, in iterations"),
    (("serve",), "the OpenAI protocol; MODEL:focus"),
    (("environment", "cli"), "the verbs: parse, then import"),
]

# A journey: its name, its colour, and its stations in order, each a room and what happens there.
JOURNEYS: list[tuple[str, str, list[str]]] = [
    ("a sample → a loss", "#b3541e", ["cli", "data", "models", "packing", "train"]),
    ("a request → a token", "#1f6f8b", ["cli", "serve", "rollout", "models", "engines"]),
    ("a question → a score", "#4b7d2b", ["cli", "evaluate", "rollout", "engines", "rewards"]),
]

FOLDERS = {path.parent.name for path in (Path(__file__).parents[2] / "visrl").glob("*/__init__.py")}
TOP, STEP, WIDTH = 70, 46, 1120
LINES, ROOM, TEXT = 750, 16, 262  # x of the first journey, of the names and of what they are for
APART = 140


def height(line: int) -> int:
    """y of the middle of a line of rooms."""
    return TOP + STEP * line + STEP // 2


def line_of(room: str) -> int:
    return next(number for number, (rooms, _) in enumerate(ROOMS) if room in rooms)


def shown(rooms: tuple[str, ...]) -> str:
    """A line's name: a folder by itself, or the first files of many."""
    names = [f"{room}/" if room in FOLDERS else room for room in rooms]
    return " · ".join(names[-2:]) + (" …" if len(names) > 2 else "")


def draw() -> str:
    """The picture."""
    bottom = TOP + STEP * len(ROOMS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 16}" role="img" '
        'aria-label="The rooms of visrl in their order, with three journeys" '
        'font-family="system-ui, sans-serif" font-size="15">',
        f'<rect width="{WIDTH}" height="{bottom + 16}" fill="#fcfbf8"/>',
        f'<text x="{ROOM}" y="36" fill="#555">a room uses only what stands above it</text>',
    ]
    for number, (rooms, purpose) in enumerate(ROOMS):
        y = TOP + STEP * number
        folder = bool(FOLDERS & set(rooms)) and "pages" not in rooms
        parts += [
            f'<rect x="8" y="{y + 3}" width="{WIDTH - 16}" height="{STEP - 6}" rx="6" '
            f'fill="{"#f1ede3" if folder else "#f7f4ec"}"/>',
            f'<text x="{ROOM + 4}" y="{y + 28}" font-weight="600" fill="#222">{escape(shown(rooms))}</text>',
            f'<text x="{TEXT}" y="{y + 28}" fill="#444">{escape(purpose)}</text>',
        ]
    for number, (name, colour, stations) in enumerate(JOURNEYS):
        x = LINES + APART * number
        for y, words in zip((28, 50), name.split("→"), strict=True):
            arrow = "→" if y == 50 else ""
            parts.append(
                f'<text x="{x}" y="{y}" text-anchor="middle" font-weight="600" fill="{colour}">{arrow}{words}</text>'
            )
        places = [height(line_of(room)) for room in stations]
        for leg, (start, end) in enumerate(pairwise(places)):
            bend = 26 + 8 * (leg % 3)
            side = bend if end > start else -bend
            parts.append(
                f'<path d="M {x} {start} C {x + side} {start}, {x + side} {end}, {x} {end}" '
                f'fill="none" stroke="{colour}" stroke-width="2.5" opacity="0.55"/>'
            )
        for place, y in enumerate(places, start=1):
            parts += [
                f'<circle cx="{x}" cy="{y}" r="12" fill="{colour}"/>',
                f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="#fff" font-size="14">{place}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("house.svg").write_text(draw(), encoding="utf-8")
