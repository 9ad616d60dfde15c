"""Sampled episodes as trees of turns: their widths, their seeds, every form of engine, and what fails."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from http_server import serving
from looking_anywhere import looking_anywhere
from loud import louder
from test_zoom import SIZE, whole
from tiny_families import make, plain

from visrl.codecs import CODECS
from visrl.config import build_config
from visrl.conversation import View, focus_conversation
from visrl.engines.base import Sampling, seed_of
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.openai_server import Endpoint
from visrl.errors import UserError
from visrl.records import Sample
from visrl.rollout.episodes import SampledTurn, leaves, look_at_end, sampled_turns
from visrl.rollout.rollout import OpenedQuestion
from visrl.zoom.config import ForkedLooksConfig, LooksConfig

WARM = Sampling(1.0, 1.0, 5, logprobs=True)


def opened(policy, number: int) -> OpenedQuestion:
    view = View(f"picture {number}", whole().image.crop((60 * number, 0, 60 * number + 112, 112)))
    sample = Sample(str(number), view.key, f"Which number is {number}?", "7")
    talk = focus_conversation(sample.question, view)
    return OpenedQuestion(sample, view, policy.processed_size(view.size), talk)


def turns_of(policy, questions, widths, sampling=WARM) -> list[list[SampledTurn]]:
    seeds = [partial(_seed, one.sample.id) for one in questions]
    policy.forget()
    return sampled_turns(policy, questions, looking_anywhere(3), "exact", sampling, widths, seeds)


def _seed(name: str, path: tuple[int, ...]) -> int:
    return seed_of(5, name, *path)


def said(turns: list[SampledTurn]) -> list[object]:
    return [(turn.completion.text, turn.completion.ids, turn.seed, said(turn.turns)) for turn in turns]


def below(turns: list[SampledTurn]) -> list[SampledTurn]:
    return [one for turn in turns for one in (turn, *below(turn.turns))]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_vl plain", "lfm2_vl"])
def test_turns_form_a_tree_that_depends_on_no_other_question(family: str):
    """With shared prefixes, in the plain form and with states: three first turns, two after each look, then one."""
    name, *form = family.split()
    model, encoder = make(name)
    louder(model)
    engine = LocalEngine(model, plain(model, encoder) if form else encoder)
    questions = [opened(engine, number) for number in range(3)]
    found = turns_of(engine, questions, (3, 2))
    flat = [turn for own in found for turn in below(own)]
    assert {len(turn.turns) for turn in flat if turn.after.turn == 1} == {0, 2}
    assert {len(turn.turns) for turn in flat if turn.after.turn == 2} == {0, 1}
    assert max(len(turn.after.looks) for turn in flat) == 3
    assert len({turn.seed for turn in flat}) == len(flat)
    assert all(bool(turn.turns) == (turn.after.end is None) for turn in flat)
    assert all(len(turn.completion.logps) == len(turn.completion.ids) > 0 for turn in flat)
    assert said(turns_of(engine, questions[1:2], (3, 2))[0]) == said(found[1])
    wider = turns_of(engine, questions[1:], (3, 3))[0]
    assert [said(turn.turns[:2]) for turn in wider] == [said(turn.turns) for turn in found[1]]
    chains = [chain for own in found for first in own for chain in leaves(first)]
    assert all(one.after == two.before for chain in chains for one, two in pairwise(chain))
    assert sum(turn.after.end is not None for turn in flat) == len(chains)
    looks = [look_at_end(chain) for chain in chains]
    assert [look.looks for look in looks] == [chain[-1].after.looks for chain in chains]
    assert {look.end for look in looks} == {"answered"}


def test_a_turn_that_fails_ends_its_episode_and_no_other():
    def script(handler, body):
        if len(handler.server.bodies) == 2:
            handler.send(400, b'{"error": {"message": "no more room"}}')
        else:
            handler.text("a box" if len(handler.server.bodies) < 4 else "7")

    with serving(script) as server:
        policy = EndpointEngine(Endpoint((server.url,), "m", attempts=1, concurrency=1), CODECS["qwen2_5_vl"])
        view = whole()
        question = OpenedQuestion(Sample("1", "p", "Which?", "7"), view, SIZE, focus_conversation("Which?", view))
        (own,) = turns_of(policy, [question], (2,), Sampling(1.0, 1.0, 5))
        policy.close()
    ended = [chain[-1] for first in own for chain in leaves(first)]
    assert sorted(turn.after.end for turn in ended) == ["answered", "failed"]
    failed = next(turn for turn in ended if turn.after.end == "failed")
    look = look_at_end([failed])
    assert look.answer is None
    assert look.error.split(":")[0] in ("engine", "prompt")
    assert "no more room" in look.error


@pytest.mark.parametrize(("keys", "told"), [
    ({"max_looks": 13}, "max_looks"),
    ({"max_looks": 2, "protocol": "viscot"}, "Input should be 'visrl', 'deepeyes'"),
    ({"max_looks": 2, "protocol": "deepeyes"}, "deepeyes has its own limits"),
    ({"protocol": "deepeyes", "protocol_faults": ["labels_count_turns"]}, "protocol_faults: deepeyes has no fault"),
    ({"num_forks": 2}, "num_forks: one look is always taken"),
    ({"look_price": 0.1}, "look_price: one look is always taken"),
    ({"look_price": -0.1, "max_looks": 1}, "look_price"),
    ({"protocol": "deepeye"}, "Input should be 'visrl', 'deepeyes'"),
])  # fmt: skip
def test_keys_of_several_looks_are_checked_in_one_place(keys: dict[str, object], told: str):
    with pytest.raises(UserError, match=told):
        build_config(ForkedLooksConfig, dict(keys), where="the test")


def test_no_look_at_all_is_several_looks_too():
    assert LooksConfig(max_looks=0).looks_several_times
    assert not LooksConfig(protocol="visrl").looks_several_times
