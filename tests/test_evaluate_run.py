"""`visrl eval CONFIG`: whole runs over a small benchmark of our own, local and over HTTP, stopped, resumed, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_files import SIDE, samples_of, true_text, write_benchmark
from serve_help import NAME, known
from zoom_files import write_vstar

from visrl.box import Box
from visrl.config import ConfigError, read_config
from visrl.data.rows import json_items
from visrl.evaluate.benchmarks import read_benchmark
from visrl.evaluate.compare import compare
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.published import VISCOT_QUESTIONS
from visrl.evaluate.results import read_results
from visrl.evaluate.run import evaluate
from visrl.failures import FailedRun
from visrl.manifest import ManifestError
from visrl.models.tiny import CHECKPOINT
from visrl.records import RecordError, write_records
from visrl.serve.schemas import Limits

ROOT = Path(__file__).parent.parent
NAMES = ("gqa", "vsr")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("benchmark"))


def config(data: Path, out: Path, benchmark: str = "viscot", **given) -> EvalConfig:
    folders = {"viscot": "benchmark", "viscot-detection": "detection", "refcoco": "refcoco"}
    names = [f"REC_{name}" for name in NAMES] if benchmark == "refcoco" else list(NAMES)
    told = {
        "benchmark": benchmark,
        "dataset": str(data / folders[benchmark]),
        "datasets": names,
        "box_dir": str(data / "detection"),
        "image_root": str(data),
        "output_dir": out,
        "batch_size": 3,
    }
    return EvalConfig(**told | given)


def scores_of(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text())


def rows_of(out: Path) -> dict[tuple[str, str], dict]:
    return {(row["dataset"], row["id"]): row for row in read_results(out)}


# --- Scored as a hand would -------------------------------------------------------------------------------------------

OFF = Box(0.0, 0.0, 0.05, 0.05)  # no tag lies there


class Scripted:
    """A policy over HTTP: right, off the mark, no box, right where the truth is none; answers are the reference's."""

    def __init__(self) -> None:
        self.boxes, self.answers, self.asked = {}, {}, []
        for place, name in enumerate(NAMES):
            for number, sample in enumerate(samples_of(name, 4, 4 * place)):
                texts = [true_text(sample.box), true_text(OFF), "somewhere on the left", true_text(sample.box)]
                self.boxes[f"{name} {number}:"] = texts[number]
                self.answers[f"{name} {number}:"] = sample.answer

    def __call__(self, conversation) -> str:
        self.asked.append(conversation)
        text = conversation.messages[-1].text
        known = self.boxes if len(conversation.views) == 1 and "bounding box" in text else self.answers
        return next(said for name, said in known.items() if name in text)


def over_http(url: str) -> dict:
    return {"model_name_or_path": NAME, "box_codec": "viscot", "policy_url": f"{url}/v1"}


def test_the_visual_cot_benchmark_over_http(data, tmp_path, capsys):
    script = Scripted()
    with known(script) as (url, _, _):
        evaluate(config(data, tmp_path / "run", **over_http(url)))
        evaluate(config(data, tmp_path / "no-box", mode="no_box", **over_http(url)))
        evaluate(config(data, tmp_path / "truth", mode="truth", **over_http(url)))
    rows = rows_of(tmp_path / "run")
    assert [key for key in rows] == [(name, str(number)) for name in NAMES for number in range(4)]
    for name in NAMES:
        right, off, none, bad = (rows[name, str(number)] for number in range(4))
        assert (right["exact"], right["hit"], right["iou"] > 0.9) == (1, 1, True)
        assert (off["exact"], off["hit"], off["iou"]) == (1, 0, 0)
        assert (none["exact"], none["hit"], none["prediction"], none["unparseable"]) == (0, 0, None, True)
        assert (bad["exact"], bad["hit"], bad["bad_truth"]) == (1, None, True)
    scores = scores_of(tmp_path / "run")
    assert (scores["n"], scores["failed"], scores["unparseable"], scores["bad_truth"]) == (8, 0, 2, 2)
    assert scores["columns"]["exact"]["counted"]["mean"] == 0.75
    assert scores["columns"]["hit"]["counted"]["mean"] == 0.25
    assert scores["columns"]["hit"]["left_out"]["mean"] == pytest.approx(1 / 3)
    assert (scores["protocol"], scores["crop_rule"], scores["mode"]) == ("viscot", "viscot_square", "own")
    said = capsys.readouterr().out
    assert "8 questions of 2 data sets, 2 of them without a true box" in said
    assert "gqa: 4 of its 978 published questions" in said
    assert "no answers to: docvqa" in said
    # The other modes: one turn without a box, and the true box in the model's place.
    assert scores_of(tmp_path / "no-box")["columns"]["exact"]["counted"]["mean"] == 1
    truth = scores_of(tmp_path / "truth")
    assert (truth["failed"], truth["columns"]["exact"]["left_out"]["mean"]) == (2, 1)
    assert truth["columns"]["iou"]["left_out"]["mean"] == 1
    answered = [talk for talk in script.asked if len(talk.views) == 2]
    assert {tuple(turn.role for turn in talk.messages) for talk in answered} == {("user", "assistant", "user")}


