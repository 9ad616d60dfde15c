"""A made-up run folder for the tests of the report, laid out as `visrl demo` lays out its own."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from visrl.box import Box, iou
from visrl.manifest import write_manifest
from visrl.records import write_records
from visrl.rewards.grounding import is_grounded, is_on_right_object
from visrl.statistics import interval

STAGES = {"sft": 0.50, "iter0-stage1": 0.57, "iter0-stage2": 0.64, "iter1-stage1": 0.65, "iter1-stage2": 0.69}
CONTROLS = {"no_crop": 0.05, "other_question": 0.06, "random": 0.08, "center": 0.14, "truth": 0.93}
KINDS = ("colour", "left of", "count")
CARDS = ("#c8463c", "#3c7ac8", "#4f9d53", "#d9b23a")


def draw_scene(path: Path, rng: random.Random) -> list[Box]:
    """A picture of four cards with numbers on them; returns their boxes."""
    image = Image.new("RGB", (336, 336), "#f3efe6")
    draw = ImageDraw.Draw(image)
    corners = []
    for index, colour in enumerate(CARDS):
        x, y = 20 + 165 * (index % 2) + rng.randrange(70), 20 + 165 * (index // 2) + rng.randrange(90)
        corners.append((x, y, x + 66, y + 40))
        draw.rectangle(corners[-1], fill=colour)
        draw.text((x + 24, y + 13), str(rng.randrange(10, 99)), fill="white")
    image.save(path)
    return [Box.from_pixels(box, image.size) for box in corners]


def eval_row(name: str, number: int, scene: tuple[str, list[Box]], skill: float, rng: random.Random) -> dict:
    """An evaluation row: the more the skill, the nearer the box and the oftener the answer is right. Questions of even
    number are about the first card of a picture, those of odd number about the second."""
    picture, cards = scene
    true = cards[number % 2]
    shift = (1 - skill) * 0.25 * rng.gauss(0, 1)
    x, y = min(max(true.x0 + shift, 0), 0.75), min(max(true.y0 + shift / 2, 0), 0.75)
    box = None if rng.random() < 0.03 else Box(x, y, x + true.width, y + true.height)
    right = rng.random() < skill
    card = ("red", "blue")[number % 2]
    return {
        "id": f"test-{number}", "kind": KINDS[number % 3], "question": f"Which number is on the {card} card?",
        "answer": "42", "image": picture, "true_box": true.as_list(), "box": box and box.as_list(),
        "box_text": str(box and box.as_list()), "prediction": None if box is None else "42" if right else "17",
        "correct": right and box is not None, "iou": iou(box, true) if box else 0.0, "error": None,
        "right_object": is_on_right_object(box, true, [card for card in cards if card != true]),
        "grounded": is_grounded(box, true, (336, 336), "exact"),
    }  # fmt: skip


def measures(rows: list[dict]) -> dict:
    return {
        "answer_accuracy": interval([float(row["correct"]) for row in rows]),
        "box_iou": interval([row["iou"] for row in rows]),
        "box_accuracy_50": interval([float(row["iou"] > 0.5) for row in rows]),
        "right_object": interval([float(row["right_object"]) for row in rows]),
        "n": len(rows),
    }


def verdict(tried: dict) -> dict:
    """What a model critic said of a try: nothing of one without a box, and now and then what cannot be read."""
    key = {name: tried[name] for name in ("sample_id", "round", "branch")}
    if tried["error"]:
        return {**key, "box_score": None, "answer_score": None, "raw": tried["error"]}
    unread = tried["seed"] % 100 == 10
    replies = {"box": ["1"], "answer": ["hm"] * 3 if unread else ["0"]}
    raw = json.dumps({what: {"replies": said, "error": None} for what, said in replies.items()})
    return {**key, "box_score": 1.0, "answer_score": None if unread else 0.0, "raw": raw}


def write_training(run: Path, iteration: int, rng: random.Random) -> None:
    """The generate, filter and train folders of one iteration."""
    folder = run / f"iter{iteration}"
    tries = [
        {"sample_id": f"pref-{index // 6}", "round": index % 3, "branch": index % 2, "box_text": "[0, 0, 1, 1]",
         "box": None if index % 50 == 0 else [0, 0, 1, 1], "origin": "random" if index % 5 == 0 else "sampled",
         "answer": "42", "engine": "local", "seed": index, "error": "box: no box" if index % 50 == 0 else None}
        for index in range(240)
    ]  # fmt: skip
    write_records(folder / "generate/trajectories.jsonl", tries)
    write_records(folder / "generate/verdicts.jsonl", [verdict(row) for row in tries])
    write_records(folder / "filter/preferences.jsonl", [{"id": f"pref-{index}", "step": "box"} for index in range(22)])
    sampled = {"answers": 4, "critic": "0f3a", "grader": "exact"}
    write_manifest(folder / "generate", verb="generate", config=sampled, parents={}, critic="outcome:exact")
    own = {"losers": "own", "min_difference": 0.5}
    paper = {"losers": "paper", "rule": "paper", "t_max": 0.8, "t_min": 0.2, "use_box_critic": True}
    for name, rule, kept, tokens in (("filter", own, 22, 512.4), ("filter-paper", paper, 9, 1252.5)):
        boxes = {"WP-LP": 1, "WP-LN": kept - 3, "WN-LP": 0, "WN-LN": 2}
        counts = {"questions": 40, "kept": kept, "boxes": boxes, "sampled_tokens_per_pair": tokens}
        write_manifest(folder / name, verb="filter", config=rule, parents={}, counts=counts)
    for stage in (1, 2):
        rows = []
        for step in range(1, 61):
            grown = 1 - math.exp(-step / 25)
            row = {"step": step, "loss": 0.69 - 0.3 * grown + rng.gauss(0, 0.02)}
            for kind in ("box", "answer")[:stage]:
                row |= {
                    f"rewards/margins/{kind}": 1.2 * grown + rng.gauss(0, 0.1),
                    f"rewards/accuracies/{kind}": min(1, 0.5 + 0.4 * grown + rng.gauss(0, 0.05)),
                    f"logps/chosen/{kind}": -6 + grown + rng.gauss(0, 0.2),
                    f"logps/rejected/{kind}": -8 - 3 * grown + rng.gauss(0, 0.2),
                }
            if step % 15 == 0:
                row |= {
                    "eval_rollout/iou": 0.6 + 0.1 * grown,
                    "eval_rollout/accuracy": 0.5 + 0.1 * grown,
                    "eval_rollout/parse_rate": 1,
                }
            rows.append(row)
        write_records(folder / f"stage{stage}/log.jsonl", rows)
        write_manifest(folder / f"stage{stage}", verb="train", config={"rl_stage": stage, "pref_beta": 0.1}, parents={})


def write_run(run: Path, questions: int = 60) -> Path:
    """A finished run as `visrl demo` lays it out, with made-up numbers and pictures drawn here."""
    rng = random.Random(7)
    (run / "pictures").mkdir(parents=True)
    scenes = []
    for number in range(0, questions, 2):
        path = run / f"pictures/{number}.png"
        scenes += 2 * [(str(path), draw_scene(path, rng))]
    summary: dict = {"seed": 88, "stages": [], "controls": {}, "controls_last": {}, "pairs": []}
    for name, skill in STAGES.items():
        rows = [eval_row(name, number, scene, skill, rng) for number, scene in enumerate(scenes)]
        write_records(run / f"eval/{name}.jsonl", rows)
        kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
        by_kind = {kind: {"answer_accuracy": measures(group)["answer_accuracy"]["mean"],
                          "box_iou": measures(group)["box_iou"]["mean"],
                          "right_object": measures(group)["right_object"]["mean"], "n": len(group)}
                   for kind, group in kinds.items()}  # fmt: skip
        iteration, _, stage = name.removeprefix("iter").rpartition("-")
        summary["stages"].append(
            {"name": stage, "iteration": int(iteration or 0), **measures(rows), "by_kind": by_kind}
        )
    for key, name in (("controls", "sft"), ("controls_last", "iter1-stage2")):
        for mode, skill in CONTROLS.items():
            rows = [eval_row(name, number, scene, skill, rng) for number, scene in enumerate(scenes)]
            write_records(run / f"eval/{name}.{mode}.jsonl", rows)
            summary[key][mode] = measures(rows)
    for iteration in (0, 1):
        write_training(run, iteration, rng)
        dropped = {"no_winner": 8, "no_loser": 6, "neither": 3, "same_text": 1}
        summary["pairs"].append({"iteration": iteration, "questions": 40, "kept": 22, "dropped_by_reason": dropped,
                                 "trajectories": 240})  # fmt: skip
    summary |= {"seconds": 512.0, "seconds_by_step": {"generate 0": 120.0, "stage1 0": 61.0, "evaluate": 190.0},
                "peak_rss_mb": 1834, "versions": {"visrl": "0.1.0", "torch": "2.15"}}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run
