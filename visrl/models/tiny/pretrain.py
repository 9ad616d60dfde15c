"""Pre-train the embedded model: a stand-in for the pre-training that real models bring along.

    OMP_NUM_THREADS=1 python -m visrl.models.tiny.pretrain configs/tiny/pretrain.yaml [key=value ...]

A real vision-language model can tell objects apart before anyone teaches it where to look; one of 2 M parameters that
starts from noise does not find that out from the text of boxes. So its pre-training is dense: read-outs ask image
tokens which tag they show, the word that names a tag where that tag lies, and the question mark where the tag asked
about lies, so that each step from the picture to the text of a box is taught by itself. The read-outs are thrown away;
what is written is a plain Qwen2VLForConditionalGeneration. Warm-up, the method's own first step, comes after it
(configs/tiny/train_sft.yaml).

Killed at any moment, the same command goes on from the last checkpoint, and ends with the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from visrl.config import ConfigError, read_config
from visrl.errors import UserError
from visrl.manifest import claim_folder, hold, write_manifest
from visrl.models.tiny.lessons import Lessons
from visrl.models.tiny.make import save_tiny, tiny_model
from visrl.models.tiny.readouts import ReadOuts
from visrl.models.tiny.recipe import LossWeights, PretrainConfig
from visrl.models.tiny.rows import Batch, Targets
from visrl.models.tree_encoder import TreeEncoder
from visrl.records import Journal, read_jsonl, write_records
from visrl.scenes import SIDE, make_scene, questions_of

STATE = "state"  # folder of what a killed run goes on from; it goes when the run is complete
MAY_DIFFER = {"output_dir", "threads"}  # keys of a run that goes on


class PatchProjection(nn.Conv3d):
    """A Conv3d whose kernel covers its whole input, as Qwen2-VL's patch embedding is: one product of matrices. The
    backward pass of the convolution itself takes more than half of a whole step on a CPU."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, channels, *kernel] → [n, width]."""
        return F.linear(patches.flatten(1), self.weight.flatten(1))


