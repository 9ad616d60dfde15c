"""Self-evolution's sampling: ours against a straightforward loop over transformers' `generate`, on the same questions.

    python benchmarks/generation.py --shapes long,small,embedded --repeats 3 --json generation.json

Both draw N = 5 rounds of two boxes and an answer from each crop, by the same rollout code. The loop batches whole rows
(picture, question and crop, padded on the left) through `generate`, as one would write it first; ours computes picture
and question once and forks the cache. On the random models every text is cut at its length limit and boxes are written
by a script, so that both draw the same number of tokens; the embedded model ends its texts and writes its boxes itself.
With `--plain` our engine's plain form draws, too. Questions of all alternate, so that a busy machine is as busy for
each; `cpu` is the processor time of the process, which other work changes less than the clock. "Each call by itself"
counts the prompt tokens of every call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from layouts import SHAPES, make_model
from PIL import Image

from visrl.box import Box, Size
from visrl.codecs import Codec
from visrl.conversation import Conversation
from visrl.engines.base import Completion, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder, load_model
from visrl.models.settings import ModelSettings
from visrl.models.tiny import CHECKPOINT
from visrl.records import Sample, Trajectory
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.scenes import scene_samples
from visrl.sequences import batched

PATCH = 28  # pixels along a merged token's side
BOX_TOKENS, ANSWER_TOKENS = 18, 8  # of a random model's texts
LOOP_ROWS = 20  # rows of one `generate` call: two questions' worth
NEVER = -1  # the id of no token: texts of random models end at their limit


class GenerateLoop:
    """A policy over transformers' `generate`, as one would write it first: rows in, batches, texts out."""

    name = "generate"

    def __init__(self, model: torch.nn.Module, encoder: Encoder, *, ends: bool) -> None:
        self.model, self.encoder, self.ends = model, encoder, ends
        self.codec: Codec = encoder.codec
        encoder.tokenizer.padding_side = "left"

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        return self.encoder.processed_size(size, is_crop)

    def forget(self) -> None:
        """Nothing is kept."""

    @torch.inference_mode()
    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        rows = [talk for talk, own in zip(conversations, seeds, strict=True) for _ in own]
        texts: list[Completion] = []
        for part in batched(rows, LOOP_ROWS):
            texts += self._batch(part, sampling)
        drawn = iter(texts)
        return [[next(drawn) for _ in own] for own in seeds]

    def _batch(self, rows: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        paths = [self.encoder.encode(talk, [None])[0] for talk in rows]
        inputs = self.encoder.tokenizer.pad({"input_ids": [path.ids.tolist() for path in paths]}, return_tensors="pt")
        views = [view for path in paths for view in path.views]
        tokens = sampling.max_tokens
        out = self.model.generate(  # type: ignore[operator]
            **inputs,
            mm_token_type_ids=(inputs["input_ids"] == self.encoder.image_token_id).int(),
            pixel_values=torch.cat([view.inputs["pixel_values"] for view in views]),
            image_grid_thw=torch.cat([view.inputs["image_grid_thw"] for view in views]),
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=sampling.top_p,
            max_new_tokens=tokens,
            min_new_tokens=None if self.ends else tokens,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        return [
            Completion(self.encoder.decode(ids.tolist()), prompt_tokens=len(path.ids))
            for ids, path in zip(new, paths, strict=True)
        ]


class Scripted:
    """Draws a policy's texts, and puts boxes in the place of a random model's. Counts prompt tokens and calls."""

    def __init__(self, policy: Any, boxes: Sequence[Box], *, scripted: bool) -> None:
        self.policy, self.boxes, self.scripted = policy, boxes, scripted
        self.name, self.codec, self.processed_size = policy.name, policy.codec, policy.processed_size
        self.forget = policy.forget
        self.prompt_tokens = 0

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        first = len(conversations[0].views) == 1
        if self.scripted:
            sampling = Sampling(sampling.temperature, sampling.top_p, BOX_TOKENS if first else ANSWER_TOKENS)
        drawn = self.policy.complete(conversations, sampling, seeds)
        self.prompt_tokens += sum(one.prompt_tokens for own in drawn for one in own)
        if not (self.scripted and first):
            return drawn
        size = conversations[0].views[0].size
        texts = [self.codec.format(box, size, size) for box in self.boxes]
        return [[Completion(texts[n % len(texts)]) for n, _ in enumerate(own)] for own in drawn]


@dataclass(frozen=True)
class Setting:
    """One line of the benchmark: a model and its questions."""

    name: str
    folder: Path
    settings: ModelSettings
    samples: list[Sample]
    random: bool


def settings_of(name: str, folder: Path, questions: int) -> Setting:
    """The embedded model on drawn scenes, or a random model with as many image and crop tokens as the shape says."""
    if name == "embedded":
        samples = scene_samples("preference", 0, questions)
        return Setting(name, CHECKPOINT, ModelSettings.load(CHECKPOINT), samples, random=False)
    shape = SHAPES[name]
    make_model(folder / name, shape)
    side = int(shape.image_tokens**0.5) * PATCH
    pixels, crop_pixels = side**2, shape.crop_tokens * PATCH**2
    settings = ModelSettings(pixels, pixels, crop_pixels, crop_pixels)
    rng = np.random.default_rng(0)
    samples = []
    for n in range(questions):
        picture = folder / f"{name}-{n}.png"
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(picture)
        samples.append(Sample(str(n), str(picture), f"What is written on sign {n}?", "1"))
    return Setting(name, folder / name, settings, samples, random=True)


def boxes_of(count: int) -> list[Box]:
    """Square boxes of half the picture's side, each elsewhere."""
    places = np.linspace(0, 0.5, count)
    return [Box(round(x, 3), round(0.5 - x, 3), round(x + 0.5, 3), round(1.0 - x, 3)) for x in places.tolist()]


def engine_of(setting: Setting, layout: Literal["tree", "plain"]) -> LocalEngine:
    """Our engine for a setting's model; a random model ends no text by itself."""
    encoder = load_encoder(setting.folder, setting.settings, layout=layout)
    if setting.random:
        encoder.end_id = NEVER
    return LocalEngine(load_model(setting.folder).eval(), encoder)


def measure(setting: Setting, rounds: int, repeats: int, batch: int, *, plain: bool) -> dict[str, Any]:
    """Seconds and prefilled tokens per question of ours, the loop and the plain form, questions of all in turns."""
    ours = engine_of(setting, "tree")
    loop = GenerateLoop(
        load_model(setting.folder).eval(), load_encoder(setting.folder, setting.settings), ends=not setting.random
    )
    policies: dict[str, Any] = {"ours": ours, "loop": loop}
    if plain:
        policies["plain"] = engine_of(setting, "plain")
    boxes = boxes_of(2 * rounds)
    players = {name: Scripted(policy, boxes, scripted=setting.random) for name, policy in policies.items()}
    rolling = RolloutSettings(rounds=rounds, temperature=1.0, diversity=False)
    for player in players.values():  # warm
        roll_out(player, setting.samples[-1:], rolling)
    players["ours"].prompt_tokens = 0
    engines = {name: policy for name, policy in policies.items() if isinstance(policy, LocalEngine)}
    before = {name: engine.prefilled_tokens for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in players}
    cpu: dict[str, list[float]] = {name: [] for name in players}
    tried: dict[str, list[Trajectory]] = {name: [] for name in players}
    parts = batched(setting.samples, batch)
    for _ in range(repeats):
        for part in parts:
            for name, player in players.items():
                for policy in policies.values():
                    policy.encoder.forget()
                start, used = time.perf_counter(), time.process_time()
                tried[name] += roll_out(player, part, rolling)
                seconds[name].append((time.perf_counter() - start) / len(part))
                cpu[name].append((time.process_time() - used) / len(part))
    asked = repeats * len(setting.samples)
    prefilled = {name: (engine.prefilled_tokens - before[name]) / asked for name, engine in engines.items()}
    alone = players["ours"].prompt_tokens / asked
    ratios = {}
    for name in players.keys() - {"ours"}:
        prefix = "" if name == "loop" else f"{name}_"
        for kind, taken in (("", seconds), ("cpu_", cpu)):
            own = [b / a for a, b in zip(taken["ours"], taken[name], strict=True)]
            ratios[f"{prefix}{kind}speedup"] = round(statistics.median(own), 2)
            ratios[f"{prefix}{kind}speedups"] = [round(ratio, 2) for ratio in own]
    return {
        "shape": setting.name,
        "questions": asked,
        "rounds": rounds,
        "questions_together": batch,
        "answered": {name: sum(t.answer is not None for t in own) / len(own) for name, own in tried.items()},
        "prefilled_tokens_per_question": {name: round(count, 1) for name, count in prefilled.items()},
        "each_call_by_itself": round(alone, 1),
        "prefill_ratio": round(alone / prefilled["ours"], 2),
        "seconds_per_question": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "cpu_per_question": {name: round(statistics.median(times), 4) for name, times in cpu.items()},
        **ratios,
    }


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="long,small,embedded")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="questions rolled out together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="the plain form of our engine, too")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.shapes.split(","):
            # A tiny model's questions are cheap: more of them at once, as `visrl generate` does.
            many = 8 if name == "embedded" else 1
            setting = settings_of(name, Path(folder), many * given.questions)
            found.append(measure(setting, given.rounds, given.repeats, many * given.batch, plain=given.plain))
            print(json.dumps(found[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"threads": torch.get_num_threads(), "shapes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
