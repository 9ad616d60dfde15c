"""The leaderboard: what came about alike is ranked together, and nothing else is."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from visrl.cli import app
from visrl.errors import UserError
from visrl.evaluate.leaderboard import (
    TABLES,
    TITLES,
    LeaderboardEntry,
    LeaderboardGroup,
    leaderboard_groups,
    read_entry,
    unranked,
    write_leaderboard,
)
from visrl.evaluate.published import VISCOT_QUESTIONS
from visrl.records import write_records

ROWS = [
    {"id": str(index), "dataset": name, "judge_published": float(index % 4 != 0)}
    for name, count in VISCOT_QUESTIONS.items()
    for index in range(count)
]


def of_ours(groups: list[LeaderboardGroup], name: str = "mine") -> list[LeaderboardGroup]:
    return [group for group in groups if name in [line.name for line in group.lines if not line.published]]


def test_only_who_was_judged_alike_is_ranked_among_the_published() -> None:
    ((apart),) = of_ours(leaderboard_groups([LeaderboardEntry("mine", ROWS, "court")]))
    (mine,) = apart.lines
    assert (apart.source, apart.judge, mine.place) == ("", "court", None)
    assert mine.low < mine.score < mine.high
    assert 74 < mine.score < 76

    alike = LeaderboardEntry("mine", ROWS, "gpt-3.5-turbo-1106")
    limited = replace(alike, name="limited", limit="200,704 px")
    groups = leaderboard_groups([alike, limited])
    (among,) = of_ours(groups)
    assert among.source == "VisRL, arXiv 2503.07523"
    assert len(among.lines) == 29
    scores = [line.score for line in among.lines]
    assert scores == sorted(scores, reverse=True)
    (mine,) = (line for line in among.lines if not line.published)
    assert mine.place == 1 + sum(score > mine.score for score in scores)
    assert groups.index(among) < 2  # the benchmark of ours comes first
    assert of_ours(groups, "limited")[0].source == ""


def test_two_of_ours_share_a_card_only_where_every_condition_is_the_same() -> None:
    rows = [{"id": "1", "dataset": "", "correct": 1.0}]
    alike = [LeaderboardEntry(name, rows, benchmark="samples", limit="200,704 px") for name in ("one", "two")]
    other = LeaderboardEntry("three", rows, benchmark="samples", limit="401,408 px")
    cards = [group for group in leaderboard_groups([*alike, other]) if group.has_ours]
    assert [[line.name for line in card.lines] for card in cards] == [["one", "two"], ["three"]]
    assert [line.place for line in cards[0].lines] == [1, 1]


def test_both_readings_of_one_result_are_two_cards() -> None:
    rng = random.Random(0)
    rows = [
        {"id": str(n), "dataset": "", "correct": float(n % 2), "correct_published": float(rng.random() < 0.9)}
        for n in range(200)
    ]
    cards = of_ours(leaderboard_groups([LeaderboardEntry("mine", rows, benchmark="samples", reading="lmms-eval")]))
    assert {card.reading for card in cards} == {
        "ours: what cannot be read is wrong", "the published rule, as lmms-eval has it",
    }  # fmt: skip
    (strict,) = (card for card in cards if card.reading.startswith("ours"))
    assert strict.lines[0].score == 50


def test_what_is_not_whole_or_not_scored_is_said_and_not_ranked(tmp_path) -> None:
    short, silent = LeaderboardEntry("mine", ROWS[1:], "court"), LeaderboardEntry("mute", [{"id": "1", "exact": 1.0}])
    assert unranked(short) == "not the whole benchmark: docvqa has 887 of 888"
    assert unranked(silent) == "no judge has scored it"
    assert not [group for group in leaderboard_groups([short, silent]) if group.has_ours]
    write_leaderboard(tmp_path / "page.html", [short, silent])
    page = (tmp_path / "page.html").read_text()
    assert "<strong>mute</strong>, Visual-CoT: no judge has scored it" in page
    assert page.count("<article") == len(TABLES)


def test_a_folder_says_itself_what_it_is_of(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_records(run / "results.jsonl", [{"id": "1", "dataset": "", "exact": 1.0, "correct": 1.0}])
    facts: dict[str, Any] = {"benchmark": "samples", "mode": "no_box", "judge": None, "columns": {}}
    (run / "scores.json").write_text(json.dumps(facts))
    entry = read_entry("mine", run)
    assert (entry.name, entry.benchmark, entry.limit) == ("mine, no_box", "samples", "the checkpoint's own")
    assert read_entry("mine", run / "results.jsonl", benchmark="refcoco").benchmark == "refcoco"
    with pytest.raises(UserError, match="benchmark 'vxyz': there are"):
        read_entry("mine", run / "results.jsonl", benchmark="vxyz")


def test_published_tables_hold_figures_of_known_benchmarks() -> None:
    for table in TABLES:
        assert table.benchmark in TITLES, table
        for name, figures in table.scores.items():
            assert figures[0] is not None, name
            assert len(figures) <= len(table.columns)
            assert all(figure is None or 0 < figure < 100 for figure in figures), name
        leading = [figures[0] for figures in table.scores.values()]
        assert table.benchmark in ("viscot", "chartqa") or leading == sorted(leading, reverse=True), table.source


def test_an_option_that_every_folder_answers_itself_is_refused(tmp_path) -> None:
    row = {"id": "1", "dataset": "vstar", "correct": 1.0}
    write_records(tmp_path / "run" / "results.jsonl", [row])
    (tmp_path / "run" / "scores.json").write_text(json.dumps({"benchmark": "vstar", "mode": "own"}))
    write_records(tmp_path / "rows.jsonl", [row])
    board = ["eval", "leaderboard", "--out", str(tmp_path / "page.html"), str(tmp_path / "run")]
    refused = CliRunner().invoke(app, [*board, "--benchmark", "treebench"])
    assert (refused.exit_code, "--benchmark: for files alone" in refused.stderr) == (1, True)
    for more in ([], [str(tmp_path / "rows.jsonl"), "--benchmark", "treebench"]):
        assert CliRunner().invoke(app, [*board, *more]).exit_code == 0
