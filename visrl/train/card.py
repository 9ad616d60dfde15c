"""The model card of an exported checkpoint: what it was made from, and how it is loaded. Text from facts alone.

What is not known is left out: a card says nothing that no manifest, config or log says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from visrl.box import Box
from visrl.codecs import CODECS
from visrl.manifest import read_manifest
from visrl.models.settings import ModelSettings
from visrl.prompts import IMAGE, focus_prompt
from visrl.records import read_jsonl
from visrl.rewards.parts import RewardPart
from visrl.train.losses import LOSSES
from visrl.train.online_config import ONLINE_STAGES, default_loss
from visrl.train.online_losses import ONLINE_LOSSES

ROLLOUT = "eval_rollout/"  # what the trainer calls the scores of its rollouts on held-out questions
MEASURES = {
    "accuracy": "answers right",
    "iou": "mean IoU",
    "iou_50": "IoU > 0.5",
    "right_object": "boxes on the right object",
    "parse_rate": "boxes readable",
}
QUESTION = "What does the sign say?"
TAGS = ("visrl", "visual-grounding")


@dataclass(frozen=True, slots=True)
class Training:
    """One training on the way to a checkpoint: its manifest, and its last scores on held-out questions."""

    manifest: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Card:
    """What a card is made of. `size` are the pixel limits of a whole image, where its processor takes some."""

    folder: str
    base: str
    trainings: Sequence[Training]
    settings: ModelSettings
    dtype: str
    deviation: float
    size: Mapping[str, int] | None
    vllm: Sequence[str]


def history(model: str | Path, later: tuple[str, ...] = ()) -> tuple[str, list[Training]]:
    """The model that a checkpoint was first made from, and every training since, by the manifests on the way there.

    `later` are the checkpoints that it is looked up for: a folder that was trained on itself ends the way.
    """
    manifest = read_manifest(model) if Path(model).is_dir() and str(model) not in later else None
    config: Mapping[str, Any] = (manifest or {}).get("config", {})
    if manifest is None or manifest.get("verb") not in ("train", "export") or "model_name_or_path" not in config:
        return str(model), []
    base, before = history(config["model_name_or_path"], (*later, str(model)))
    adapters = [one["path"] for one in manifest.get("adapters", ())]
    own = [Training(manifest, last_scores(Path(model)))] if manifest["verb"] == "train" else []
    return base, [*before, *trainings(adapters), *own]


def trainings(adapters: Sequence[str | Path]) -> list[Training]:
    """The trainings of adapters, as far as their folders are there and say of which they are."""
    found = []
    for adapter in map(Path, adapters):
        manifest = read_manifest(adapter) if adapter.is_dir() else None
        if manifest is not None and manifest.get("verb") == "train":
            found.append(Training(manifest, last_scores(adapter)))
    return found


def last_scores(run: Path) -> dict[str, float]:
    """The last scores of rollouts in a training's log, by `MEASURES`; empty where it made none."""
    log = run / "log.jsonl"
    rows = [row for row in read_jsonl(log) if f"{ROLLOUT}accuracy" in row] if log.is_file() else []
    return {name: rows[-1][ROLLOUT + name] for name in MEASURES if rows and ROLLOUT + name in rows[-1]}


