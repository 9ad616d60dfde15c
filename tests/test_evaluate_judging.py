"""A whole evaluation judged by our own server: it is busy, it takes too long, and it does not say what it means."""

from __future__ import annotations

import json

import pytest
from benchmark_files import write_benchmark
from serve_help import NAME, known
from test_evaluate_run import Scripted, over_http, rows_of, scores_of
from test_evaluate_run import config as run_config
from waiting import wait_until

from visrl.evaluate.run import evaluate
from visrl.prompts import JUDGE_SYSTEM
from visrl.rewards.judge import read_judgements
from visrl.serve.schemas import Limits

REPLIES = {
    "gqa 0:": "score: 0.8",
    "gqa 1:": "I would rather not say.",
    "gqa 2:": "never asked: that question has no answer",
    "gqa 3:": "score: 8/10",
    "vsr 0:": "Score: **0.5**",
    "vsr 1:": "too late: the server lets no request take so long",
    "vsr 2:": "never asked either",
    "vsr 3:": "score: 1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("benchmark"))


def test_a_run_is_judged_by_our_own_server_with_all_its_faults(data, tmp_path, capsys):
    # One request at a time: none may wait behind the one that takes too long.
    limits = Limits(request_s=1.5)

    def verdict(conversation) -> str:
        system, user = conversation.messages
        assert (system.role, system.text) == ("system", JUDGE_SYSTEM)
        if "vsr 1:" in user.text:
            before = replies["/v1/chat/completions", 504]
            wait_until(lambda: replies["/v1/chat/completions", 504] > before)
        return next(reply for name, reply in REPLIES.items() if name in user.text)

    judged_by = {"judge_model_name_or_path": NAME, "request_attempts": 2, "concurrency": 1}
    out = tmp_path / "run"
    with known(Scripted()) as (url, _, _), known(verdict, limits=limits) as (judge, _, metrics):
        replies = metrics.requests
        evaluate(run_config(data, out, **over_http(url), **judged_by, judge_url=f"{judge}/v1"))
    rows = rows_of(out)
    assert {key: (row["judge"], row["judge_published"]) for key, row in rows.items()} == {
        ("gqa", "0"): (0.8, 0.8),
        ("gqa", "1"): (None, 0.0),
        ("gqa", "2"): (0.0, 0.0),  # it wrote no box
        ("gqa", "3"): (0.8, 1.0),
        ("vsr", "0"): (0.5, 0.0),
        ("vsr", "1"): (None, 0.0),
        ("vsr", "2"): (0.0, 0.0),
        ("vsr", "3"): (1.0, 1.0),
    }
    # String metrics stay columns of their own, and the two readings of the judge stand side by side.
    scores = scores_of(out)
    assert scores["judge"] == NAME
    assert scores["columns"]["exact"]["counted"]["mean"] == 0.75
    assert scores["columns"]["judge"]["counted"]["mean"] == pytest.approx((1.6 / 4 + 1.5 / 4) / 2)
    assert scores["columns"]["judge"]["left_out"]["mean"] == pytest.approx((1.6 / 3 + 1.5 / 3) / 2)
    assert scores["columns"]["judge"]["unread"] == 2
    assert "6 answers judged: 1 failed, 1 replies that could not be read" in capsys.readouterr().out
    failed = [one for one in read_judgements(out / f"judgements-{NAME}.jsonl") if one.error]
    assert [(one.dataset, one.id) for one in failed] == [("vsr", "1")]
    assert "504" in failed[0].error
    assert "2 tries" in failed[0].error


def test_another_judge_is_asked_about_the_same_answers_and_the_first_is_forgotten_by_none(data, tmp_path):
    script, out = Scripted(), tmp_path / "run"
    strict = {"speak": lambda talk: "score: 0"}
    with (
        known(script) as (url, _, _),
        known(name="kind", speak=lambda talk: "score: 1") as (kind, _, _),
        known(name="strict", **strict) as (hard, _, _),
    ):
        given = over_http(url)
        evaluate(run_config(data, out, **given))
        asked = len(script.asked)
        assert "judge" not in rows_of(out)["gqa", "0"]
        for name, at in (("kind", kind), ("strict", hard)):
            evaluate(run_config(data, out, **given, judge_model_name_or_path=name, judge_url=f"{at}/v1"))
        assert scores_of(out)["judge"] == "strict"
        assert scores_of(out)["columns"]["judge"]["left_out"]["mean"] == 0
        assert len(list(read_judgements(out / "judgements-kind.jsonl"))) == 6
        assert len(script.asked) == asked


def test_a_judge_that_is_busy_is_waited_for(data, tmp_path):
    """More requests at once than the server lets wait: it answers 429, and every judgement comes in the end."""
    out = tmp_path / "run"

    def once_busy(talk) -> str:
        wait_until(lambda: metrics.requests["/v1/chat/completions", 429])
        return "score: 0.5"

    with known(Scripted()) as (url, _, _), known(once_busy, max_batch=1, max_waiting=2) as (judge, _, metrics):
        told = {"judge_model_name_or_path": NAME, "judge_url": f"{judge}/v1", "concurrency": 6}
        evaluate(run_config(data, out, **over_http(url), **told))
    assert scores_of(out)["columns"]["judge"]["unread"] == 0


def test_a_model_in_this_process_can_judge(data, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    with known(Scripted()) as (url, _, _):
        evaluate(run_config(data, out, **over_http(url), judge_model_name_or_path=str(tiny), max_samples=1))
    assert "2 answers judged: 0 failed" in capsys.readouterr().out
    (file,) = out.glob("judgements-*.jsonl")
    assert [json.loads(line)["judge"] for line in file.read_text().splitlines()] == [str(tiny)] * 2
