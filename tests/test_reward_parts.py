"""The parts of an online reward by hand, what None does, and functions of one's own with TRL's signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from visrl.box import Box
from visrl.config import CheckpointConfig, ConfigError
from visrl.conversation import View
from visrl.engines.base import Completion
from visrl.records import Sample
from visrl.rewards.open_parts import OPENERS, RewardSetting, opened_parts
from visrl.rewards.parts import PARTS, Attempt, Part, PartKind, RewardPart, Scored, Scores, check_parts, score_attempts
from visrl.rewards.reward_function import RewardError
from visrl.rollout.steps import Look

NO_ENCODER: Any = None  # which no part here asks
SETTING = RewardSetting(
    CheckpointConfig(model_name_or_path="m"), [], NO_ENCODER, "exact", None, seed=0, device="cpu", folder=Path("runs")
)
WHOLE = View("a", Image.new("RGB", (8, 8)))
SAMPLE = Sample("q", "a.png", "Which?", "7", box=Box(0, 0, 0.5, 0.5))
QUARTER, HALF = Box(0, 0, 0.5, 0.5), Box(0, 0, 1, 0.5)


def attempt(*answers: str | None, box: Box | None = QUARTER, sample: Sample = SAMPLE, **more) -> Attempt:
    error = more.pop("error", None if box else "box: no box")
    looks = tuple(
        Look("Which?", WHOLE, "[…]", box, error, answer, answer_completion=Completion(answer, ids=(4, 2)))
        for answer in answers
    )
    return Attempt(sample, looks, **more)


def parts(*given: object) -> list[RewardPart]:
    return list(check_parts(TypeAdapter(list[Part]).validate_python(list(given))))


def scored(given: list[RewardPart], *attempts: Attempt, setting: RewardSetting = SETTING) -> Scored:
    with opened_parts(given, setting) as scorers:
        (found,) = score_attempts(given, scorers, [attempts])
    return found


def rewards(given: list[RewardPart], *attempts: Attempt) -> list[list[float | None]]:
    return scored(given, *attempts).rewards


UNREADABLE = attempt(None, box=None)


def test_every_part_by_hand() -> None:
    """Answers 7 (right) and 8 from a quarter and from a half of the image; IoU of the half with the true quarter ½."""
    tried = [attempt("7", "8"), attempt("8", "8", box=HALF), UNREADABLE]
    wanted = {
        "answer": [[1, 0], [0, 0], [0]],
        "outcome": [[0.5, 0.5], [0, 0], [0]],
        "format": [[1, 1], [1, 1], [0]],
        "iou": [[1, 1], [0.5, 0.5], [0]],
        "area": [[0.75, 0.75], [0.5, 0.5], [0]],
    }
    for name, scores in wanted.items():
        assert rewards(parts(name), *tried) == scores


def test_a_crop_gains_where_the_answer_was_wrong_without_it() -> None:
    assert rewards(parts("crop_gain"), attempt("7", "8", without="8")) == [[1, 0]]
    assert rewards(parts("crop_gain"), attempt("7", "8", without="7")) == [[0, 0]]
    assert rewards(parts("crop_gain"), attempt("7", without=None)) == [[1]]


def test_metrics_and_weights() -> None:
    given = parts({"name": "answer", "metric": "relaxed", "weight": 2}, {"name": "area", "weight": -0.4})
    number = Sample("q", "a.png", "How many?", "100")
    assert rewards(given, attempt("103", "110", sample=number)) == [[pytest.approx(1.7), pytest.approx(-0.3)]]
    assert given[0].label == "answer_relaxed"


def test_a_bonus_counts_only_where_its_condition_is_right() -> None:
    given = parts("answer", {"name": "area", "weight": 0.4, "when": "answer"})
    assert rewards(given, attempt("7", "8"), UNREADABLE) == [[1.3, 0.0], [0.0]]


def test_a_part_of_no_weight_is_only_watched() -> None:
    found = scored(parts("answer", {"name": "area", "weight": 0}), attempt("7"))
    assert found.rewards == [[1.0]]
    assert found.parts == {"answer": [[1.0]], "area": [[0.75]]}


def test_what_cannot_be_told_is_none_and_never_0() -> None:
    """A part that says nothing about a whole question is left out of it; a failed engine leaves a look out."""
    without_box = Sample("q", "a.png", "Which?", "7")
    assert rewards(parts("answer", "iou"), attempt("7", "8", sample=without_box)) == [[1, 0]]
    assert rewards(parts("iou"), attempt("7", sample=without_box)) == [[None]]
    assert rewards(parts("answer"), attempt("7"), attempt(None, error="engine: no text")) == [[1], [None]]
    assert rewards(parts("answer"), attempt("7", sample=Sample("q", "a.png", "Which?", ""))) == [[None]]


@pytest.mark.parametrize(("given", "said"), [
    (["anser"], "'answer', 'outcome'"),
    ([], "at least one part"),
    ([{"name": "answer", "weight": 0}], "nothing would be learned"),
    (["answer", "answer"], "twice"),
    ([{"name": "area", "metric": "anls"}], "compares no answers"),
    (["answer", {"name": "area", "when": "iou"}], "no other part"),
    ([{"name": "area", "when": "area"}], "no other part"),
    ([{"name": "answer", "wieght": 1}], "Extra inputs"),
    ([{"name": "answer", "metric": "bleu"}], "'exact'"),
])  # fmt: skip
def test_a_list_that_cannot_be_meant_is_refused(given: list[object], said: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=said):
        parts(*given)


# --- Parts that are opened once for a run -------------------------------------------------------------------------


def test_a_part_is_opened_once_and_asked_once_a_step_about_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def opened(part: RewardPart, setting: RewardSetting) -> Iterator[Any]:
        if part.argument == "nowhere":
            raise ConfigError(f"{part.argument} is not there")
        seen.append(f"open {part.argument} for {setting.config.model_name_or_path}")

        def scorer(attempts: Sequence[Attempt]) -> list[Scores]:
            seen.append(f"score {len(attempts)}")
            return [[None if look.answer == "8" else 0.25 for look in one.looks] for one in attempts]

        yield scorer
        seen.append("close")

    monkeypatch.setitem(PARTS, "scale", PartKind(None, "a scale", argument="PATH"))
    monkeypatch.setitem(OPENERS, "scale", opened)
    given = parts("answer", {"name": "scale:some/where", "weight": 2})
    assert [part.label for part in given] == ["answer", "scale:where"]
    failed = attempt(None, error="engine: no text")
    with opened_parts(given, SETTING) as scorers:
        first, second = score_attempts(given, scorers, [[attempt("7", "8"), failed], [UNREADABLE]])
        score_attempts(given, scorers, [[failed]])  # nothing to ask about
    assert first.rewards == [[1.5, None], [None]]
    assert second.rewards == [[0.5]]
    assert seen == ["open some/where for m", "score 2", "close"]
    with pytest.raises(ConfigError, match="nowhere is not there"), opened_parts(parts("scale:nowhere"), SETTING):
        pass
    with pytest.raises(ValidationError, match="'scale:PATH', or module:function"):
        parts("scale")


# --- Functions of one's own -------------------------------------------------------------------------------------------

MODULE = """
def length(prompts, completions, completion_ids, **kwargs):
    assert len(kwargs["box"]) == len(kwargs["answer"]) == len(prompts)
    return [len(one[0]["content"]) - len(ids) for one, ids in zip(completions, completion_ids)]

