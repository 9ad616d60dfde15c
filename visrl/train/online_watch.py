"""What people watch of a step of online reinforcement: the measures of its rollouts, and the row of the journal.

Names of measures are TRL's where it has them. Numbers in, numbers out: knows no trainer and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from visrl.box import Box
from visrl.records import Place
from visrl.rewards.advantages import deviation, mean, value_of
from visrl.rewards.grounding import is_on_right_object
from visrl.rewards.parts import Attempt, is_failed
from visrl.train.online_rollouts import QuestionRollouts
from visrl.train.responses import Response
from visrl.train.turn_watch import turn_measures, turn_rows

Objects = Mapping[Place, Sequence[Box]]  # of each question, the known objects of its image that it does not ask about


def measures_of(
    rollouts: Sequence[QuestionRollouts], responses: Sequence[Response], objects: Objects, image_ids: Sequence[int] = ()
) -> Iterator[tuple[str, float]]:
    """What the rollouts of a step are like, by the names of `log.jsonl`; what does not apply is left out.

    A spread (`…_std`, `…/std`) is the unbiased deviation over all responses of the step, in the unit of its mean. Where
    the model looks several times, the mean reward is that of the first turns' values: what the policy can expect.
    """
    rewards = [reward for one in rollouts for rewards in one.scored.rewards for reward in rewards]
    several = bool(rollouts[0].turns)
    yield "reward", mean([value_of(turn) for one in rollouts for turn in one.outcomes] if several else rewards)
    yield "reward_std", deviation(rewards)
    for label in rollouts[0].scored.parts:
        scores = [score for one in rollouts for own in one.scored.parts[label] for score in own]
        yield f"left_out/{label}", _share([score is None for score in scores])
        if any(score is not None for score in scores):
            yield f"rewards/{label}/mean", mean(scores)
            yield f"rewards/{label}/std", deviation(scores)
    yield "left_out", _share([reward is None for reward in rewards])
    yield "frac_reward_zero_std", _share([one.boxes.flat for one in rollouts])
    if several:
        yield from turn_measures(rollouts, image_ids)
        known = [right_object(end, objects) for one in rollouts for end in one.ends]
        yield from _shares({"box/right_object": [right for right in known if right is not None]})
    else:
        flat = [group.flat for one in rollouts for group in one.answers if group.values]
        yield from _shares({"frac_reward_zero_std/answer": flat})
        yield from _box_measures(rollouts, objects)
    for kind in ("box", "answer"):
        own = [one.completion for one in responses if one.step == kind]
        if own:
            yield f"completions/mean_length/{kind}", mean([float(len(one.ids)) for one in own])
            yield f"completions/clipped_ratio/{kind}", _share([one.finish_reason == "length" for one in own])
    yield "tokens/sampled", sum(len(one.completion.ids) for one in responses)


def _box_measures(rollouts: Sequence[QuestionRollouts], objects: Objects) -> Iterator[tuple[str, float]]:
    attempts = [(one, attempt) for one in rollouts for attempt in one.attempts]
    yield "box/parsed", _share([attempt.looks[0].box is not None for _, attempt in attempts])
    areas = [attempt.looks[0].box.area for _, attempt in attempts if attempt.looks[0].box is not None]
    if areas:
        yield "box/area", mean(areas)
        yield "box/area_std", deviation(areas)
    known = [right_object(attempt, objects) for _, attempt in attempts]
    yield from _shares({"box/right_object": [right for right in known if right is not None]})


def right_object(attempt: Attempt, objects: Objects) -> bool | None:
    """Whether the box of an attempt, or one of the several that were looked at for its first answer, is on the object
    that was asked about; None where that cannot be told: no true box or no other object is known, or something else
    than the policy failed."""
    sample, look, truth = attempt.sample, attempt.looks[0], attempt.sample.box
    others = objects.get(sample.place, ())
    if truth is None or not others or is_failed(look):
        return None
    boxes = [look.box] if look.looks is None else [one.box for one in look.looks]
    return any(is_on_right_object(box, truth, others) for box in boxes)


def _share(values: Sequence[bool]) -> float:
    return mean([float(value) for value in values])


def _shares(named: Mapping[str, Sequence[bool]]) -> Iterator[tuple[str, float]]:
    """The shares that are of anything."""
    yield from ((name, _share(values)) for name, values in named.items() if values)


def journal_row(one: QuestionRollouts, step: int, objects: Objects) -> dict[str, Any]:
    """The row of `rollouts.jsonl` for one question: every box with its answers, rewards and advantages, or the tree of
    turns; where they are known, the true box, or looks, and whether a box is on the right object."""
    sample = one.question.sample
    return {
        "step": step,
        "id": sample.id,
        **({"repeat": sample.repeat} if sample.repeat else {}),
        "image": sample.image,
        "question": sample.question,
        "answer": sample.answer,
        **({"true_box": sample.box.as_list()} if sample.box else {}),
        **({} if sample.looks is None else {"true_looks": [box.as_list() for box in sample.looks]}),
        **(
            {"turns": turn_rows(one)}
            if one.turns
            else {"boxes": [_box_row(one, number, objects) for number in range(len(one.attempts))]}
        ),
    }


def _box_row(one: QuestionRollouts, number: int, objects: Objects) -> dict[str, Any]:
    attempt = one.attempts[number]
    look, right = attempt.looks[0], right_object(attempt, objects)
    return {
        "text": look.text,
        "box": look.box.as_list() if look.box else None,
        **({"error": look.error} if look.error else {}),
        **({} if right is None else {"right_object": right}),
        "reward": one.box_rewards[number],
        "advantage": one.boxes.values[number],
        "answers": [look.answer for look in attempt.looks if look.answer_completion is not None],
        "rewards": one.scored.rewards[number],
        "advantages": list(one.answers[number].values),
        "parts": {label: rows[number] for label, rows in one.scored.parts.items()},
    }
