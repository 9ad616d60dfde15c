"""`critic: outcome`: several answers from each crop, what grades them, and what becomes of one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_server import Handler, serving

from visrl.box import Box
from visrl.config import ConfigError, build_config
from visrl.data.native import from_json, read_records
from visrl.engines.base import Completion
from visrl.evolve.check import check_critic
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import generate
from visrl.evolve.serving import merge_shards
from visrl.manifest import read_manifest
from visrl.models.tiny import CHECKPOINT
from visrl.records import RecordError, Sample, Trajectory, Verdict, to_json
from visrl.rewards.critic import ModelCritic, count_verdicts, critic_failure
from visrl.rewards.grader import FunctionCritic
from visrl.rewards.metrics import exact_match
from visrl.rewards.open import CriticConfig
from visrl.rewards.outcome import Judge, OutcomeCritic, metric_grader

BOX = Box(0.1, 0.1, 0.4, 0.4)
SAMPLE = Sample("a", "scene:test/0", "How many?", "7")


def tried(*answers: str) -> Trajectory:
    return Trajectory("a", 0, 0, "", BOX, "sampled", answers[0], "test", 0, None, 0, answers if answers[1:] else ())


def config_of(out: Path, **given: Any) -> GenerateConfig:
    values = {
        "model_name_or_path": str(CHECKPOINT), "dataset": "scenes:preference/0+6", "rounds": 2, "batch_size": 3,
        "critic": "outcome", "answers": 3, **given,
    }  # fmt: skip
    return GenerateConfig(output_dir=out, **values)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return generate(config_of(tmp_path_factory.mktemp("outcome") / "made"))


def rows(folder: Path) -> list[tuple[Trajectory, Verdict]]:
    kinds = ((Trajectory, "trajectories"), (Verdict, "verdicts"))
    return list(zip(*(read_records(kind, folder / f"{name}.jsonl") for kind, name in kinds), strict=True))


# --- Generation


def test_a_box_scores_the_share_of_its_answers_that_are_right(made):
    reference = {sample.place: sample.answer for sample in _questions(made)}
    answered = [(one, verdict) for one, verdict in rows(made) if one.error is None]
    assert len(answered) > 10
    for one, verdict in answered:
        assert len(one.answers) == 3
        assert one.answers[0] == one.answer
        right = tuple(exact_match(answer, [reference[one.place]]) for answer in one.answers)
        assert (verdict.answer_score, verdict.answer_scores) == (right[0], right)
        assert verdict.box_score == sum(right) / 3
    assert any(len(set(one.answers)) > 1 for one, _ in answered), "each answer has a seed of its own"
    assert all((one.answers, verdict.box_score) == ((), None) for one, verdict in rows(made) if one.error)


def _questions(folder: Path) -> list[Sample]:
    from visrl.evolve.generate import generation_questions

    return generation_questions(config_of(folder))


def test_one_answer_is_what_it_was_and_the_first_of_several(made, tmp_path):
    single = generate(config_of(tmp_path / "one", answers=1))
    assert b"answers" not in (single / "trajectories.jsonl").read_bytes()
    assert b"answer_scores" not in (single / "verdicts.jsonl").read_bytes()
    for (one, _), (several, _) in zip(rows(single), rows(made), strict=True):
        assert (one.box_text, one.origin, one.answer, one.seed) == (
            several.box_text, several.origin, several.answer, several.seed,
        )  # fmt: skip


def test_tokens_are_counted_through_a_kill_and_in_shards(made, tmp_path):
    facts = json.loads((made / "manifest.json").read_text())
    sampled = facts["sampled_tokens"]
    assert sampled["box"] > sampled["answer"] > 3 * len(rows(made)) / 2
    assert sampled["critic"] == 0
    assert facts["prefilled_tokens"] > 0

    out = tmp_path / "out"
    out.mkdir()
    (out / "started.json").write_bytes((made / "started.json").read_bytes())
    for name, share in (("trajectories", 0.7), ("verdicts", 0.6), ("tokens", 1.0)):
        data = (made / f"{name}.jsonl").read_bytes()
        (out / f"{name}.jsonl").write_bytes(data[: int(share * len(data))])
    generate(config_of(out))
    parts = [generate(config_of(tmp_path / f"part{n}", shard=f"{n}/2")) for n in (1, 2)]
    for other in (out, merge_shards(parts, tmp_path / "joined")):
        told = json.loads((other / "manifest.json").read_text())
        assert (told["sampled_tokens"], told["prefilled_tokens"]) == (sampled, facts["prefilled_tokens"])
        for name in ("trajectories", "verdicts"):
            assert (other / f"{name}.jsonl").read_bytes() == (made / f"{name}.jsonl").read_bytes()


def test_a_check_asks_about_answers_alone(tmp_path, capsys):
    result = check_critic(config_of(tmp_path / "out", answers=1), 6)
    assert (result["boxes"], result["answers"]["auc"]) == (None, 1.0)
    assert "boxes: not checked, they are scored by answers" in capsys.readouterr().out


# --- Graders


def test_metrics_grade_and_the_answers_of_several_people_count_where_the_metric_says_so():
    voted = Sample("a", "a.png", "Which?", "ja", raw={"answers": ["ja", "ja", "oui", "oui", "yes"]})
    (exact,) = OutcomeCritic("exact", metric_grader("exact")).judge([voted], [tried("oui", "ja")])
    assert (exact.box_score, exact.answer_scores, exact.raw) == (0.5, (0.0, 1.0), "")
    (vqa,) = OutcomeCritic("vqa", metric_grader("vqa")).judge([voted], [tried("oui", "no")])
    # Each person left out in turn: 2 × min(1, 1/3) + 3 × min(1, 2/3), over 5.
    assert vqa.answer_scores == pytest.approx(((2 / 3 + 2) / 5, 0.0))
    (similar,) = OutcomeCritic("anls", metric_grader("anls")).judge([SAMPLE], [tried("7")])
    assert (similar.box_score, similar.answer_scores) == (1.0, ())


def test_a_judge_that_cannot_be_read_leaves_no_score_and_is_counted():
    said = {"1": "score: 1", "0": "score: 0", "?": "hm", "x": None}

    def ask_all(asks, on_reply=None):
        replies = []
        for index, ask in enumerate(asks):
            answer = next(key for key in said if f"model's answer: {key}" in ask.messages[1]["content"])
            error = "gone" if said[answer] is None else None
            replies.append(Completion(said[answer], tokens=5, error=error, finish_reason="error" if error else "stop"))
            on_reply(index, replies[-1])
        return replies

    critic = OutcomeCritic("j", Judge(ask_all, "j", 64))
    tries = [tried("1", "0"), tried("1", "?"), tried("?", "?"), tried("1", "x")]
    half, one, none, failed = critic.judge([SAMPLE] * 4, tries)
    assert (half.box_score, half.answer_scores) == (0.5, (1.0, 0.0))
    assert (one.box_score, one.answer_scores) == (1.0, (1.0, None))
    assert (none.box_score, none.answer_scores) == (None, (None, None))
    assert (critic_failure(failed), critic_failure(none)) == ("gone", None)
    assert count_verdicts([half, one, none, failed]) == {
        "judged": 4, "unread answer score": 3, "failed answer score": 1,
    }  # fmt: skip
    assert critic.sampled_tokens == 20, "the same answer to the same question is judged once"


def test_a_judge_may_be_behind_a_server_or_in_this_process(tmp_path):
    def script(handler: Handler, body: dict[str, Any]) -> None:
        said = body["messages"][-1]["content"]
        assert "image_url" not in json.dumps(body), "a judge is shown no picture"
        handler.text("score: 1" if "model's answer: 1" in str(said) else "well")

    few = {"dataset": "scenes:preference/0+2", "rounds": 1, "answers": 2, "grader": "judge"}
    with serving(script) as server:
        out = generate(config_of(tmp_path / "served", **few, critic_url=server.url, critic_served_name="m"))
    answered = [(one, verdict) for one, verdict in rows(out) if one.error is None]
    assert answered
    for one, verdict in answered:
        scores = [1.0 if answer.startswith("1") else None for answer in one.answers]
        assert (list(verdict.answer_scores), verdict.box_score) == (scores, 1.0 if 1.0 in scores else None)
    facts = read_manifest(out)
    assert facts["critic"] == "outcome:m"
    different = {(one.place, answer) for one, _ in answered for answer in one.answers}
    assert facts["requests"]["critic"]["ok"] >= len(different)
    unread = sum(score is None for _, verdict in answered for score in verdict.answer_scores)
    assert facts["counts"].get("unread answer score", 0) == unread
    facts = read_manifest(generate(config_of(tmp_path / "here", **few, critic_model_name_or_path=str(CHECKPOINT))))
    assert (facts["critic"], facts["requests"]) == (f"outcome:{CHECKPOINT}", {})
    assert facts["sampled_tokens"]["critic"] > 0


def test_other_critics_score_every_answer_and_the_box_once():
    shown = []

    def grader(samples, trajectories):
        shown.extend(trajectories)
        return [(0.1, float(one.answer == "7")) for one in trajectories]

    (verdict,) = FunctionCritic("mine", grader).judge([SAMPLE], [tried("7", "8", "7")])
    assert (verdict.box_score, verdict.answer_scores) == (0.1, (1.0, 0.0, 1.0))
    assert [(one.answer, one.answers) for one in shown] == [("7", ()), ("8", ()), ("7", ())]

    class Model:
        name = "m"
        asked = 0

        def complete(self, talks, sampling, seeds):
            self.asked += len(talks)
            return [[Completion("hm" if "eight" in talk.messages[0].text else "0.5", tokens=2)] for talk in talks]

    model = Model()
    critic = ModelCritic(model, attempts=1)
    (verdict,) = critic.judge([SAMPLE], [tried("7", "eight", "7")])
    assert (verdict.box_score, verdict.answer_scores) == (0.5, (0.5, None, 0.5))
    assert (model.asked, critic.sampled_tokens) == (3, 6), "the box, and each of two answers"
    assert count_verdicts([verdict]) == {"judged": 1, "unread answer score": 1}


# --- Records and keys


def test_several_answers_are_written_and_read_back():
    for record in (tried("7", "8"), Verdict("a", 0, 0, 0.5, 1.0, answer_scores=(1.0, None))):
        assert from_json(type(record), json.loads(json.dumps(to_json(record)))) == record
    row = to_json(tried("7", "8"))
    for wrong in ("7", ["7", 8], [None], {"7": 1}):
        with pytest.raises(RecordError, match="'answers' cannot"):
            from_json(Trajectory, row | {"answers": wrong})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"critic": "oracle", "grader": "exact"}, "grader: critic=oracle grades no answers by it"),
        ({"grader": "judge"}, "grader: critic=auto grades no answers"),
        ({"critic": "outcome", "critic_url": "http://h/v1"}, "critic_url: only grader: judge asks a model"),
        ({"critic": "outcome", "critic_max_tokens": 9}, "critic_max_tokens: only grader: judge"),
        ({"critic": "outcome", "grader": "judge", "critic_attempts": 2}, "critic_attempts: a judge is asked once"),
        ({"critic": "outcome", "grader": "exakt"}, "grader"),
    ],
)
def test_a_key_without_effect_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        build_config(CriticConfig, {"model_name_or_path": "m", **keys}, "here")