def one_unread(completions, **kwargs): return [None, 1.0, 0.5]
def short(completions, **kwargs): return [1.0]
def nan(completions, **kwargs): return [float("nan")] * len(completions)
def text(completions, **kwargs): return ["good"] * len(completions)
def nothing(completions, **kwargs): return None
def stops(completions, solution, **kwargs): return [{}[s] for s in solution]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rewards_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_of_ones_own(module: str) -> None:
    given = parts({"name": f"{module}:length", "weight": 0.5})
    assert rewards(given, attempt("77", "7"), UNREADABLE) == [[0.0, -0.5], [-1.0]]
    assert rewards(parts(f"{module}:one_unread"), attempt("7", "8"), UNREADABLE) == [[None, 1.0], [0.5]]


def test_a_function_is_not_asked_about_what_failed(module: str) -> None:
    given = parts(f"{module}:one_unread")
    assert rewards(given, attempt(None, error="prompt: no"), attempt("7", "8", "9")) == [[None], [None, 1.0, 0.5]]


@pytest.mark.parametrize(("name", "said"), [
    ("short", "1 numbers for 2 completions"), ("nan", "sample 'q': nan is no number"), ("text", "'good' is no number"),
    ("nothing", "NoneType, and not a list"), ("stops", r"stopped with KeyError: '7' \(.*line \d+\)"),
    ("none", "has no 'none'"),
])  # fmt: skip
def test_a_fault_of_a_function_is_a_sentence(module: str, name: str, said: str) -> None:
    from visrl.errors import UserError

    with pytest.raises(UserError, match=said) as refused:
        rewards(parts(f"{module}:{name}"), attempt("7", "8"))
    assert isinstance(refused.value, RewardError) or name == "none"
