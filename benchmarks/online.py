"""Online steps: the packed tree against one row per rollout, on one random Qwen2-VL of each shape of training.py.

A question has 8 boxes and 4 answers from the crop of each: 40 responses. One row per rollout computes every one of them
as a whole sequence, its pictures included, in padded batches of boxes and of answers; the tree computes what they
share once. Both get the same sampled ids and the same advantages, train in fp32 and take the same GRPO loss.

    python benchmarks/online.py --shapes small,long --json online.json

FLOPs are counted with torch.utils.flop_counter over forward and backward pass. The floor is each distinct token forward
and backward once, every token attending to its ancestors only. Seconds are processor time of a forward and backward
pass, the layouts taking turns. `prefill_ratio` is how many prompt tokens a sampler computes that shares nothing between
calls, over those that the prefix KV cache computes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from layouts import ANSWER, BOX, PATCH, QUESTION, SHAPES, Shape, make_model, padded
from PIL import Image
from torch import Tensor, nn
from training import flops, token_flops, tower_flops
from transformers.utils import logging

from visrl.conversation import Conversation, Message, View
from visrl.engines.base import Completion, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder, load_model
from visrl.packing.forward import token_logps
from visrl.packing.pack import TIGHT_BUCKET
from visrl.prompts import IMAGE
from visrl.train.items import Collator
from visrl.train.online_losses import ONLINE_LOSSES, batch_loss
from visrl.train.online_rollouts import Response, pack_responses

LOSS = ONLINE_LOSSES["grpo"]
BOXES, ANSWERS = 8, 4  # of a question, and from each crop


class Rollouts:
    """Random questions of a shape, with random responses as if they had been sampled: digits, a token each."""

    def __init__(self, encoder: Encoder, shape: Shape, boxes: int, answers: int) -> None:
        self.encoder = encoder
        self.rng = np.random.default_rng(0)
        self.talks: list[tuple[Conversation, list[Conversation]]] = []  # of a question: where to look, and each crop
        self.responses: list[list[Response]] = []
        for n in range(shape.pictures):
            whole = View(str(n), self._picture(shape.image_tokens))
            self._ask(shape, f"{n}", whole, boxes, answers)

    def _picture(self, tokens: int) -> Image.Image:
        side = int(tokens**0.5) * PATCH
        return Image.fromarray(self.rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    def _ask(self, shape: Shape, name: str, whole: View, boxes: int, answers: int) -> None:
        question = "".join(map(str, self.rng.integers(0, 10, QUESTION)))
        # The question alone, without the sentences of the prompts: its length is part of the shape.
        box_talk = Conversation((Message("user", f"{IMAGE}\n{question}"),), (whole,))
        crops = [View(f"{name}#{b}", self._picture(shape.crop_tokens), is_crop=True) for b in range(boxes)]
        looks = [Conversation((Message("user", f"{IMAGE}\n{question}\n{IMAGE}"),), (whole, crop)) for crop in crops]
        self.talks.append((box_talk, looks))
        prompt = self.encoder.encode(box_talk, [None])[0]
        own = [self._response("box", f"{name}/{b}", prompt, BOX) for b in range(boxes)]
        for b, look in enumerate(looks):
            shown = self.encoder.encode(look, [None])[0]
            own += [self._response("answer", f"{name}/{b}/{m}", shown, ANSWER) for m in range(answers)]
        self.responses.append(own)

    def _response(self, step: Any, row: str, prompt: Any, length: int) -> Response:
        digits = "".join(map(str, self.rng.integers(0, 10, length - 1)))
        ids = (*self.encoder.tokenizer(digits, add_special_tokens=False).input_ids, self.encoder.end_id)
        completion = Completion(digits, length - 1, ids=ids, logps=(0.0,) * length)
        return Response(row, step, completion, prompt, float(self.rng.normal(0.2)))


class Tree:
    """What `stage: grpo` computes."""

    def __init__(self, model: nn.Module, collator: Collator, rollouts: Rollouts) -> None:
        self.model = model
        batch = pack_responses(rollouts.responses, collator, mask_truncated=False, keep_all=True)
        assert batch is not None
        self.batch = batch

    def backward(self) -> float:
        batch = self.batch
        return policy_gradient(token_logps(self.model, batch.packed), batch.packed.branch, batch.advantages)


class Rows:
    """Every rollout by itself, in padded batches of eight, with logits at the response alone, as TRL's trainer."""

    def __init__(self, model: nn.Module, encoder: Encoder, rollouts: Rollouts, size: int = 8) -> None:
        self.model = model
        self.batches = []
        self.count = sum(map(len, rollouts.responses))
        flat = [one for own in rollouts.responses for one in own]
        for step, length in (("box", BOX), ("answer", ANSWER)):
            same = [one for one in flat if one.step == step]
            for members in (same[start : start + size] for start in range(0, len(same), size)):
                paths = [encoder.continued(one.prompt, one.completion.ids) for one in members]
                inputs, _ = padded(paths, encoder)
                self.batches.append((inputs, length, torch.tensor([one.advantage for one in members])))

    def backward(self) -> float:
        total = 0.0
        for inputs, length, advantages in self.batches:
            logits = self.model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
            targets = inputs["input_ids"][:, -length:]
            logps = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            numbers = torch.arange(len(targets)).repeat_interleave(length)
            total += policy_gradient(logps.flatten(), numbers, advantages, self.count)
        return total


