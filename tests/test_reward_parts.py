"""The parts of an online reward by hand, what None does, and functions of one's own with TRL's signature."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from visrl.box import Box
from visrl.config import CheckpointConfig, ConfigError
from visrl.conversation import View
from visrl.engines.base import Completion
from visrl.errors import UserError
from visrl.records import RecordError, Sample
from visrl.rewards.asked_parts import RewardSetting
from visrl.rewards.choices import options_of, read_choice
from visrl.rewards.dual_iou import dual_iou
from visrl.rewards.open_parts import OPENERS, opened_parts
from visrl.rewards.parts import PARTS, Attempt, Part, PartKind, RewardPart, Scored, Scores, check_parts, score_attempts
from visrl.rewards.reward_function import RewardError
from visrl.rollout.steps import Look
from visrl.zoom.config import LooksConfig
from visrl.zoom.episode import ZoomedLook

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


def test_deepeyes_pays_for_the_tool_only_where_the_answer_is_right() -> None:
    """0.8 · right + 0.2 · format + 1.2 · (format where right): 2.2, 0.2 and 0; of one part a plain one and a bonus."""
    given = parts({"name": "answer", "weight": 0.8}, {"name": "format", "weight": 0.2},
                  {"name": "format", "weight": 1.2, "when": "answer"})  # fmt: skip
    found = scored(given, attempt("7", "8"), UNREADABLE)
    assert found.rewards == [[pytest.approx(2.2), pytest.approx(0.2)], [0]]
    assert found.parts["format"] == [[1, 1], [0]]
    assert found.parts["format_when_answer"] == [[1, 0], [0]]


def test_a_bonus_may_stand_on_a_bonus() -> None:
    given = parts({"name": "area", "when": "format_when_answer"}, {"name": "format", "when": "answer"}, "answer")
    assert rewards(given, attempt("7", "8")) == [[pytest.approx(0.75 + 1 + 1), 0]]


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


def test_an_answer_that_the_engine_failed_at_is_left_out_and_not_wrong() -> None:
    """The others from its crop count: of 7 and 8 one half is right."""
    three = attempt("7", "8", "9")
    broken = replace(three.looks[2], answer=None, error="engine: time-out")
    tried = replace(three, looks=(*three.looks[:2], broken))
    assert rewards(parts("answer"), tried) == [[1, 0, None]]
    assert rewards(parts("outcome"), tried) == [[0.5, 0.5, None]]


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


# --- Multiple choice and several true boxes ---------------------------------------------------------------------------

OPTIONS = {"A": "a red car", "B": "blue", "C": "green", "D": "Vitamin C"}


@pytest.mark.parametrize("reply", [
    "B", "b", "(b)", "B.", "[B]", "B)", "**B**", "B. blue", "(B) blue", "B: it is blue.\nIt is not red.", "Blue.", "Ｂ",
    "The answer is (B).", "Answer: B", "the correct option is B, I think", "answer is B because it is blue",
    r"so \boxed{B}", r"\boxed{\text{B}}", "A red one? No. <answer>B</answer>",
])  # fmt: skip
def test_a_letter_is_read(reply: str) -> None:
    assert read_choice(reply, OPTIONS) == "B"


@pytest.mark.parametrize("reply", [
    "BECAUSE", "Bob", "Banana", "A red one", "The answer is A red car", "not B", "A or B", "A, B", "A. or B.",
    "(A) or (B)", "A. x\nB. y", "answer is A or B", "Answer: A, B", "Answer is A/B", "The answer is BLUE",
    "The answer is B-flat", "E", "", "<answer>A</answer><answer>B</answer>", "I",
])  # fmt: skip
def test_a_letter_is_never_cut_out_of_a_word_and_none_taken_of_two(reply: str) -> None:
    assert read_choice(reply, OPTIONS) is None


def test_options_are_read_from_the_row_or_the_lines_of_the_question() -> None:
    assert options_of("Which?\n(A) red\n(B) blue\nAnswer with the letter.") == {"A": "red", "B": "blue"}
    assert options_of("Which?\nA. red\nB. blue") == {"A": "red", "B": "blue"}
    assert options_of("Which?\nB. x\nC. y") == options_of("Mr. A. Smith?") == {}
    assert options_of("Which?", {"choices": ["(A) red", "blue"]}) == {"A": "red", "B": "blue"}


def test_multiple_choice_is_a_metric() -> None:
    """Right by letter and by text; what names no option is wrong; a reference that names none says nothing."""
    asked = "Which?\nA. red\nB. blue"
    one = attempt("B", "blue", "A", "Banana", sample=Sample("q", "a.png", asked, "B"))
    assert rewards(parts({"name": "answer", "metric": "choice"}), one) == [[1, 1, 0, 0]]
    assert rewards(parts({"name": "outcome", "metric": "choice"}), one) == [[0.5] * 4]
    told = attempt("B", sample=Sample("q", "a.png", asked, "blue"))
    assert rewards(parts({"name": "answer", "metric": "choice"}), told) == [[1]]
    open_ended = attempt("B", sample=Sample("q", "a.png", "Why?", "because of rain"))
    assert rewards(parts({"name": "answer", "metric": "choice"}, "format"), open_ended) == [[1]]


def test_dual_iou_by_hand() -> None:
    """True: the left and the right quarter of the image. Predicted: the left one, or the left half.

    The quarter: recall (1 + 0) / 2, precision 1: ¾. The half: IoU ½ with the left: recall ¼, precision ½: ⅜. Both
    true boxes and a third that hits nothing: recall 1, precision ⅔: ⅚.
    """
    left, right, half = Box(0, 0, 0.25, 1), Box(0.75, 0, 1, 1), Box(0, 0, 0.5, 1)
    assert dual_iou([left], [left, right]) == 0.75
    assert dual_iou([half], [left, right]) == 0.375
    assert dual_iou([left, right, Box(0.3, 0, 0.7, 1)], [left, right]) == pytest.approx(5 / 6)
    assert dual_iou([], [left]) == 0
    assert dual_iou([half], [left]) == 0.5


def test_dual_iou_reads_the_boxes_of_a_row() -> None:
    """The image has 8 × 8 pixels. A single true box: dual IoU is IoU. One that is no box is a sentence."""
    objects = [{"name": "a", "bbox": [0, 0, 2, 8]}, {"name": "b", "bbox": [6, 0, 8, 8]}]
    for raw in ({"target_instances": objects}, {"bboxes": [[0, 0, 2, 8], [6, 0, 8, 8]]}):
        several = Sample("q", "a.png", "Which?", "7", raw=raw)
        tried = attempt("7", box=Box(0, 0, 0.25, 1), sample=several), attempt(None, box=None, sample=several)
        assert rewards(parts("dual_iou"), *tried) == [[0.75], [0]]
    assert rewards(parts("dual_iou"), attempt("7", box=HALF)) == [[0.5]]
    assert rewards(parts("dual_iou", "answer"), attempt("7", sample=replace(SAMPLE, box=None))) == [[1]]
    for fault in ([[0, 0, 9, 8]], [[2, 2]], [[4, 0, 2, 8]], "all"):
        with pytest.raises(RecordError, match=r"sample 'q'.*bboxes"):
            rewards(parts("dual_iou"), attempt("7", sample=replace(SAMPLE, raw={"bboxes": fault})))


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
import asyncio, numpy, torch
def length(prompts, completions, completion_ids, **kwargs):
    assert len(kwargs["box"]) == len(kwargs["answer"]) == len(prompts)
    return [len(one[0]["content"]) - len(ids) for one, ids in zip(completions, completion_ids)]

def one_unread(completions, **kwargs): return [None, 1.0, 0.5]
def short(completions, **kwargs): return [1.0]
def nan(completions, **kwargs): return [float("nan")] * len(completions)
def text(completions, **kwargs): return ["good"] * len(completions)
def nothing(completions, **kwargs): return None
def stops(completions, solution, **kwargs): return [{}[s] for s in solution]
def exits(completions, **kwargs): raise SystemExit(0)
def truth(completions, **kwargs): return [True] * len(completions)
def truth_of_numpy(completions, **kwargs): return numpy.ones(len(completions)) == 1
def imaginary(completions, **kwargs): return [1j] * len(completions)
def digits(completions, **kwargs): return "1" * len(completions)
def mapping(completions, **kwargs): return {0: 1.0, 1: 1.0}
def infinite(completions, **kwargs): return numpy.array([numpy.inf] * len(completions))
def huge(completions, **kwargs): return [10 ** 400] * len(completions)
def rows(completions, **kwargs): return torch.ones(len(completions), 2)
def generator(completions, **kwargs):
    for _ in completions:
        yield 1.0

def array(completions, **kwargs): return numpy.arange(len(completions), dtype=numpy.float32) / 2
def tensor(completions, **kwargs): return torch.arange(len(completions)) / 2
def scalars(completions, **kwargs): return [torch.tensor(0.0), numpy.float16(0.5)]

class Keeps:
    loop = None
    async def __call__(self, completions, **kwargs):
        self.loop = self.loop or asyncio.get_running_loop()
        await asyncio.sleep(0)
        return [float(asyncio.get_running_loop() is self.loop)] * len(completions)

keeps = Keeps()
async def fails(completions, **kwargs): raise LookupError("no such thing")

def mutates(prompts, completions, completion_ids, weights, **kwargs):
    scores = [sum(one) / 10 + len(ids) for one, ids in zip(weights, completion_ids)]
    for column in (prompts, completions, completion_ids, weights, *kwargs.values()):
        for entry in column:
            if isinstance(entry, list):
                entry.clear()
        column.clear()
    return scores

def columns(split, weights, note, box, **kwargs):
    assert "image_size" not in kwargs and box[0] == kwargs["true_box"][0]
    return [len(w) + (n is None) + (s == "train") for s, w, n in zip(split, weights, note)]

def how_often(looks, box, **kwargs):
    assert [one[-1] if one else None for one in looks] == box
    return [len(one) for one in looks]

def no_kwargs(completions): return [1.0] * len(completions)
def wants_more(completions, trainer_state, **kwargs): return [1.0] * len(completions)
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
    ("exits", "stopped with SystemExit: 0"), ("truth", r"True is no number; write float\(…\)"),
    ("truth_of_numpy", r"True is no number; write float\(…\)"), ("imaginary", "1j is no number"),
    ("digits", "str, and not a list"), ("mapping", "dict, and not a list"), ("generator", "generator, and not a list"),
    ("infinite", "inf is no number"), ("huge", r"10+\.\.\.0+ is no number"), ("rows", r"\[1.0, 1.0\] is no number"),
    ("fails", r"stopped with LookupError: no such thing \(.*line \d+\)"), ("none", "has no 'none'"),
    ("no_kwargs", r"no_kwargs\(completions\): got an unexpected keyword .*take \*\*kwargs"),
    ("wants_more", "missing a required argument: 'trainer_state'.*by keyword"),
])  # fmt: skip
def test_a_fault_of_a_function_is_a_sentence(module: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        rewards(parts(f"{module}:{name}"), attempt("7", "8"))
    assert isinstance(refused.value, RewardError if name not in ("none", "no_kwargs", "wants_more") else ConfigError)


@pytest.mark.parametrize("name", ["array", "tensor", "scalars"])
def test_numbers_of_numpy_and_torch_are_numbers(module: str, name: str) -> None:
    assert rewards(parts(f"{module}:{name}"), attempt("7", "8")) == [[0.0, 0.5]]


def test_an_async_function_has_one_loop_for_the_run_in_a_notebook_too(module: str) -> None:
    given = parts(f"{module}:keeps")

    async def in_a_notebook() -> None:
        with opened_parts(given, SETTING) as scorers:
            for _ in range(2):
                (found,) = score_attempts(given, scorers, [[attempt("7", "8")]])
                assert found.rewards == [[1.0, 1.0]]

    asyncio.run(in_a_notebook())


def test_columns_of_the_data_reach_a_function_where_ours_have_other_names(module: str) -> None:
    """weights [3, 4]: 2; no note: 1; of split train: 1. The row's own `box` is not the policy's."""
    raw = {"split": "train", "weights": [3, 4], "box": "mine", "prompt": "mine"}
    one, other = replace(SAMPLE, raw=raw), replace(SAMPLE, raw={"note": "x", "weights": [1]})
    setting = replace(SETTING, samples=[one, other])
    given = parts(f"{module}:columns")
    assert scored(given, attempt("7", sample=one), attempt("7", sample=other), setting=setting).rewards == [[4], [1]]
    with pytest.raises(ConfigError, match="missing a required argument: 'split'"):
        scored(given, attempt("7"))


def test_a_function_may_do_with_its_arguments_what_it_likes(module: str) -> None:
    """weights 3 + 4: 0.7, and two tokens; the parts after it, and the next step, find everything as it was."""
    own = replace(SAMPLE, raw={"weights": [3, 4]})
    setting = replace(SETTING, samples=[own])
    given = parts(f"{module}:mutates", "answer")
    for _ in range(2):
        found = scored(given, attempt("7", "8", sample=own), setting=setting)
        assert found.parts == {f"{module}:mutates": [[2.7, 2.7]], "answer": [[1, 0]]}


# --- Several looks ----------------------------------------------------------------------------------------------------

SMALL = Box(0.5, 0.5, 1, 1)  # which shares nothing with the true box


def after(answer: str | None, *boxes: Box, end: Any = "answered", error: str | None = None) -> Look:
    """An answer after these looks, or why there is none."""
    looks = tuple(ZoomedLook(n, "[…]", 0, (0, 0, 1, 1), box) for n, box in enumerate(boxes))
    last = boxes[-1] if boxes and error is None else None
    return Look("Which?", WHOLE, "[…]", last, error, answer, looks=looks, end=end)


SEVERAL = [
    after("7", SMALL, HALF), after("8", QUARTER, SMALL), after("7"),
    after(None, QUARTER, end="no_call", error="box: no box"), after("", QUARTER, end="turns"),
]  # fmt: skip


def test_every_part_after_several_looks_by_hand() -> None:
    """Right after two looks, of which the second shares half with the true box; wrong after two, the first of them
    exact; right at once; a box that cannot be read after an exact one; and no answer before the last turn."""
    tried = Attempt(SAMPLE, tuple(SEVERAL), without="8")
    wanted: dict[str, list[float]] = {
        "answer": [1, 0, 1, 0, 0],
        "outcome": [0.4] * 5,
        "crop_gain": [1, 0, 0, 0, 0],
        "format": [1, 1, 1, 0, 0],
        "iou": [0.5, 1, 0, 1, 1],
        "dual_iou": [(0.5 + 0.25) / 2, (1 + 0.5) / 2, 0, 1, 1],
        "area": [0.5, 0.75, 1, 0, 0.75],
    }
    for name, scores in wanted.items():
        assert rewards(parts(name), tried) == [scores], name
    assert {name for name, kind in PARTS.items() if not kind.about_several} == {
        "critic", "critic_box", "critic_answer", "model",
    }  # fmt: skip


def test_iou_is_that_of_all_true_looks() -> None:
    """Of two true looks one is met exactly and the other not: ½. Where none is needed nothing is said."""
    two = replace(SAMPLE, looks=(QUARTER, SMALL))
    assert rewards(parts("iou"), Attempt(two, (after("7", QUARTER), after("7", SMALL, QUARTER), after("7")))) == [
        [0.5, 1, 0]
    ]
    none = replace(SAMPLE, looks=())
    assert rewards(parts("iou", "answer"), Attempt(none, (after("7", QUARTER), after("8")))) == [[1, 0]]


def test_a_function_is_told_all_looks(module: str) -> None:
    """`box` is the last; a column of the data that is called so is not handed on."""
    setting = replace(SETTING, config=Several(model_name_or_path="m", max_looks=3))
    given = parts(f"{module}:how_often")
    own = replace(SAMPLE, raw={"looks": ["mine"]})
    assert scored(given, Attempt(own, tuple(SEVERAL[:3])), setting=setting).rewards == [[2, 2, 0]]
    with pytest.raises(ConfigError, match="missing a required argument: 'looks'"):
        scored(given, attempt("7"))


class Several(CheckpointConfig, LooksConfig):
    """A config of a policy that says how often it looks."""
