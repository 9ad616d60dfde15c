"""A reward model (`stage: rm`) as a part of an online reward: `model:PATH` scores boxes and answers in this process.

The attempts at a question are packed as they are in training: image and question once, boxes and crops as branches,
answers below their crop. One forward pass scores them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visrl.box import CropRule
from visrl.codecs import CODECS
from visrl.config import ConfigError
from visrl.conversation import Conversation, PromptError, focus_conversation
from visrl.engines.open import ModelConfig, open_local
from visrl.manifest import STARTED, read_manifest
from visrl.models.attention import attending
from visrl.models.encode import Encoder, TokenPath
from visrl.models.folder import ADAPTER, CheckpointError, read_object
from visrl.models.modes import evaluating
from visrl.models.settings import LIMITS, ModelSettings
from visrl.models.value_head import HEAD, add_value_head, load_value_head, value_head
from visrl.packing.forward import branch_scores
from visrl.packing.lay_out import lay_out
from visrl.rewards.parts import Attempt, Scores
from visrl.rollout.steps import answer_request
from visrl.sequences import batched

BATCH = 64  # attempts that are computed side by side


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A `parts.Scorer`: what a reward model says of attempts.

    A response's score s becomes σ(s), in [0, 1]: under Bradley and Terry's model the chance that it is preferred to one
    of score 0. A look is worth the mean of that of its box and that of its answer; a model that was trained on boxes
    alone says that of the box. A box that cannot be read is 0, as in every part: no attempt is worth less.
    """

    model: torch.nn.Module
    encoder: Encoder
    boxes_alone: bool = False

    def __call__(self, attempts: Sequence[Attempt]) -> list[Scores]:
        """The scores of every look of every attempt; None for what the model cannot be shown, as a text that holds its
        control tokens."""
        return [scores for part in batched(attempts, BATCH) for scores in self._scores(part)]

    def _scores(self, attempts: Sequence[Attempt]) -> list[Scores]:
        paths = [self._paths(one) for one in attempts]
        shown = [[path for path in own if path is not None] for own in paths]
        found = iter(self._forward([own for own in shown if own]))
        return [
            _of_looks(one, [None if path is None else next(found) for path in own], self.boxes_alone)
            for one, own in zip(attempts, paths, strict=True)
        ]

    def _paths(self, attempt: Attempt) -> list[TokenPath | None]:
        """The path of the box, then those of the answers that are scored; none where the box cannot be read."""
        first = attempt.looks[0]
        if first.box is None:
            return []
        box = self._path(focus_conversation(first.question, first.whole), first.text)
        told = () if self.boxes_alone else (look.answer for look in attempt.looks if look.answer is not None)
        return [box, *(self._path(answer_request(first), answer) for answer in told)]

    def _path(self, talk: Conversation, response: str) -> TokenPath | None:
        try:
            return self.encoder.encode(talk, [response])[0]
        except PromptError:
            return None

    @torch.no_grad()
    def _forward(self, items: Sequence[Sequence[TokenPath]]) -> list[float]:
        """σ of the score of every path, item by item."""
        if not items:
            return []
        packed, order = lay_out(items, self.encoder, ends=True)
        device = next(self.model.parameters()).device
        with attending(self.model, self.encoder.family), evaluating(self.model):
            scores = branch_scores(self.model, packed.to(device), self.model, value_head(self.model))
        told = iter(scores.double().sigmoid().tolist())
        of_item = {number: [next(told) for _ in items[number]] for number in order}
        return [score for number in range(len(items)) for score in of_item[number]]


def _of_looks(attempt: Attempt, told: Sequence[float | None], boxes_alone: bool) -> Scores:
    """The scores of an attempt's looks from those of its box and its answers."""
    if not told:
        return [0.0] * len(attempt.looks)
    box, answers = told[0], iter(told[1:])
    if boxes_alone:
        return [box] * len(attempt.looks)
    of_answers = [None if look.answer is None else next(answers) for look in attempt.looks]
    return [None if box is None or answer is None else (box + answer) / 2 for answer in of_answers]


def open_reward_model(path: str, policy: ModelSettings, crop_rule: CropRule, device: Any) -> RewardModel:
    """The reward model in a folder that `stage: rm` made, on a device; `policy` is how the policy looks at images.

    Raises:
        CheckpointError: no reward model there, or one that cannot be loaded.
        ConfigError: it reads boxes otherwise than the policy writes them, or was trained on other crops.
    """
    folder = Path(path)
    if not (folder / HEAD).is_file():
        raise CheckpointError(f"reward model:{path}: there is no {HEAD}; name a folder that stage: rm made")
    manifest = read_manifest(folder)
    if manifest is None and (folder / STARTED).is_file():
        raise CheckpointError(f"reward model:{path} holds an unfinished training; run it to its end")
    trained = manifest["config"] if manifest is not None else {}
    config = ModelConfig(model_name_or_path=path)
    if (folder / ADAPTER).is_file():
        named = read_object(folder / ADAPTER).get("base_model_name_or_path")
        base = str(trained.get("model_name_or_path", named))
        config = ModelConfig(model_name_or_path=base, adapter_name_or_path=path)
    settings = ModelSettings.load(config.model_name_or_path, config.adapter_name_or_path)
    _check_settings(path, settings, policy, crop_rule)
    engine = open_local(config, settings, str(device))
    add_value_head(engine.model)
    load_value_head(engine.model, folder)
    return RewardModel(engine.model, engine.encoder, trained.get("rl_stage") == 1)


def _check_settings(path: str, own: ModelSettings, policy: ModelSettings, crop_rule: CropRule) -> None:
    """Refuse a reward model that would be shown other boxes or crops than it was trained on."""
    if own.codec != policy.codec:
        raise ConfigError(
            f"reward model:{path} reads boxes in the form {own.codec!r}, and the policy writes {policy.codec!r}; train "
            "one on preferences of this policy"
        )
    if own.crop_rule != crop_rule:
        raise ConfigError(
            f"reward model:{path} was trained on crops by the rule {own.crop_rule!r}, and the policy's are cut by "
            f"{crop_rule!r}; train one on preferences of this policy"
        )
    differ = [key for key in LIMITS if getattr(own, key) != getattr(policy, key)]
    if CODECS[own.codec].in_processed_pixels and differ:
        raise ConfigError(
            f"reward model:{path}: {differ[0]} is {getattr(own, differ[0])}, and {getattr(policy, differ[0])} for the "
            f"policy; boxes are pixels of pictures of that size, so that both must have one"
        )
