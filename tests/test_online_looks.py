"""Online reinforcement with several looks: credit, gradients, prices, what comes to no end, runs that resume."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from looking_anywhere import looking_anywhere
from online_runs import online_config, read_lines
from safetensors.torch import load_file
from test_online import collator, loss_and_gradients, model, separate  # noqa: F401 (fixtures)
from waiting import wait_until

from visrl.config import ConfigError, read_config
from visrl.conversation import focus_conversation, image_view
from visrl.engines.base import Completion, Sampling, seed_of
from visrl.engines.local import LocalEngine
from visrl.images import open_image
from visrl.packing.forward import token_logps
from visrl.records import Picture
from visrl.report.shapes import LooksRolloutShape, fault
from visrl.rewards.advantages import Fork, credit_at_forks, grpo
from visrl.rollout.episodes import SampledTurn, sampled_turns
from visrl.rollout.rollout import OpenedQuestion
from visrl.scenes import scene_samples
from visrl.train.config import TrainConfig
from visrl.train.items import Collator
from visrl.train.online_rollouts import pack_responses
from visrl.train.online_turns import outcomes_of, turn_responses, until_stop
from visrl.train.responses import Response
from visrl.train.rollout_cards import rollout_cards
from visrl.train.run import train
from visrl.train.show_rollouts import completion_rows
from visrl.train.turn_watch import all_turns, weighted_ends

# --- the tree of a question -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees(model, collator: Collator) -> list[list[SampledTurn]]:  # noqa: F811
    """Turns at two questions: two first ones, two after each of the first two looks, up to three looks."""
    engine, questions = LocalEngine(model, collator.encoder), []
    for number in range(2):
        sample = scene_samples("train", 5 * number, 1)[0]
        whole = image_view(Picture(sample.image), open_image(sample.image))
        talk = focus_conversation(sample.question, whole)
        questions.append(OpenedQuestion(sample, whole, engine.processed_size(whole.size), talk))
    seeds = [partial(_seed, number) for number in range(2)]
    sampling = Sampling(1.0, 1.0, 4, logprobs=True)
    return sampled_turns(engine, questions, looking_anywhere(3), "exact", sampling, (2, 2, 2), seeds)


def _seed(number: int, path: tuple[int, ...]) -> int:
    return seed_of(7, number, *path)


def credited(trees: list[list[SampledTurn]]) -> list[Fork]:
    chance = random.Random(1)
    rewards = iter(lambda: chance.choice([0.0, 0.5, 1.0]), None)
    return credit_at_forks([outcomes_of(turns, rewards) for turns in trees], grpo)


def responses(trees: list[list[SampledTurn]], collator: Collator) -> list[list[Response]]:  # noqa: F811
    forks = zip(trees, credited(trees), strict=True)
    return [turn_responses(str(n), turns, fork, collator) for n, (turns, fork) in enumerate(forks)]


def test_gradients_equal_those_of_one_row_per_turn(model, collator: Collator, trees) -> None:  # noqa: F811
    """Image, question and every crop once; each turn after the very conversation that it was sampled after."""
    questions = responses(trees, collator)
    assert max(len(one.prompt.views) for own in questions for one in own) == 4
    assert sum(map(len, questions)) == sum(1 for turns in trees for _ in all_turns(turns))
    batch = pack_responses(questions, collator, mask_truncated=False, keep_all=True)
    assert batch is not None
    assert batch.packed.tokens < batch.packed.separate_tokens / 3
    flat = [one for own in questions for one in own]
    ours = loss_and_gradients(model, "grpo", token_logps(model, batch.packed), batch.packed.branch, flat)
    alone = [separate(model, collator.encoder, one) for one in flat]
    numbers = torch.cat([torch.full((len(logps),), n) for n, logps in enumerate(alone)])
    theirs = loss_and_gradients(model, "grpo", torch.cat(alone), numbers, flat)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert float((a - b).norm() / b.norm().clamp(min=1e-12)) < 1e-4
    sampled = torch.cat([torch.tensor(one.completion.logps) for one in flat])
    torch.testing.assert_close(sampled, torch.cat(alone).detach(), rtol=1e-4, atol=1e-5)


def test_rows_are_named_by_their_path_and_ends_weigh_what_they_are_reached(collator: Collator, trees) -> None:  # noqa: F811
    rows = [one.row for one in responses(trees, collator)[0]]
    assert rows[0] == "0/turn 0"
    assert len(set(rows)) == len(rows)
    assert max(row.count(".") for row in rows) == 3
    weights = list(weighted_ends(trees[0]))
    assert sum(weight for weight, _ in weights) == pytest.approx(1)
    assert all(turn.after.end is not None for _, turn in weights)


def test_what_is_sampled_after_a_stop_text_is_not_learned_from() -> None:
    def decode(ids: Any) -> str:
        return "".join("a</x>b"[n] for n in ids)

    said = Completion("a</x>b", 6, "length", ids=tuple(range(6)), logps=tuple(-0.1 * n for n in range(6)))
    heard = until_stop(said, ("</x>",), decode)
    assert (heard.ids, len(heard.logps), heard.finish_reason) == (tuple(range(5)), 5, "stop")
    assert until_stop(said, ("</y>",), decode) is said


# --- runs -------------------------------------------------------------------------------------------------------------


def test_steps_with_two_looks_resume_where_they_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its third step and gone on: weights, rollouts and log of a run that was never killed."""
    given: dict[str, Any] = {
        "max_looks": 2, "num_forks": 2, "look_price": 0.1, "rewards": ["answer", "iou"], "max_steps": 3,
        "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "rollout_samples": 2,
        "rollout_dataset": "scenes:validation/0+8", "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    whole = train(online_config(tmp_path / "whole", **given))
    from visrl.train import online

    score, calls = online.score_rollouts, []

    def score_and_stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(online, "score_rollouts", score_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(online_config(tmp_path / "again", **given))
    again = train(online_config(tmp_path / "again", **given))
    for name in ("adapter_model.safetensors", "rollouts.jsonl"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    weights = load_file(whole / "adapter_model.safetensors")
    assert any(weights[name].abs().sum() > 0 for name in weights if "lora_B" in name)
    rows = [row for row in read_lines(whole / "log.jsonl") if "loss" in row]
    told = {"looks_mean", "no_look", "unfinished", "looks/1", "reward/1"}
    assert {f"rollout/{name}" for name in told} <= rows[0].keys()
    assert {"frac_reward_zero_std/1", "left_out/image_tokens", "entropy/box", "entropy/answer"} <= rows[0].keys()
    held_out = next(row for row in read_lines(whole / "log.jsonl") if "eval_rollout/n" in row)
    assert held_out["eval_rollout/looks_mean"] <= 2
    first = read_lines(whole / "rollouts.jsonl")[0]
    for turn in first["turns"]:
        for end in turn.get("turns", []):
            if end.get("end") == "answered":
                scores = end["parts"]
                assert end["reward"] == pytest.approx(0.9 * (scores["answer"] + scores["iou"]))


@pytest.mark.parametrize("given", [
    {"stage": "ppo", "kl_coef": 0.1},
    {"stage": "raft", "dynamic_sampling": True, "max_resample_times": 1, "mask_truncated_completions": True},
    {"stage": "reinforce++", "beta": 0.1, "num_iterations": 2, "epsilon": 0.1, "finetuning_type": "full"},
])  # fmt: skip
def test_every_estimator_learns_from_several_looks(tmp_path: Path, given: dict[str, Any]) -> None:
    """With what goes with it: a value head, a KL, several updates, questions that are sampled again."""
    out = train(online_config(tmp_path / "out", max_looks=2, rewards=["iou", "area"], max_steps=1, **given))
    row = next(row for row in read_lines(out / "log.jsonl") if "loss" in row)
    assert row["grad_norm"] > 0
    assert row["sampling/logp_difference"] < 1e-4
    assert ("resampled" in row, "kl" in row) == ("dynamic_sampling" in given, "dynamic_sampling" not in given)
    if given["stage"] == "ppo":  # what a turn is worth is its reward, and the advantages are those of its tokens
        for turn in read_lines(out / "rollouts.jsonl")[0]["turns"]:
            assert turn["advantage"] == turn["value"]


def test_a_card_shows_every_look_of_an_answer_in_order() -> None:
    """Two looks of the second first turn, and none of the first."""
    end = {"end": "answered", "parts": {"answer": 1.0}, "value": 1.0, "reward": 1.0}
    second = {"text": "b", "looks": [[0.5, 0.5, 1, 1]], "value": 1.0, "advantage": 0.0,
              "turns": [{"text": "7", "looks": [], "answer": "7", "advantage": 0.0, **end}]}  # fmt: skip
    turns = [
        {"text": "8", "looks": [], "answer": "", "advantage": -0.5, **end, "parts": {"answer": 0.0}, "end": "turns"},
        {"text": "a", "looks": [[0, 0, 0.5, 0.5]], "value": 1.0, "advantage": 0.5, "turns": [second]},
    ]
    row = {"step": 3, "id": "q", "image": "scene:train/0", "question": "Which?", "answer": "7", "turns": turns,
           "true_looks": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]}  # fmt: skip
    assert fault(row, LooksRolloutShape) is None
    assert fault({**row, "turns": [{**second, "end": "answered"}]}, LooksRolloutShape) is not None
    (card,) = rollout_cards([row], "exact")
    assert [[len(one.crops) for one in start.ends] for start in card.starts] == [[0], [2]]
    assert [number for number, picture in card.starts[1].ends[0].crops if picture] == ["2", "2.1"]
    assert [start.standing for start in card.starts] == ["worse", "better"]
    assert [start.ends[0].answer.right for start in card.starts] == [False, True]
    assert card.starts[0].ends[0].answer.text == "(no answer)"
    assert [(one["box"], one["completion"], one["box_advantage"]) for one in completion_rows([row])] == [
        ("", "", -0.5), ("a → b", "7", 0.5),
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_at_the_command_line_it_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL once the second step's rollouts are there; the same command goes on."""

    def command(name: str) -> list[str]:
        given = online_config(
            tmp_path / name, max_looks=2, num_forks=2, look_price=0.05, max_steps=3, save_steps=1,
            save_strategy="steps", rewards=["answer", "iou"],
        )  # fmt: skip
        keys = [
            f"{key}={json.dumps(value)}" for key, value in given.model_dump(mode="json", exclude_unset=True).items()
        ]
        return [sys.executable, "-m", "visrl.cli", "train", *keys]

    subprocess.run(command("whole"), check=True, capture_output=True)
    with subprocess.Popen(command("again"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        journal = tmp_path / "again" / "rollouts.jsonl"
        wait_until(lambda: journal.is_file() and len(journal.read_bytes().splitlines()) > 2)
        process.kill()
    subprocess.run(command("again"), check=True, capture_output=True)
    for name in ("adapter_model.safetensors", "rollouts.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "told"), [
    (["max_looks=2", "num_forks=3"], "num_forks: there are at most 2 turns after the first"),
    (["protocol=treevgr", "num_forks=2"], "num_forks: there are at most 0 turns"),
    (["max_looks=0", "num_answers=2"], "num_answers: no look is gone on from several times"),
    (["look_price=0.1"], "look_price: one look is always taken"),
    (["punish_unfinished=true"], "punish_unfinished: one look always comes to an answer"),
    (["max_looks=2", "rewards=[critic]", "critic=oracle"], "rewards: critic is asked about one box"),
    (["max_looks=2", "rewards=['model:somewhere']"], "rewards: model:somewhere is asked about one box"),
    (["protocol=deepeyes", "rewards=[crop_gain]"], "rewards: crop_gain compares with an answer as visrl asks"),
    (["protocol=deepeyes", "crop_rule=margin"], "crop_rule: deepeyes says itself"),
])  # fmt: skip
def test_keys_of_several_looks_that_do_not_go_together_are_refused(said: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", "stage=grpo", *said])


def test_held_out_rollouts_of_a_warm_up_may_look_several_times() -> None:
    given = ["model_name_or_path=m", "output_dir=o", "stage=sft", "max_looks=2"]
    with pytest.raises(ConfigError, match="max_looks: stage: sft samples nothing"):
        read_config(TrainConfig, None, given)
    read = read_config(TrainConfig, None, [*given, "rollout_samples=8", "rollout_dataset=scenes:validation/0+8"])
    assert read.max_looks == 2
