"""Rollouts of several looks and rows of them, which benchmarks/looks.py compares with the tree. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from layouts import ANSWER, BOX, QUESTION, Shape, padded
from online_layouts import LENGTH, Rollout, Rollouts
from torch import Tensor

from visrl.conversation import Conversation, Message, View
from visrl.models.encode import Encoder, TokenPath
from visrl.models.load import load_encoder, load_model
from visrl.prompts import IMAGE
from visrl.train.online_losses import ONLINE_LOSSES, batch_loss

ROLLOUTS, LOOKS = 8, 4
FORKED = (2, 4, 8, 8)  # different looks at each depth, of the eight rollouts
Form = Literal["question", "dialog"]
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 16, 4, 640, pictures=1),
        Shape("crops16", 256, 16, 2_000, pictures=1),
        Shape("crops64", 256, 64, 2_000, pictures=1),
        Shape("large16", 1024, 16, 2_000, pictures=1),
        Shape("large64", 1024, 64, 2_000, pictures=1),
        Shape("huge16", 4096, 16, 2_000, pictures=1),
        Shape("huge64", 4096, 64, 2_000, pictures=1),
    )
}


class LookRollouts(Rollouts):
    """Random questions, with 8 rollouts of 4 looks each. A rollout's turns stand side by side."""

    def __init__(self, encoder: Encoder, shape: Shape, form: Form, different: Sequence[int] = (ROLLOUTS,) * LOOKS):
        self.form, self.different = form, different
        super().__init__(encoder, shape, boxes=ROLLOUTS, answers=1)

    def _ask(self, shape: Shape, name: str, whole: View) -> list[Rollout]:
        question = "".join(map(str, self.rng.integers(0, 10, QUESTION)))
        asked = Message("user", f"{IMAGE}\n{question}")
        first = Conversation((asked,), (whole,))
        states = [(f"{name}/{number}", first) for number in range(self.different[0])]
        own: list[Rollout] = []
        for depth in range(LOOKS):
            after = []
            for row, talk in states:
                said = self._rollout("box", f"{row}/{depth}", talk, BOX)
                own.append(said)
                crop = View(f"{row}#{depth}", self._picture(shape.crop_tokens), is_crop=True)
                after.append((row, self._shown(talk, said, crop)))
            times = (self.different[depth + 1] if depth + 1 < LOOKS else ROLLOUTS) // len(after)
            states = [(f"{row}.{k}", talk) for row, talk in after for k in range(times)]
        return [*own, *(self._rollout("answer", row, talk, ANSWER) for row, talk in states)]

    def _shown(self, talk: Conversation, said: Rollout, crop: View) -> Conversation:
        if self.form == "question":
            (asked,) = talk.messages
            return Conversation((Message("user", f"{asked.text}\n{IMAGE}"),), (*talk.views, crop))
        turns = (*talk.messages, Message("assistant", said.completion.text or ""), Message("user", IMAGE))
        return Conversation(turns, (*talk.views, crop))


# --- Rows -------------------------------------------------------------------------------------------------------------


Row = tuple[TokenPath, list[tuple[int, float, int]]]  # and where its turns start, their advantages, their lengths


class Rows:
    """Rows of the same rollouts: one per turn, or, of dialogs, one per rollout with all of its turns."""

    def __init__(self, folder: Path, rollouts: LookRollouts, per: Literal["turn", "rollout"]) -> None:
        self.model, self.encoder = load_model(folder), load_encoder(folder)
        responses = [one for own in rollouts.responses(self.encoder) for one in own]
        self.tokens = sum(len(one.completion.ids) for one in responses)
        paths = [self.encoder.continued(one.prompt, one.completion.ids) for one in responses]
        if per == "turn":
            rows = [(path, {path.start: n}) for n, path in enumerate(paths)]
            rows.sort(key=lambda row: len(row[0].ids))
        else:
            rows = [(path, _turns_in(path, paths)) for path in paths if len(path.views) == LOOKS + 1]
            assert all(len(own) == LOOKS + 1 for _, own in rows)
        self.rows: list[Row] = [
            (path, [(at, responses[n].advantage or 0.0, len(responses[n].completion.ids)) for at, n in own.items()])
            for path, own in rows
        ]

    def batches(self, size: int = 8) -> Iterator[list[Row]]:
        """Rows of one length together: no token is padding."""
        members: list[Row] = []
        for row in self.rows:
            if members and (len(members) == size or len(row[0].ids) != len(members[0][0].ids)):
                yield members
                members = []
            members.append(row)
        yield members

    def logps(self, members: Sequence[Row]) -> Tensor:
        """Log-probabilities of what was said in these rows, one after another."""
        inputs, _ = padded([path for path, _ in members], self.encoder)
        places = [start + k for start, _, length in members[0][1] for k in range(length)]
        keep = torch.tensor(places) - 1
        logits = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
        return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, places, None]).flatten()

    def backward(self, members: Sequence[Row]) -> None:
        """The part that these rows have in the loss of a step, and its gradient."""
        logps = self.logps(members)
        turns = [(advantage, length) for _, own in members for _, advantage, length in own]
        advantages = torch.tensor([advantage for advantage, _ in turns])
        lengths = torch.tensor([length for _, length in turns])
        branch = torch.arange(len(turns)).repeat_interleave(lengths)
        loss = batch_loss(
            ONLINE_LOSSES["dapo"], logps, logps.detach(), advantages[branch], branch, lengths.float(), parameters={},
            tokens=1, length=LENGTH,
        ).total / self.tokens  # fmt: skip
        loss.backward()

    def step(self) -> None:
        for members in self.batches():
            self.backward(members)


def _turns_in(row: TokenPath, paths: Sequence[TokenPath]) -> dict[int, int]:
    """Which paths `row` holds as its beginning, by where their responses start."""
    inside = {}
    for number, path in enumerate(paths):
        same = len(path.ids) <= len(row.ids) and (path.ids == row.ids[: len(path.ids)]).all()
        if same and [one.key for one in path.views] == [one.key for one in row.views[: len(path.views)]]:
            inside[path.start] = number
    return dict(sorted(inside.items()))