class Pretraining:
    """The model in training, its read-outs, their optimizer and the batches."""

    def __init__(self, recipe: PretrainConfig, **sizes: Any) -> None:
        self.recipe = recipe
        self.model, self.processor, self.settings = tiny_model(seed=recipe.seed, **sizes)
        config: Any = self.model.config
        layers = len(self.model.model.language_model.layers)
        for key in ("word_layer", "mark_layer"):
            if getattr(recipe, key) > layers:
                raise ConfigError(f"{key}={getattr(recipe, key)}: the language model has {layers} layers")
        self.model.set_attn_implementation("eager")  # PyTorch's fused attention is slower in its backward on a CPU
        self.model.model.visual.patch_embed.proj.__class__ = PatchProjection  # the same module with the same weights
        self.lessons = Lessons(recipe, TreeEncoder(self.processor, config, self.settings))
        self.readouts = ReadOuts(config.text_config.hidden_size, recipe.seed)
        self.parameters = [*self.model.parameters(), *self.readouts.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            fused=True,
        )

    def identity(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """What a run must agree in to go on in a folder: the recipe, and which token each id stands for."""
        vocabulary = json.dumps(self.processor.tokenizer.get_vocab(), sort_keys=True)
        tokenizer = hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()
        return {"verb": "pretrain", "config": self.recipe.recorded(MAY_DIFFER), **sizes, "tokenizer": tokenizer}

    def hidden_states(self, batch: Batch) -> list[torch.Tensor]:
        """Of all tokens [B · T, width]: those that enter the language model, and those after each of its layers. The
        last have passed its last norm."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            out = self.model.model(
                input_ids=batch.ids,
                position_ids=batch.positions,
                attention_mask=batch.mask(torch.bfloat16 if self.recipe.bf16 else torch.float32),
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw,
                output_hidden_states=True,
                use_cache=False,
            )
        return [states.flatten(0, 1).float() for states in out.hidden_states]

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Every loss of a batch, by the names of `LossWeights` and "cover"."""
        hidden = self.hidden_states(batch)
        at_words, at_marks = hidden[self.recipe.word_layer], hidden[self.recipe.mark_layer]
        found = self.readouts.losses(batch, hidden[0], at_words, at_marks)
        for name, targets in (("box", batch.boxes), ("read", batch.reads)):
            if targets.at:
                found[name] = self._text_loss(hidden[-1], targets)
        return found

    def _text_loss(self, last: torch.Tensor, targets: Targets) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            logits = self.model.get_output_embeddings()(last[targets.at])
        weight = torch.tensor(targets.weight)
        losses = F.cross_entropy(logits.float(), torch.tensor(targets.value), reduction="none")
        return (losses * weight).sum() / weight.sum()

    def step(self, number: int) -> dict[str, float]:
        """Step `number` (from 0) of the schedule; gives its losses."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate_share(number, recipe)
        found = self.losses(self.lessons.batch(number))
        self.optimizer.zero_grad(set_to_none=True)
        total(found, recipe.phase_at(number).weights).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm)
        self.optimizer.step()
        return {name: loss.item() for name, loss in found.items()}

    @torch.no_grad()
    def selection(self) -> dict[str, float]:
        """For each kind of question the share of held-out ones whose tag the read-out at the question mark lies nearest
        to: whether the question decides where to look."""
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, self.recipe.eval_scenes, 25):
            count = min(25, self.recipe.eval_scenes - start)
            batch = self.lessons.quiz("validation", start, count)
            told = self.readouts.boxes(self.hidden_states(batch)[self.recipe.mark_layer][batch.marks.at]) * SIDE
            boxes = iter(told.tolist())
            for scene in (make_scene("validation", index) for index in range(start, start + count)):
                for question in questions_of(scene):
                    x0, y0, x1, y1 = next(boxes)
                    far = [math.dist(tag.center, ((x0 + x1) / 2, (y0 + y1) / 2)) for tag in scene.tags]
                    right[question.kind].append(far.index(min(far)) == question.target)
        return {kind: round(sum(values) / len(values), 3) for kind, values in sorted(right.items())}

    # --- what a killed run goes on from

    def save_state(self, folder: Path, step: int) -> None:
        """Write weights, read-outs and optimizer as they are after `step` steps: all of them, or nothing."""
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        tensors |= {f"readouts.{name}": value for name, value in self.readouts.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        part, whole = folder / "part", folder / f"step-{step}.safetensors"
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, part)
        part.replace(whole)
        for older in set(folder.glob("step-*.safetensors")) - {whole}:
            older.unlink()

    def load_state(self, folder: Path) -> int:
        """Go on from the newest state in `folder`; gives how many steps it has behind it, 0 where there is none."""
        steps = {int(path.stem.partition("-")[2]): path for path in folder.glob("step-*.safetensors")}
        if not steps:
            return 0
        tensors = load_file(steps[max(steps)])

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        with torch.no_grad():
            kept = under("model.")
            for name, parameter in self.model.named_parameters():
                parameter.copy_(kept[name])
        self.readouts.load_state_dict(under("readouts."))
        state: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, value in under("optimizer.").items():
            number, _, field = name.partition(".")
            state[int(number)][field] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
        return max(steps)


def rate_share(step: int, recipe: PretrainConfig) -> float:
    """The share of the learning rate at step `step` (from 0): it rises for `warmup_steps`, stays, and falls."""
    rising = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    left = min(1.0, (1 - step / recipe.steps) / (1 - recipe.decay_from))
    return rising * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * left)


def total(losses: dict[str, torch.Tensor], weights: LossWeights) -> torch.Tensor:
    """What is trained on: the weighted sum of a batch's losses."""
    cell = weights.cell * (2 * losses["cover"] + losses["cell"] + weights.shape * losses["shape"])
    rest = [getattr(weights, name) * losses[name] for name in ("word", "mark", "crop", "read", "box") if name in losses]
    return torch.stack([cell, *rest]).sum()


def pretrain(recipe: PretrainConfig, **sizes: Any) -> Path:
    """Run a recipe to its end, from the last checkpoint where it was begun; the folder of the model. `sizes` override
    those of the language model.

    Raises:
        ConfigError: a read-out looks behind a layer that the model does not have.
        ManifestError: the folder holds other work.
    """
    out = recipe.output_dir
    with hold(out):
        training = Pretraining(recipe, **sizes)
        if claim_folder(out, training.identity(sizes)):
            print(f"{out} is complete", flush=True)
        else:
            before = torch.get_num_threads()
            torch.set_num_threads(recipe.threads)
            try:
                _run(training, out)
            finally:
                torch.set_num_threads(before)
        shutil.rmtree(out / STATE, ignore_errors=True)
    return out


def _run(training: Pretraining, out: Path) -> None:
    recipe = training.recipe
    done = training.load_state(out / STATE)
    before = _cut_log(out / "log.jsonl", done)
    if done:
        print(f"going on after step {done} of {recipe.steps}", flush=True)
    started, sums = time.process_time(), defaultdict[str, list[float]](list)
    with Journal(out / "log.jsonl") as log:
        for number in range(done, recipe.steps):
            for name, value in training.step(number).items():
                sums[name].append(value)
            step = number + 1
            row: dict[str, Any] = {}
            if step % recipe.logging_steps == 0 or step == recipe.steps:
                row = {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
                sums.clear()
            if step % recipe.eval_steps == 0 or step == recipe.steps:
                row["selection"] = training.selection()
            if row:
                row = {"step": step, "seconds": round(before + time.process_time() - started), **row}
                log.append([row])
                print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if step % recipe.save_steps == 0 and step < recipe.steps:
                training.save_state(out / STATE, step)
    seconds = round(before + time.process_time() - started)
    save_tiny(out, training.model, training.processor, training.settings)
    write_manifest(out, verb="pretrain", config=recipe.recorded(), parents={}, steps=recipe.steps, seconds=seconds)


def _cut_log(path: Path, step: int) -> float:
    """Drop log lines after the checkpoint that a run goes on from; gives the seconds of a core that the rest took."""
    rows = [row for row in read_jsonl(path, unfinished="leave_out") if row["step"] <= step] if path.is_file() else []
    write_records(path, rows)
    return rows[-1]["seconds"] if rows else 0


def main(arguments: Sequence[str]) -> None:
    """Read the config and the overrides after it, and run."""
    torch.set_flush_denormal(True)  # of this program alone: products of the smallest numbers take a CPU very long
    try:
        print(pretrain(read_config(PretrainConfig, arguments[0], arguments[1:])))
    except (OSError, UserError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m visrl.models.tiny.pretrain CONFIG.yaml [key=value ...]")
    main(sys.argv[1:])
