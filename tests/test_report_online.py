"""The report of an online training: its curves, numbers, rollouts as pictures, and the failures it names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from online_report_run import QUESTIONS, STEPS, write_online_run
from report_run import write_run
from test_report import Page

from visrl.records import read_jsonl, write_records
from visrl.report.online import SHOWN, ends_of, measure_table, paired_rows, time_shares
from visrl.report.online_rules import RULES, failures
from visrl.report.page import write_report
from visrl.report.run import load_run
from visrl.report.shapes import ReportError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_online_run(tmp_path_factory.mktemp("report") / "online")


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    return write_report(finished).read_text(encoding="utf-8")


def test_an_online_training_is_shown_whole(text: str) -> None:
    page = Page(text)
    assert not page.open
    assert [attrs["id"] for attrs in page.all("section")] == ["online", "notes", "making"]
    for words in ("Online reinforcement (grpo): 40 steps, 4 boxes a question and 2 answers a crop.", "64 held-out",
                  "it answers 60.0 % right, greedily; before it were 30.0 %", "None of the failures",
                  "Part of the reward: format", "60.0 % [50.0, 70.0]", "of a step", "Step 1", "Step 40"):  # fmt: skip
        assert words in page.text, words
    assert "not finished" not in page.text
    titles = set(re.findall(r"<figcaption>([^<]+)</figcaption>", text))
    assert {"Held-out greedy rollouts", "Reward", "Reward: answer", "Entropy", "Groups with nothing to compare",
            "Sampled boxes", "Area of sampled boxes", "KL to the start", "Tokens clipped", "Seconds of a step",
            "Loss"} <= titles  # fmt: skip
    assert text.count('class="card rollout"') == 2 * SHOWN


def test_the_page_asks_nothing_of_the_network_and_can_be_read_without_seeing_it(text: str) -> None:
    page = Page(text)
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttp", text)
    assert all(attrs["src"].startswith("data:") for attrs in page.all("img"))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("aria-label") for attrs in page.all("svg"))
    targets = {attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "").startswith("#")}
    assert {"online", "notes", "making"} <= targets <= {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(re.findall(r"--(\w+):", text))


def test_words_of_a_model_cannot_become_markup(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "online")
    rows = list(read_jsonl(run / "rollouts.jsonl"))
    for row in rows:
        row["question"] = "<script>alert(1)</script>"
        row["boxes"][0]["answers"] = ["</li><img src=x>"] * 2
    write_records(run / "rollouts.jsonl", rows)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert not page.all("script")
    assert "</li><img src=x>" in page.text


def test_a_training_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_online_run(tmp_path / "online", steps=1, finished=False)
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "id"')
    (one,) = load_run(run).online_runs
    assert (one.steps, one.questions, len(one.last)) == (1, QUESTIONS, SHOWN)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "not finished" in page.text
    assert "Rollouts of the first step The first" in page.text


def test_a_journal_that_is_none_is_refused(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "online")
    rows = list(read_jsonl(run / "rollouts.jsonl"))
    del rows[QUESTIONS]["boxes"]
    write_records(run / "rollouts.jsonl", rows)
    with pytest.raises(ReportError, match=rf"rollouts\.jsonl, row {QUESTIONS + 1}: no 'boxes'"):
        write_report(run)


def test_an_online_phase_of_a_loop_has_a_section_of_its_own(finished: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    alone = len(load_run(run).curves)
    shutil.copytree(finished, run / "online")
    loaded = load_run(run)
    assert [one.title for one in loaded.online_runs] == ["online"]
    assert len(loaded.curves) == alone
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert [attrs["id"] for attrs in page.all("section")][:4] == ["results", "loop", "curves", "online"]


def test_questions_of_both_ends_stand_side_by_side(finished: Path) -> None:
    (one,) = load_run(finished).online_runs
    assert one.questions == STEPS * QUESTIONS
    both = one.first[2]
    one.last[3] = {**both, "step": STEPS}
    first, last = paired_rows(one)
    assert first[0]["id"] == last[0]["id"] == both["id"]
    assert {row["step"] for row in first} == {1}
    assert {row["step"] for row in last} == {STEPS}
    assert len(first) == len(last) == SHOWN


def test_both_ends_of_a_measure_are_means_of_a_tenth() -> None:
    rows: list[dict[str, Any]] = [{"step": n, "reward": n / 20, "reward_std": 0.5} for n in range(20)]
    assert ends_of(rows, "reward") == (0.025, 0.925)
    rows += [{"step": 0, "eval_rollout/accuracy": 0.25}, {"step": 9, "eval_rollout/accuracy": 0.75}]
    assert ends_of(rows, "eval_rollout/accuracy") == (0.25, 0.75)
    table = {line.title: line for line in measure_table(rows)}
    assert (table["Reward"].first, table["Reward"].first_spread) == ("0.025", "±\u00a00.500")
    assert set(table) == {"Reward", "Held-out answers right, greedy"}
    times = [{"step": 1, "time/rollout": 3.0, "time/update": 1.0}, {"step": 2, "time/rollout": 5.0, "time/update": 3.0}]
    assert time_shares(times) == [("rollout", 4.0, 4 / 6), ("update", 2.0, 2 / 6)]


# --- known failures ---------------------------------------------------------------------------------------------------


def curve(first: float, last: float, **others: float) -> list[dict[str, Any]]:
    """Twenty steps of one measure in a line, beside others that stay as they are."""
    return [{"step": n, "it": first + (last - first) * n / 19, **others} for n in range(20)]


def named(key: str, first: float, last: float, **others: float) -> list[dict[str, Any]]:
    return [{key if name == "it" else name: value for name, value in row.items()}
            for row in curve(first, last, **others)]  # fmt: skip


@pytest.mark.parametrize(("rows", "said"), [
    (named("entropy/box", 0.8, 0.001), "Entropy collapse: that of box texts fell from 0.7"),
    (named("entropy/box", 0.8, 0.2), None),
    (named("entropy/answer", 0.5, 0.0), "Entropy collapse: that of answers"),
    (named("frac_reward_zero_std", 0.3, 1.05), "Nothing to learn from"),
    ([{**row, "frac_reward_zero_std/answer": 0.5} for row in named("frac_reward_zero_std", 1.0, 1.0)], None),
    (named("box/parsed", 1.0, 0.8), "Box texts come apart: 98.4\u00a0% of them could be read at the start, 81.6"),
    (named("box/parsed", 0.8, 0.99), None),
    (named("box/parsed", 1.0, 0.97), None),
    (named("box/area", 0.1, 0.95), "Boxes grow to the whole image"),
    (named("box/area", 0.7, 0.8), None),  # they always were
    (named("box/area", 0.1, 0.3), None),
    (named("box/area", 0.2, 0.001), "Boxes shrink"),
    (named("box/area", 0.2, 0.08), None),
    (named("completions/clipped_ratio/answer", 0.0, 0.5), "46\u00a0% of the answers at the end"),
    (named("left_out", 0.0, 0.5), "Rewards are missing"),
    (named("box/area", 0.2, 0.001)[:4], None),  # too few steps to say anything
])  # fmt: skip
def test_a_known_failure_is_told(rows: list[dict[str, Any]], said: str | None) -> None:
    found = failures(rows)
    if said is None:
        assert not found
    else:
        (sentence,) = found
        assert said in sentence


def test_a_reward_that_rises_while_held_out_answers_get_worse_is_told(finished: Path) -> None:
    def held_out(step: int, value: float) -> dict[str, Any]:
        ends = {"_low": value - 0.05, "": value, "_high": value + 0.05}
        return {"step": step, **{f"eval_rollout/accuracy{end}": at for end, at in ends.items()}}

    rising = named("reward", 0.2, 0.9)
    assert (
        "The reward rises and held-out answers get worse" in failures([*rising, held_out(0, 0.6), held_out(9, 0.4)])[0]
    )
    assert not failures([*rising, held_out(0, 0.6), held_out(9, 0.55)])  # within their intervals
    assert not failures([*named("reward", 0.9, 0.2), held_out(0, 0.6), held_out(9, 0.4)])
    assert not failures(load_run(finished).online_runs[0].rows)
    assert len(RULES) == len(set(RULES))


def test_a_failure_is_named_on_the_page(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "online")
    rows = [{**row, "box/area": 0.9 * row["step"] / STEPS} if "loss" in row else row
            for row in read_jsonl(run / "log.jsonl")]  # fmt: skip
    write_records(run / "log.jsonl", rows)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Boxes grow to the whole image" in page.text
    assert "None of the failures" not in page.text