def policy_gradient(logps: Tensor, branch: Tensor, advantages: Tensor, count: int | None = None) -> float:
    """The GRPO loss of some responses, over `count` in all, and its gradient in the weights."""
    lengths = torch.bincount(branch).float()
    total = batch_loss(
        LOSS, logps, logps.detach(), advantages[branch], branch, lengths, parameters={}, tokens=1, length=1
    ).total / (count or len(advantages))
    total.backward()
    return float(total.detach())


def gradients_of(model: nn.Module, work: Callable[[], float]) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = work()
    flat = torch.cat([weights.grad.flatten() for weights in model.parameters() if weights.grad is not None])
    model.zero_grad()
    return loss, flat


def prefill_ratio(model: nn.Module, encoder: Encoder, rollouts: Rollouts, boxes: int, answers: int) -> float:
    """Prompt tokens of every call by itself, over those that the engine computes of both steps of all questions."""
    engine, one_token = LocalEngine(model, encoder), Sampling(1.0, 1.0, 1)
    first = [talk for talk, _ in rollouts.talks]
    second = [look for _, looks in rollouts.talks for look in looks]
    told = engine.complete(first, one_token, [list(range(boxes))] * len(first))
    told += engine.complete(second, one_token, [list(range(answers))] * len(second))
    return sum(one.prompt_tokens for own in told for one in own) / engine.prefilled_tokens


def measure(shape: Shape, repeats: int, boxes: int = BOXES, answers: int = ANSWERS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), shape)
        model, encoder = load_model(name), load_encoder(name)
        use_tree_attention(model, "blocks")
        rollouts = Rollouts(encoder, shape, boxes, answers)
        tree = Tree(model, Collator(encoder, bucket=TIGHT_BUCKET), rollouts)
        plain = load_model(name)
        rows = Rows(plain, encoder, rollouts)
        (ours, mine), (theirs, other) = gradients_of(model, tree.backward), gradients_of(plain, rows.backward)
        step, reference = flops(tree.backward), flops(rows.backward)
        model.zero_grad()
        packed = tree.batch.packed
        seconds: dict[str, list[float]] = {"tree": [], "rows": []}
        for _ in range(repeats):
            for kind, layout in (("tree", tree), ("rows", rows)):
                start = time.process_time()
                layout.backward()
                seconds[kind].append(time.process_time() - start)
        median = {kind: statistics.median(taken) for kind, taken in seconds.items() if taken}
        return {
            "name": shape.name, "boxes": boxes, "answers": answers, "questions": shape.pictures,
            "tokens": packed.tokens, "separate_tokens": packed.separate_tokens,
            "flops_ratio_rows": reference / step,
            "over_floor": step / (3 * token_flops(model, packed) + tower_flops(model, packed)[1]),
            **{f"cpu_{kind}": taken for kind, taken in median.items()},
            **({"cpu_ratio_rows": median["rows"] / median["tree"]} if median else {}),
            "prefill_ratio": prefill_ratio(model, encoder, rollouts, boxes, answers),
            "loss_rel_error": abs(ours - theirs) / abs(theirs),
            "grad_rel_error": float((mine - other).norm() / other.norm()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small,long", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1, help="questions of a step, each of a picture of its own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = []
    for shape in [replace(SHAPES[name], pictures=options.pictures) for name in options.shapes.split(",")]:
        results.append(measure(shape, options.repeats))
        shown = {"FLOPs": "flops_ratio_rows", "over floor": "over_floor", "time": "cpu_ratio_rows",
                 "prefill": "prefill_ratio"}  # fmt: skip
        ratios = "  ".join(f"{name} {results[-1][key]:.2f}×" for name, key in shown.items() if key in results[-1])
        told = f"loss error {results[-1]['loss_rel_error']:.1e}  grad error {results[-1]['grad_rel_error']:.1e}"
        print(f"{shape.name:<12} {ratios}  {told}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "shapes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