def card_text(card: Card) -> str:
    """The card as Markdown with the front matter that the Hub reads."""
    parts = [_front_matter(card), _made(card), _scores(card), _boxes(card), _use(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: Card) -> str:
    known: dict[str, Any] = {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", card.base) and not Path(card.base).exists():  # a name on the Hub
        known["base_model"] = card.base
    known |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": list(TAGS)}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def _made(card: Card) -> str:
    lines = [
        f"# {Path(card.folder).name}",
        "",
        "A vision-language model that looks before it answers: it writes the box of the region that a question is "
        "about, and answers from the image and the crop of that box (VisRL, arXiv 2503.07523).",
        "",
        f"- Base model: `{card.base}`",
        *(f"- {number}. {_training(one)}" for number, one in enumerate(card.trainings, start=1)),
        f"- Weights: {card.dtype}; token log-probabilities deviate from the adapter's by at most {card.deviation:.1e}",
    ]
    return "\n".join(lines)


def _training(training: Training) -> str:
    """What one training did, in a line."""
    config, facts = training.manifest["config"], training.manifest
    if config.get("stage") == "sft":
        method = "Warm-up, supervised (`stage: sft`)"
    elif config.get("stage") in ONLINE_STAGES:
        method = _online(config)
    else:
        loss = config.get("pref_loss")
        steps = "boxes" if config.get("rl_stage") == 1 else "boxes and answers"
        source = f", {LOSSES[loss].source}" if loss in LOSSES else ""
        beta = f", beta {config['pref_beta']}" if config.get("pref_beta") is not None else ""
        stage = f"`stage: dpo`, `rl_stage: {config.get('rl_stage')}`"
        method = f"Preferences over {steps} ({stage}): `{loss}`{source}{beta}"
    data = [f"on `{config['dataset']}`"] if config.get("dataset") else []
    if config.get("curriculum"):
        data = ["on a curriculum of synthetic scenes"]
    how = f"LoRA of rank {config.get('lora_rank')}" if config.get("finetuning_type") == "lora" else "all weights"
    counts = [f"{facts[key]:,} {key}" for key in ("items", "steps") if isinstance(facts.get(key), int)]
    rest = [how, *counts, *(f"{key} {facts[key]}" for key in ("seed",) if key in facts)]
    return f"{' '.join([method, *data])}; {', '.join(rest)}"


def _online(config: dict[str, Any]) -> str:
    """What one online training learned from."""
    name = config.get("loss_type") or default_loss(config["stage"])
    weights = {RewardPart(**part).label: part["weight"] for part in config["rewards"] if part["weight"]}
    rewards = " + ".join(label if weight == 1 else f"{weight:g} {label}" for label, weight in weights.items())
    return (
        f"Online reinforcement (`stage: {config['stage']}`): {config['num_generations']} boxes a question, "
        f"{config['num_answers']} answers a crop, reward {rewards}, `{name}`, {ONLINE_LOSSES[name].source}"
    )


def _scores(card: Card) -> str:
    """The scores of the last training that made some."""
    scored = [one for one in card.trainings if one.scores]
    if not scored:
        return ""
    config, last = scored[-1].manifest["config"], len(card.trainings) - card.trainings.index(scored[-1]) - 1
    when = "at the end of the last training" if not last else f"{last} trainings before the last"
    rows = [f"| {MEASURES[name]} | {value:.3f} |" for name, value in scored[-1].scores.items()]
    asked = f"{config['rollout_samples']} held-out questions of `{config['rollout_dataset']}`"
    return "\n".join([f"## Scores\n\nGreedy, on {asked}, {when}:\n", "| measure | value |", "|---|---|", *rows])


def _boxes(card: Card) -> str:
    codec, settings = CODECS[card.settings.codec], card.settings
    example = codec.format(Box(0.1, 0.125, 0.5, 0.625), (1000, 400), (1000, 400))
    limits = [
        f"`{key}: {getattr(settings, key):,}`"
        for key in ("image_min_pixels", "image_max_pixels", "crop_min_pixels", "crop_max_pixels")
        if getattr(settings, key) is not None
    ]
    lines = [
        "## Boxes",
        "",
        f"The pixels 100 to 500 by 50 to 250 of an image of 1,000 × 400 are written as `{example}` (codec "
        f"`{settings.codec}`{', as the processor sizes the image' if codec.in_processed_pixels else ''}). Crops are "
        f"cut from the original image by the rule `{settings.crop_rule}`. `visrl.json` holds both"
        + (f", and the limits {', '.join(limits)}." if limits else "."),
    ]
    return "\n".join(lines)


def _use(card: Card) -> str:
    size = f", size={dict(card.size)}" if card.size else ""
    return _USE.format(
        path=card.folder, question=QUESTION, size=size, vllm=shlex.join(card.vllm),
        prompt=focus_prompt(QUESTION).removeprefix(IMAGE),
    )  # fmt: skip


_USE = """## Use

With visrl, both steps:

```python
import visrl

policy = visrl.load_policy({path!r})
look = policy.ask("image.png", {question!r})
print(look.box_pixels, look.answer or look.error)
if look.crop is not None:
    look.crop.save("crop.png")
```

With transformers, the first step (where to look):

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({path!r})
processor = AutoProcessor.from_pretrained({path!r}{size})
content = [
    {{"type": "image", "image": Image.open("image.png").convert("RGB")}},
    {{"type": "text", "text": {prompt!r}}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(written, skip_special_tokens=True))
```

With vLLM, which visrl then asks for both steps:

```sh
{vllm}
```

```python
policy = visrl.load_policy({path!r}, policy_url="http://127.0.0.1:8000/v1")
```"""
