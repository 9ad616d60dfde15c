"""Whole runs over the zoom benchmarks: over HTTP with known replies, and with the embedded model on drawn scenes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from serve_help import NAME, known
from zoom_files import drawn, write_treebench, write_vstar

from visrl.conversation import Conversation
from visrl.evaluate.compare import compare
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.results import read_results
from visrl.evaluate.run import evaluate
from visrl.models.tiny import CHECKPOINT
from visrl.records import RecordError


@pytest.fixture(scope="module")
def vstar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vstar(tmp_path_factory.mktemp("zoom") / "vstar")


def run(data: Path, out: Path, benchmark: str = "vstar", **given: object) -> dict:
    told = {"benchmark": benchmark, "dataset": str(data), "output_dir": out, "batch_size": 5, "mode": "no_box"}
    evaluate(EvalConfig(**told | given))  # type: ignore[arg-type]
    return json.loads((out / "scores.json").read_text())


def over_http(url: str) -> dict[str, object]:
    return {"model_name_or_path": NAME, "box_codec": "visrl", "policy_url": f"{url}/v1"}


def overall(scores: dict, column: str) -> float:
    return scores["overall"][column]["counted"]["mean"]


def test_always_the_first_letter_is_right_as_published_and_at_chance_in_ours(vstar, tmp_path, capsys):
    with known(lambda talk: "A") as (url, _, _):
        published = run(vstar, tmp_path / "published", **over_http(url))
        listed = run(vstar / "test_questions.jsonl", tmp_path / "listed", **over_http(url))
        ours = run(vstar, tmp_path / "ours", reading="ours", **over_http(url))
        shuffled = run(vstar, tmp_path / "shuffled", reading="ours", option_order="shuffle", **over_http(url))
    assert overall(published, "correct_published") == 1
    assert overall(listed, "correct_published") == pytest.approx(3 / 6)  # its letters are spread
    parts = {name: entry["columns"] for name, entry in ours["datasets"].items()}
    assert parts["direct_attributes"]["correct"]["counted"]["mean"] == 1 / 4
    assert parts["relative_position"]["correct"]["counted"]["mean"] == 1 / 2
    assert (ours["chance"], overall(ours, "correct"), overall(ours, "circular")) == (0.375, 0.375, 0)
    assert (ours["n"], ours["overall"]["correct"]["counted"]["n"], ours["unreadable"]) == (18, 6, 0)
    assert (shuffled["n"], "circular" in shuffled["overall"], shuffled["option_order"]) == (6, False, "shuffle")
    assert (published["reading"], ours["reading"], ours["rule"]) == ("published", "ours", "visrl")
    assert "correct" not in published["columns"]
    assert "correct_published" not in ours["columns"]
    said = capsys.readouterr().out
    assert "direct_attributes: 3 of its 115 published questions" in said
    assert "asked 18 times: 6 questions" in said
    assert "a letter drawn by lot gets 37.5%" in said
    rows = [read_results(tmp_path / name) for name in ("published", "ours")]
    with pytest.raises(RecordError, match="A is read as published, B as ours"):
        compare(*rows)


class Looks:
    """A policy that writes the true box where a diamond is asked about and no box elsewhere; right where it saw a crop,
    and without one where the question is about a square."""

    def __init__(self) -> None:
        self.talks: list[Conversation] = []
        samples = [*drawn(3), *drawn(3, 3)]
        self.boxes = {one.question: one.box for one in samples}
        self.answers = {one.question: one.answer for one in samples}

    def __call__(self, talk: Conversation) -> str:
        self.talks.append(talk)
        text = talk.messages[-1].text
        question = next(one for one in self.boxes if one in text)
        if len(talk.views) == 1 and "bounding box" in text:
            box = self.boxes[question]
            return f"[{', '.join(f'{value:.3f}' for value in box.as_list())}]" if box and "diamond" in text else "left"
        is_seen = len(talk.views) == 2 or "square" in question
        letter = re.search(rf"([A-F])\. {self.answers[question]}$", text, re.M)
        assert letter
        return letter[1] if is_seen else "none of them"


def test_modes_and_their_crops_are_those_of_every_benchmark(vstar, tmp_path):
    script = Looks()
    scores = {}
    with known(script) as (url, _, _):
        for mode in ("own", "no_box", "truth", "center", "random", "no_crop", "crop_alone", "truth_alone"):
            script.talks.clear()
            order = None if mode in ("own", "no_box", "truth") else "shuffle"
            told = {"mode": mode, "reading": "ours", "option_order": order}
            scores[mode] = run(vstar, tmp_path / mode, **told, **over_http(url))
            answers = [talk for talk in script.talks if "letter of the right option" in talk.messages[-1].text
                       and "bounding box" not in talk.messages[-1].text]  # fmt: skip
            if mode in ("no_box", "crop_alone", "truth_alone"):
                assert {len(talk.views) for talk in answers} == {1}
            sizes = {talk.views[-1].size for talk in script.talks if len(talk.views) == 2}
            assert (sizes == {script.talks[0].views[0].size}) == (mode == "no_crop")
        with pytest.raises(Exception, match="none of these questions has another one"):
            run(vstar, tmp_path / "other", mode="other_question", reading="ours", **over_http(url))
    assert overall(scores["truth"], "correct") == 1
    assert overall(scores["truth"], "grounded") == 1
    cells = scores["own"]["quadrants"]
    assert (
        sum(cells[name] for name in cells if "_" in name and name not in ("right_by", "left_out")) == cells["n"] == 18
    )
    gain = compare(read_results(tmp_path / "no_box"), read_results(tmp_path / "own"))["right"]
    assert gain["gain"] + gain["harm"] > 0
    assert (gain["gain"] - gain["harm"]) / gain["n"] == pytest.approx(gain["with"] - gain["without"], abs=1e-12)
    assert "p_mcnemar" not in gain  # the orders of one question hang together
    per_question = compare(read_results(tmp_path / "no_box"), read_results(tmp_path / "truth"))["columns"]["circular"]
    assert "p_mcnemar" in per_question["counted"]


def test_the_published_system_message_goes_with_one_turn_alone(tmp_path):
    data = write_treebench(tmp_path / "treebench", 2)
    talks: list[Conversation] = []

    def speak(talk: Conversation) -> str:
        talks.append(talk)
        return "<think><box>[0,0,10,12]</box></think><answer> f </answer>"

    with known(speak) as (url, _, _):
        scores = run(data, tmp_path / "run", "treebench", max_new_tokens=200, **over_http(url))
        run(data, tmp_path / "own", "treebench", mode="truth", **over_http(url))
    assert {talk.messages[0].role for talk in talks if len(talk.views) == 1} == {"system"}
    assert {talk.messages[0].role for talk in talks if len(talk.views) == 2} == {"user"}
    one, two = read_results(tmp_path / "run")
    assert (one["correct_published"], two["correct_published"]) == (0, 1)
    assert (one["iou_published"], two["iou_published"]) == (0, 0.5)  # one of two true boxes is hit exactly
    assert two["reply"].startswith("<think>")
    assert two["prediction"] == "<answer> f </answer>"
    assert scores["columns"]["iou_published"]["counted"]["mean"] == 0.25
    assert "iou_published" not in read_results(tmp_path / "own")[0]


def test_several_replies_at_a_temperature_are_one_question(vstar, tmp_path):
    with known(lambda talk: "A" if "Picture 1:" in talk.messages[-1].text else "B") as (url, _, _):
        scores = run(vstar, tmp_path / "run", temperature=1.0, num_generations=4, **over_http(url))
    rows = read_results(tmp_path / "run")
    assert (len(rows), scores["overall"]["correct_published"]["counted"]["n"]) == (24, 6)
    assert overall(scores, "correct_published") == pytest.approx(1 / 6)
    assert sorted({row.get("attempt", 0) for row in rows}) == [0, 1, 2, 3]
    assert (scores["temperature"], scores["num_generations"]) == (1.0, 4)


@pytest.mark.slow
def test_two_runs_of_the_embedded_model_are_equal_and_a_stopped_one_ends_in_the_same_files(tmp_path):
    data = write_treebench(tmp_path / "treebench", 3)
    given = {"model_name_or_path": str(CHECKPOINT), "mode": "own", "reading": "ours", "batch_size": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    run(data, one, "treebench", **given)
    files = ["results.jsonl", "scores.json", "manifest.json"]
    whole = {name: (one / name).read_bytes() for name in files}
    lines = whole["results.jsonl"].splitlines(keepends=True)
    assert len(lines) == 4 + 6 + 4
    # The journal holds rows as they were asked, before what is computed over all of them.
    kept = [json.loads(line) for line in lines[:4]]
    for row in kept:
        row.pop("circular", None)
    two.mkdir()
    run(data, two, "treebench", **given)
    assert {name: (two / name).read_bytes() for name in files} == whole
    (two / "journal.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in kept) + '{"id": "cut', encoding="utf-8"
    )
    for name in files:
        (two / name).unlink()
    run(data, two, "treebench", **given)
    assert {name: (two / name).read_bytes() for name in files} == whole


@pytest.mark.slow
def test_sampled_replies_of_a_model_are_seeded_each(vstar, tiny, tmp_path):
    given = {"model_name_or_path": str(tiny), "mode": "own", "temperature": 1.0, "num_generations": 2, "max_samples": 1,
             "max_new_tokens": 8}  # fmt: skip
    run(vstar, tmp_path / "one", **given)
    run(vstar, tmp_path / "two", **given, batch_size=1)
    run(vstar, tmp_path / "other", **given, seed=1)
    texts = {
        name: [(row["box_text"], row["prediction"]) for row in read_results(tmp_path / name)]
        for name in ("one", "two", "other")
    }
    assert texts["one"] == texts["two"] != texts["other"]
    assert texts["one"][0] != texts["one"][1]
