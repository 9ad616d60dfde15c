"""Online losses of every family: a packed tree against the model's own calls, a sequence each, at two updates from the
same rollouts: the first on-policy, the second with ratios of which some are clipped and a KL to the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from test_families import native_inputs, picture
from tiny_families import MAKERS, make
from torch import Tensor, nn

from visrl.conversation import Conversation, View, answer_conversation, focus_conversation
from visrl.engines.base import Completion
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.parts import language_model
from visrl.packing.forward import token_logps
from visrl.train.items import Collator
from visrl.train.online_losses import ONLINE_LOSSES, Level, batch_loss, log_ratios
from visrl.train.online_rollouts import OnlineBatch, Response, pack_responses

BOXES = (("[0.10, 0.20, 0.50, 0.70]", 1.1), ("[0.15, 0.25, 0.30, 0.40]", -0.4), ("here", 0.3))
ANSWERS = ((("7", 0.7), ("42.\n", -0.5)), (("a 7", -0.6), ("9", 0.9)))
LENGTH = 16  # max_completion_length


class Case(NamedTuple):
    """A loss of the table with the level of its ratios, and the weight of the KL."""

    name: str
    level: Level
    beta: float


CASES = [
    Case(name, level, beta)
    for name, loss in ONLINE_LOSSES.items()
    for level in ((loss.level,) if loss.level else ("token", "sequence"))
    for beta in (0.0, 0.3)
]


class Told(NamedTuple):
    """A question's rollouts packed as a tree, and what was asked and said in each."""

    batch: OnlineBatch
    said: list[tuple[Conversation, str]]


def rollouts_of(encoder: Encoder) -> Told:
    """Three boxes of a picture and two answers from the crop of each of two."""
    whole, question = View("whole", picture(1, 120, 80)), "Which digit is on the card?"
    said = [(focus_conversation(question, whole), text, advantage) for text, advantage in BOXES]
    for n, answers in enumerate(ANSWERS):
        crop = View(f"crop {n}", picture(100 + n, 60 + 40 * n, 60), is_crop=True)
        talk = answer_conversation(question, whole, crop)
        said += [(talk, text, advantage) for text, advantage in answers]
    responses = []
    for number, (talk, text, advantage) in enumerate(said):
        (path,) = encoder.encode(talk, [text])
        ids = tuple(path.ids[path.start :].tolist())
        completion = Completion(text, len(ids), ids=ids, logps=(0.0,) * len(ids))
        step: Any = "box" if number < len(BOXES) else "answer"
        responses.append(Response(str(number), step, completion, encoder.encode(talk, [None])[0], advantage))
    batch = pack_responses([responses], Collator(encoder), mask_truncated=False, keep_all=True)
    assert batch is not None
    return Told(batch, [(talk, text) for talk, text, _ in said])


def packed(model: nn.Module, told: Told) -> Tensor:
    """Log-probabilities of all tokens, [T], through the tree, in the order of the branches."""
    use_tree_attention(model)
    assert told.batch.packed.branch.equal(told.batch.packed.branch.sort().values)
    return token_logps(model, told.batch.packed)


def separate(model: nn.Module, encoder: Encoder, told: Told) -> Tensor:
    """The same, every response a plain call on the inputs of its own processor."""
    language: Any = language_model(model).config
    language._attn_implementation = "eager"
    found = []
    for (talk, text), length in zip(told.said, told.batch.lengths.int().tolist(), strict=True):
        inputs = dict(native_inputs(encoder, talk, text))
        logps = torch.log_softmax(model(**inputs, use_cache=False).logits[0, -length - 1 : -1].float(), -1)
        found.append(logps.gather(-1, inputs["input_ids"][0, -length:, None])[:, 0])
    return torch.cat(found)


def loss_of(case: Case, told: Told, logps: Tensor, start: Tensor, epsilon: float) -> Tensor:
    """The loss of an update from rollouts whose log-probabilities were `start` when they were sampled; the reference
    is the policy of then."""
    loss, branch = ONLINE_LOSSES[case.name], told.batch.packed.branch
    given = {"epsilon": epsilon, "epsilon_high": 1.2 * epsilon, "delta": 1 + 2 * epsilon}
    if loss.parameters == ("epsilon_high",):
        given["epsilon_high"] = 1 + epsilon  # the cap itself
    return batch_loss(
        loss, logps, start, told.batch.advantages[branch], branch, told.batch.lengths, level=case.level,
        parameters={key: given[key] for key in loss.parameters}, ref=start if case.beta else None, beta=case.beta,
        tokens=told.batch.tokens, length=LENGTH,
    ).total  # fmt: skip


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: own for name, own in zip(named, found, strict=True) if own is not None}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    whole = torch.cat([own.flatten() for own in theirs.values()]).norm()
    assert whole > 0, what
    for name, own in theirs.items():
        assert (ours[name] - own).norm() < 1e-4 * max(own.norm(), 1e-3 * whole), (what, name)


def move(model: nn.Module, direction: dict[str, Tensor], length: float) -> None:
    norm = torch.cat([own.flatten() for own in direction.values()]).norm()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name in direction:
                weights.sub_(direction[name], alpha=length / float(norm))


def between(sizes: Tensor) -> float:
    """A bound between two of the sizes of ratios, sorted, and on none: rounding must not say which are clipped."""
    middle = int(0.45 * (len(sizes) - 1))
    return float(sizes[middle : middle + 2].mean())


def check_two_updates(name: str, cases: Sequence[Case]) -> None:
    model, encoder = make(name)
    told = rollouts_of(encoder)
    alone = separate(model, encoder, told)
    starts = packed(model, told).detach(), alone.detach()
    torch.testing.assert_close(*starts, rtol=1e-5, atol=1e-5)
    for update in (1, 2):
        theirs = alone if update == 1 else separate(model, encoder, told)
        for case in cases:
            branch = told.batch.packed.branch
            level = ONLINE_LOSSES[case.name].level or case.level
            away = log_ratios(theirs.detach(), starts[1], branch, told.batch.lengths, level).exp() - 1
            epsilon = 0.2 if update == 1 else between(away.abs().unique())
            if update == 2:
                assert (away.abs() > 1e-3).any(), "no ratio has left 1"
                assert ((away.abs() > 1.2 * epsilon) & (away * told.batch.advantages[branch] > 0)).any(), (
                    "nothing is clipped"
                )
            other = loss_of(case, told, theirs, starts[1], epsilon)
            mine = loss_of(case, told, packed(model, told), starts[0], epsilon)
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            close(gradient(model, mine), gradient(model, other), f"{name}, {case}, update {update}")
        if update == 1:
            move(model, gradient(model, loss_of(CASES[0], told, theirs, starts[1], 0.2)), 0.05)


def diagonal() -> list[tuple[str, Case]]:
    """A case of every loss, each of another family, by turns with a KL and without, of tokens and of sequences."""
    families, found = sorted(MAKERS), []
    for n, loss in enumerate(ONLINE_LOSSES):
        cases = [case for case in CASES if case.name == loss]
        found.append((families[5 * n % len(families)], cases[3 * n % len(cases)]))
    return found


DIAGONAL = diagonal()


@pytest.mark.parametrize(("name", "case"), DIAGONAL, ids=[f"{name}-{case.name}" for name, case in DIAGONAL])
def test_two_updates_equal_those_of_separate_sequences(name: str, case: Case) -> None:
    check_two_updates(name, [case])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_loss_of_every_family_equals_that_of_separate_sequences(name: str) -> None:
    check_two_updates(name, CASES)