def test_the_visual_cot_benchmark_with_several_looks_goes_on_in_its_words(data, tmp_path):
    """Every question gets a second look at the same place where it had one."""
    script = Scripted()

    def twice(conversation) -> str:
        said = script(conversation)
        looks_again = len(conversation.views) == 2
        return conversation.messages[1].text if looks_again else said

    with known(twice) as (url, _, _):
        evaluate(config(data, tmp_path / "run", max_looks=2, **over_http(url)))
    rows, scores = rows_of(tmp_path / "run"), scores_of(tmp_path / "run")
    for name in NAMES:
        right, _, none, _ = (rows[name, str(number)] for number in range(4))
        assert (len(right["looks"]), right["exact"], right["hit"]) == (2, 1, 1)
        assert (none["looks"], none["prediction"]) == ([], "somewhere on the left")
    assert (scores["protocol"], scores["max_looks"], scores["looks"]["mean"]) == ("viscot", 2, 1.5)
    longest = max(script.asked, key=lambda talk: len(talk.views))
    assert [turn.role for turn in longest.messages] == ["user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize(("benchmark", "prefix"), [("viscot-detection", ""), ("refcoco", "REC_")])
def test_boxes_are_scored_as_published_and_as_they_should_be(data, tmp_path, capsys, benchmark, prefix):
    script = Scripted()
    with known(script) as (url, _, _):
        evaluate(config(data, tmp_path / "run", benchmark, **over_http(url)))
    assert all(len(talk.views) == 1 for talk in script.asked)
    totals = scores_of(tmp_path / "run")["totals"]
    for name in NAMES:
        assert totals["datasets"][prefix + name] == {
            "n": 4, "correct": 1, "accuracy_published": 0.25, "accuracy": pytest.approx(1 / 3),
            "unparseable": 1, "bad_truth": 1,
        }  # fmt: skip
    assert totals["average_published"] == 0.25
    assert "average as published, data sets scoring 0 left out: 0.250" in capsys.readouterr().out
    # The same rows as `visrl eval score` makes of a prediction file: they can be compared question by question.
    assert set(rows_of(tmp_path / "run")) == {(prefix + name, str(line)) for name in NAMES for line in range(1, 5)}


def test_a_model_of_another_convention_is_translated_for_the_published_rule(data, tmp_path):
    """Boxes of a wide picture in fractions of the picture are not those of its padded square."""
    wide = tmp_path / "wide"
    shutil.copytree(data, wide)
    from PIL import Image

    for path in (wide / "cot").rglob("*.png"):
        Image.open(path).resize((2 * SIDE, SIDE)).save(path)
    for path in (wide / "detection").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["width"], row["bbox"] = (
                2 * SIDE,
                [2 * row["bbox"][0], row["bbox"][1], 2 * row["bbox"][2], row["bbox"][3]],
            )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with known(Scripted()) as (url, _, _):
        given = over_http(url)
        evaluate(config(wide, tmp_path / "image", "viscot-detection", **given | {"box_codec": "visrl"}))
        evaluate(config(wide, tmp_path / "square", "viscot-detection", **given))
    told = [scores_of(tmp_path / name)["totals"]["datasets"]["gqa"] for name in ("image", "square")]
    assert [(one["correct"], one["accuracy"]) for one in told] == [(1, pytest.approx(1 / 3)), (0, 0.0)]


# --- Repeated, stopped, resumed ---------------------------------------------------------------------------------------


def test_two_runs_are_equal_and_a_stopped_one_ends_in_the_same_files(data, tiny, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    local = {"model_name_or_path": str(tiny)}
    evaluate(config(data, one, **local))
    evaluate(config(data, two, **local))
    files = ["results.jsonl", "scores.json", "manifest.json"]
    whole = {name: (one / name).read_bytes() for name in files}
    assert {name: (two / name).read_bytes() for name in files} == whole
    # A kill in the second batch of three: one whole batch, and a line that was cut.
    lines = whole["results.jsonl"].splitlines(keepends=True)
    (two / "journal.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    for name in files:
        (two / name).unlink()
    evaluate(config(data, two, **local))
    assert {name: (two / name).read_bytes() for name in files} == whole
    assert not (two / "journal.jsonl").exists()
    assert compare(read_results(one), read_results(two))["columns"]["exact"]["counted"]["difference"] == 0
    # What is complete is not asked again: a row that the model would not write stays.
    rows = list(read_results(two))
    rows[0]["answer"] = "written by hand"
    write_records(two / "results.jsonl", rows)
    evaluate(config(data, two, **local))
    assert list(read_results(two)) == rows


def test_a_folder_of_another_run_is_refused(data, tiny, tmp_path):
    evaluate(config(data, tmp_path / "run", model_name_or_path=str(tiny), max_samples=1))
    with pytest.raises(ManifestError, match="mode differ"):
        evaluate(config(data, tmp_path / "run", model_name_or_path=str(tiny), max_samples=1, mode="truth"))


def test_what_failed_is_asked_again_where_that_is_wanted(data, tmp_path, capsys):
    script = Scripted()

    def stumbles(talk) -> str:
        if "gqa 0:" in talk.messages[-1].text:
            raise RuntimeError("this one does not go")
        return script(talk)

    once = {"request_attempts": 1}
    with known(stumbles) as (url, _, _):
        evaluate(config(data, tmp_path / "run", **once, **over_http(url)))  # one of eight: not too much of the run
    assert scores_of(tmp_path / "run")["failed"] == 1
    assert rows_of(tmp_path / "run")["gqa", "0"]["error"].startswith("engine: ")
    script.asked.clear()
    with known(script) as (url, _, _):
        evaluate(config(data, tmp_path / "run", **over_http(url)))
        assert script.asked == []
        evaluate(config(data, tmp_path / "run", retry_failed=True, **over_http(url)))
        evaluate(config(data, tmp_path / "at-once", **over_http(url)))
    assert scores_of(tmp_path / "run")["failed"] == 0
    assert (tmp_path / "run/results.jsonl").read_bytes() == (tmp_path / "at-once/results.jsonl").read_bytes()


def test_a_run_of_which_everything_failed_is_asked_again_by_itself(data, tmp_path):
    script = Scripted()
    with (
        known(script, limits=Limits(text_bytes=100)) as (url, _, _),  # the published prompts are longer
        pytest.raises(FailedRun, match="where this server allows 100"),
    ):
        evaluate(config(data, tmp_path / "run", **over_http(url)))
    assert not (tmp_path / "run" / "results.jsonl").exists()
    with known(script) as (url, _, _):
        evaluate(config(data, tmp_path / "run", **over_http(url)))
        evaluate(config(data, tmp_path / "at-once", **over_http(url)))
    assert scores_of(tmp_path / "run")["failed"] == 0
    assert (tmp_path / "run/results.jsonl").read_bytes() == (tmp_path / "at-once/results.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["samples", "vstar"])
def test_a_run_killed_at_any_moment_ends_in_the_same_file(benchmark, data, tiny, tmp_path):
    """Over drawn scenes, and over those in the form of V* with the embedded model, every question in several orders."""
    told = [f"model_name_or_path={tiny}", "dataset=scenes:test/0+48"]
    if benchmark == "vstar":
        folder = write_vstar(tmp_path / "vstar", 8)
        told = [f"model_name_or_path={CHECKPOINT}", f"dataset={folder}", "benchmark=vstar", "reading=ours"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        given = [*told, "batch_size=4", f"output_dir={out}"]
        return subprocess.Popen([sys.executable, "-m", "visrl.cli", "eval", *given])

    assert start(tmp_path / "whole").wait(300) == 0
    journal, killed = tmp_path / "part" / "journal.jsonl", 0
    for lines in (4, 16, 36):
        process = start(tmp_path / "part")
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed == 3
    assert start(tmp_path / "part").wait(300) == 0
    for name in ("results.jsonl", "scores.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- Refused before anything runs -------------------------------------------------------------------------------------


def test_a_named_data_set_is_looked_for_where_the_config_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = EvalConfig(dataset="demo_sft_data", model_name_or_path="m", output_dir=tmp_path, dry_run=True)
    with pytest.raises(RecordError, match="no data 'demo_sft_data'"):
        evaluate(given)
    evaluate(given.model_copy(update={"dataset_dir": str(ROOT / "data"), "image_root": str(ROOT / "data")}))
    assert "nothing was asked" in capsys.readouterr().out


def test_what_is_missing_is_named_in_full(data, tmp_path):
    with pytest.raises(RecordError, match=r"lacks 9 data sets: docvqa\.json, .*datasets=\[gqa, vsr\]"):
        evaluate(config(data, tmp_path / "run", model_name_or_path="none", datasets=None))
    shutil.copytree(data, tmp_path / "some")
    gone = sorted((tmp_path / "some" / "cot" / "vsr").iterdir())[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(RecordError) as caught:
        evaluate(config(tmp_path / "some", tmp_path / "run", model_name_or_path="none"))
    assert "2 pictures are missing" in str(caught.value)
    assert f"vsr: 2, cot/vsr/{gone[0].name} the first; they come from https://cocodataset.org" in str(caught.value)
    assert not (tmp_path / "run").exists()
    with known(Scripted()) as (url, _, _):
        told = {"allow_missing_pictures": True, **over_http(url)}
        evaluate(config(tmp_path / "some", tmp_path / "run", **told))
    assert scores_of(tmp_path / "run")["failed"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "truth", "benchmark": "refcoco"}, "the model's own boxes"),
        ({"judge_url": "http://x/v1"}, "judge_url needs judge_model_name_or_path"),
        ({"benchmark": "viscot-detection", "judge_model_name_or_path": "j"}, "no answers for a judge"),
        ({"mode": "left"}, "mode: Input should be"),
        ({"datset": "x"}, "did you mean 'dataset'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(given, said):
    told = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"} | given
    with pytest.raises(ConfigError, match=said):
        read_config(EvalConfig, None, [f"{key}={value}" for key, value in told.items()])


def test_rows_that_are_no_questions_are_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "bad")
    path = tmp_path / "bad" / "benchmark" / "vsr.json"
    rows = json.loads(path.read_text())
    rows[1]["question_id"] = rows[0]["question_id"]
    path.write_text(json.dumps(rows))
    with pytest.raises(RecordError, match="question 0 of vsr is there twice"):
        read_benchmark("viscot", str(path.parent), datasets=["vsr"], image_root=str(data))
    del rows[2]["conversations"]
    path.write_text(json.dumps(rows))
    with pytest.raises(RecordError, match=r"vsr\.json, row 3: 'conversations' must hold four turns"):
        read_benchmark("viscot", str(path.parent), datasets=["vsr"], image_root=str(data))


@pytest.mark.parametrize("name", ["eval_viscot", "eval_detection", "eval_refcoco", "tiny/eval"])
def test_shipped_configs_are_read(name):
    assert read_config(EvalConfig, ROOT / "configs" / f"{name}.yaml")


# --- The whole benchmark's metadata -----------------------------------------------------------------------------------


def test_all_8281_questions_are_checked_in_little_memory(data, tmp_path):
    """Rows of the published make-up over many empty picture files: reading and looking for them opens none."""
    row, box = json.loads((data / "benchmark/gqa.json").read_text())[0], next(json_items(data / "detection/gqa.jsonl"))
    for name, count in VISCOT_QUESTIONS.items():
        whole, boxes = [], []
        for number in range(count):
            ref = f"cot/{name}/{number // 2}.png"
            marked = row["image"][1].replace(row["image"][0], ref)
            whole.append(row | {"dataset": name, "question_id": number, "image": [ref, marked]})
            boxes.append(box | {"img_path": ref, "question_id": number})
            path = tmp_path / ref
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "benchmark").mkdir(exist_ok=True)
        (tmp_path / "detection").mkdir(exist_ok=True)
        (tmp_path / "benchmark" / f"{name}.json").write_text(json.dumps(whole))
        (tmp_path / "detection" / f"{name}.jsonl").write_text("".join(json.dumps(b) + "\n" for b in boxes))
    given = ["benchmark=viscot", "model_name_or_path=none", f"dataset={tmp_path}/benchmark", "dry_run=true",
             f"box_dir={tmp_path}/detection", f"image_root={tmp_path}", f"output_dir={tmp_path}/run"]  # fmt: skip
    program = (
        "import re, sys; from visrl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, "eval", *given], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert told[0] == "8,281 questions of 11 data sets"
    assert int(told[-1]) < 300 * 1000  # kB
