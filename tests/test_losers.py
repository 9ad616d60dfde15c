"""`losers: own` and `losers: random`: which two boxes and which two answers become preferences, and which do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from visrl.box import Box
from visrl.config import ConfigError, build_config
from visrl.data.native import read_records
from visrl.evolve.config import EvolveConfig, FilterConfig, RuleConfig
from visrl.evolve.filter import filter_pairs
from visrl.evolve.losers import answer_contrast, pick_apart
from visrl.evolve.pairs import FilterSettings, make_pairs
from visrl.records import Preference, Sample, Trajectory, Verdict, write_records

SAMPLE = Sample("q", "scene:test/0", "Which number?", "7")


def tried(branch: int, right: int, of: int = 2, *, origin: str = "sampled", text: str | None = None, name: str = "q"):
    """A try whose first `right` of `of` answers are right, with the score of the share."""
    answers = tuple("7" if n < right else str(10 + n) for n in range(of))
    scores = tuple(float(n < right) for n in range(of))
    box = Box(0.05 * branch, 0, 0.05 * branch + 0.3, 0.5)
    trajectory = Trajectory(
        name, 0, branch, text or str(box.as_list()), box, origin, answers[0], "test", 0,
        answers=answers if of > 1 else (),
    )  # fmt: skip
    verdict = Verdict(name, 0, branch, right / of, scores[0], answer_scores=scores if of > 1 else ())
    return trajectory, verdict


def branches(picked):
    return picked if isinstance(picked, str) else tuple(judged[0].branch for judged in picked)


def test_the_best_own_box_wins_and_the_worst_own_or_random_one_loses():
    judged = [tried(0, 1), tried(1, 2), tried(2, 0), tried(3, 0, origin="random"), tried(4, 2, origin="random")]
    assert branches(pick_apart(judged, "own", 0.5)) == (1, 2)
    assert branches(pick_apart(judged, "random", 0.5)) == (1, 3)


@pytest.mark.parametrize(
    ("losers", "tries", "reason"),
    [
        ("own", [(0, 2), (1, 2)], "no_loser"),
        ("own", [(0, 0), (1, 0)], "no_winner"),
        ("random", [(0, 2), (1, 0)], "no_random_box"),
    ],
)
def test_a_question_without_two_that_differ_enough_says_why(losers, tries, reason):
    assert pick_apart([tried(*one) for one in tries], losers, 0.5) == reason


def test_a_minimum_difference_is_met_exactly_or_not_at_all():
    judged = [tried(0, 3, of=4), tried(1, 1, of=4)]
    assert branches(pick_apart(judged, "own", 0.5)) == (0, 1)
    assert pick_apart(judged, "own", 0.51) == "no_loser"
    assert pick_apart(judged, "own", 0.76) == "no_winner"


def test_a_box_is_never_set_against_itself():
    same = [tried(0, 2, text="[0]"), tried(1, 0, text="[0]")]
    assert pick_apart(same, "own", 0.5) == "same_box"
    assert branches(pick_apart([*same, tried(2, 1)], "own", 0.5)) == (0, 2)


def test_an_unread_score_is_no_loser():
    unread = (tried(1, 0)[0], Verdict("q", 0, 1, None, None, answer_scores=(None, None)))
    assert pick_apart([tried(0, 2), unread], "own", 0.5) == "no_loser"
    assert pick_apart([unread], "own", 0.5) == "nothing_readable"


def test_ties_are_drawn_by_the_question_and_not_by_the_order():
    def chosen(name: str) -> tuple[int, ...]:
        tries = [tried(n, 2 if n < 4 else 0, name=name) for n in range(8)]
        backwards = branches(pick_apart(tries[::-1], "own", 0.5))
        assert branches(pick_apart(tries, "own", 0.5)) == backwards
        return backwards

    drawn = [chosen(f"question {n}") for n in range(100)]
    for place in (0, 1):
        counts = [sum(one[place] == n for one in drawn) for n in range(4 * place, 4 * place + 4)]
        assert min(counts) > 10, f"every one of the equals gets its turn: {counts}"


def test_answers_are_compared_over_one_crop_the_winners_first():
    judged = [tried(0, 2), tried(1, 1), tried(2, 0), tried(3, 1, of=3)]
    contrast = answer_contrast(judged, judged[3], 0.5)
    assert (contrast.tried.branch, contrast.chosen, contrast.rejected) == (3, "7", "11")
    other = answer_contrast(judged, judged[0], 0.5)  # all of whose answers are right
    assert (other.tried.branch, other.chosen, other.rejected) == (1, "7", "11")
    assert answer_contrast([judged[0], judged[2]], judged[0], 0.5) is None
    random = tried(4, 1, origin="random")
    assert answer_contrast([judged[0], random], judged[0], 0.5) is None, "a random crop is not the policy's"


def test_the_answer_preference_shows_the_crop_that_both_answers_were_given_from():
    judged = [tried(0, 2), tried(1, 1), tried(2, 0)]
    settings = FilterSettings(losers="own")
    result = make_pairs([SAMPLE], *zip(*judged, strict=True), settings)
    box, answer = result.preferences
    assert (box.chosen, box.rejected) == (judged[0][0].box_text, judged[2][0].box_text)
    assert (answer.images[1].crop, answer.chosen, answer.rejected) == (judged[1][0].box, "7", "11")
    assert result.pairs[0].answers.tried is judged[1][0]


def test_filter_counts_pairs_and_answer_pairs(tmp_path: Path):
    kept, without = [tried(0, 2), tried(1, 1), tried(2, 0)], [tried(n, 0, name="r") for n in range(3)]
    for name, number in (("trajectories", 0), ("verdicts", 1)):
        write_records(tmp_path / "g" / f"{name}.jsonl", [one[number] for one in kept + without])
    rows = [{"id": name, "image": "scene:test/0", "question": "Which?", "answer": "7"} for name in "qr"]
    write_records(tmp_path / "mine.jsonl", rows)
    given = {"input_dir": tmp_path / "g", "dataset": str(tmp_path / "mine.jsonl"), "losers": "own"}
    counts = filter_pairs(FilterConfig(**given, output_dir=tmp_path / "f"))
    assert (counts["kept"], counts["dropped_by_reason"]) == (1, {"no_winner": 1})
    assert (counts["answer_pairs"], counts["answer_pairs_of_another_crop"]) == (1, 1)
    assert counts["sampled_tokens_per_pair"] is None, "nobody counted"
    assert [one.step for one in read_records(Preference, tmp_path / "f" / "preferences.jsonl")] == ["box", "answer"]
    page = (tmp_path / "f" / "pairs.html").read_text()
    assert "<bdi>7 · 7</bdi>" in page
    assert "<bdi>10 · 11</bdi>" in page
    assert "answers over the crop of another own box: chosen 7, rejected 11" in page


def test_with_one_answer_from_a_crop_there_is_nothing_to_compare(tmp_path: Path, capsys):
    for name, number in (("trajectories", 0), ("verdicts", 1)):
        write_records(tmp_path / "g" / f"{name}.jsonl", [tried(n, 1 - n, of=1)[number] for n in range(2)])
    write_records(tmp_path / "mine.jsonl", [{"id": "q", "image": "scene:test/0", "question": "Which?", "answer": "7"}])
    given = {"input_dir": tmp_path / "g", "dataset": str(tmp_path / "mine.jsonl"), "losers": "own"}
    counts = filter_pairs(FilterConfig(**given, output_dir=tmp_path / "f"))
    assert (counts["kept"], counts["answer_pairs"]) == (1, 0)
    assert "generate with answers=2 or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"min_difference": 0.4}, "min_difference: losers=paper goes by t_max and t_min"),
        ({"losers": "own", "t_min": 0.1}, "t_min: losers=own compares box scores by min_difference"),
        ({"losers": "random", "rule": "released"}, "rule: losers=random"),
        ({"losers": "own", "use_box_critic": False}, "use_box_critic: losers=own"),
    ],
)
def test_a_key_without_effect_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        build_config(RuleConfig, keys, "here")


def test_random_losers_need_random_boxes(tmp_path: Path):
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": str(tmp_path), "losers": "random"}
    assert build_config(EvolveConfig, keys, "here").filter_settings().min_difference == 0.5
    with pytest.raises(ConfigError, match="diversity=false draws none"):
        build_config(EvolveConfig, keys | {"diversity": False}, "here")
