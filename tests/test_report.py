"""The report of a run: complete, honest about what is missing, and one file that asks nothing of the network."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_run import STAGES, write_run

from visrl.box import Box
from visrl.cli import main
from visrl.manifest import write_manifest
from visrl.pages.draw import FIRST_COLOUR, TRUE_COLOUR, annotate, data_uri
from visrl.pages.figures import INKS
from visrl.records import read_jsonl, write_records
from visrl.report.gallery import OUTCOMES, draw_lot, exhibits
from visrl.report.page import report, write_report
from visrl.report.run import load_run
from visrl.report.shapes import ReportError
from visrl.report.story import caveats, change
from visrl.rewards.crop_effects import QUADRANTS


class Page(HTMLParser):
    """What the tests ask of a page: its tags with their attributes, nested properly, and its visible text."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())  # spaces that do not break become plain ones

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open[-1:]):
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    """The page of the finished run."""
    return write_report(finished).read_text(encoding="utf-8")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt; its pictures stay where they were."""
    return shutil.copytree(finished, tmp_path / "demo", ignore=shutil.ignore_patterns("pictures", "report.html"))


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def rewrite(path: Path, **values: object) -> None:
    write_records(path, [{**row, **values} for row in read_jsonl(path)])


def test_a_finished_run_is_shown_whole(finished: Path, text: str) -> None:
    page = Page(text)
    assert not page.open
    summary = json.loads((finished / "summary.json").read_text())
    for stage in summary["stages"]:
        assert f"{100 * stage['answer_accuracy']['mean']:.1f} %" in page.text
        assert f"{stage['box_iou']['mean']:.3f}" in page.text
    for words in ("kept 22", "no winner 8", "no loser 6", "same text 1", "240", "48 with a box placed at random",
                  "Centre box", "1,834 MB", "torch 2.15", "pref_beta", "3 scores unread"):  # fmt: skip
        assert words in page.text, words
    assert len(page.all("svg")) == 4 + 6 + 2 + 3
    sections = [attrs["id"] for attrs in page.all("section")]
    assert sections == ["results", "loop", "curves", "controls", "grounding", "kinds", "gallery", "notes", "making"]
    assert "not finished" not in page.text


def test_online_reinforcement_stands_beside_the_loop(run: Path) -> None:
    rows = list(read_jsonl(run / "eval/iter1-stage2.jsonl"))
    wrong = [row["id"] for row in rows if not row["correct"]]
    online = [{**row, "correct": row["correct"] or row["id"] in wrong[:3]} for row in rows]
    write_records(run / "eval/online.jsonl", online)
    summary = json.loads((run / "summary.json").read_text())
    costs = {"iter0/generate": 100.0, "iter0/stage1": 50.0, "iter0/paper's rule": 5.0, "online": 148.0}
    summary |= {"cpu_seconds_by_step": costs}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    right = sum(row["correct"] for row in online) / len(online)
    assert f"Online reinforcement from the same SFT answers {100 * right:.1f} % right" in page.text
    assert "took 148 s of a processor, and the loop 150 s" in page.text
    loop = load_run(run)
    assert [stage.title for stage in loop.checkpoints][-2:] == ["Stage 2, iteration 1", "Online"]
    assert "Stage 2, iteration 1 answers" in page.text, "the loop's own end stays the headline"
    assert "Online made" not in page.text


def test_the_page_asks_nothing_of_the_network(text: str) -> None:
    page = Page(text)
    for tag, attrs in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttp", text)
    assert len(text) < 5_000_000


def test_the_page_can_be_read_without_seeing_it(text: str) -> None:
    page = Page(text)
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in page.all("svg"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "").startswith("#")}
    assert targets <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1


def test_figures_take_every_colour_from_the_theme(text: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not any(stand_in in figures for stand_in in INKS.values())
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000"}  # the default of marks that are never filled
    defined = set(re.findall(r"--(\w+):", text))
    assert {"ink", "first", "last"} <= set(re.findall(r"var\(--(\w+)\)", figures)) <= defined


def test_the_same_run_gives_the_same_page(finished: Path, text: str) -> None:
    assert write_report(finished).read_text(encoding="utf-8") == text


def test_without_a_summary_the_scores_come_from_the_answers(run: Path) -> None:
    told = load_run(run)
    (run / "summary.json").unlink()
    counted = load_run(run)
    assert [stage.title for stage in counted.stages] == [stage.title for stage in told.stages]
    assert [stage.scores for stage in counted.stages] == [stage.scores for stage in told.stages]
    assert [stage.by_kind["count"]["n"] for stage in counted.stages] == [20] * 5
    assert counted.controls == told.controls
    assert [(pairs.tries, pairs.kept, pairs.unparsed) for pairs in counted.pairs] == [(240, 22, 5)] * 2
    assert "the summary is not there yet" in page_of(run).text


@pytest.mark.parametrize("kept", ["eval/sft.jsonl", "iter0/stage1/log.jsonl", "iter0/generate/trajectories.jsonl",
                                  "iter0/filter/manifest.json", "summary.json"])  # fmt: skip
def test_a_run_that_has_barely_begun_is_shown_as_far_as_it_is(finished: Path, tmp_path: Path, kept: str) -> None:
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(finished / kept, tmp_path / kept)
    page = page_of(tmp_path)
    assert not page.open
    assert "not finished" in page.text


def test_the_rule_that_made_the_pairs_is_said_beside_what_the_papers_gives(run: Path) -> None:
    text = page_of(run).text
    assert "A box scores the share of its answers that are right, by exact; 4 answers sampled from each crop." in text
    assert "Pairs: the policy's best box against the worst of its own, worse by 0.5." in text
    for words in ("Trained on", "22 55.0 % 86.4 % 512", "The paper's rule", "9 22.5 % 66.7 % 1,252"):
        assert words in text, words
    for folder in run.glob("iter*/filter-paper"):
        shutil.rmtree(folder)
    assert "The paper's rule" not in page_of(run).text


def test_four_cells_and_what_crops_gain_are_counted_from_the_answers(run: Path) -> None:
    last = load_run(run).stages[-1]
    cells = [last.quadrants[name] for name in QUADRANTS]
    assert sum(cells) == last.quadrants["n"] == 60
    rows = list(last.rows.values())
    assert cells[2] == sum(row["correct"] and not row["grounded"] for row in rows) > 0
    without = load_run(run).controls["last"]["no_crop"]["answer_accuracy"].mean
    assert (last.crop["gain"] - last.crop["harm"]) / 60 == pytest.approx(last.scores["answer_accuracy"].mean - without)
    text = page_of(run).text
    assert "The crop holds the evidence The crop misses it Checkpoint right wrong right wrong Questions SFT" in text
    assert f"{last.crop['gain']} {100 * last.crop['gain'] / 60:.1f} %" in text
    assert "Shown the crop of its box for another question about the same image, the last checkpoint answers" in text
    for name in STAGES:  # rows of an older run: the section goes, and nothing else
        rows = [
            {k: v for k, v in row.items() if k not in ("grounded", "right_object")}
            for row in read_jsonl(run / f"eval/{name}.jsonl")
        ]
        write_records(run / f"eval/{name}.jsonl", rows)
    (run / "eval/sft.no_crop.jsonl").unlink()
    (run / "eval/iter1-stage2.no_crop.jsonl").unlink()
    assert "grounding" not in [attrs["id"] for attrs in page_of(run).all("section")]


def test_questions_about_one_image_stand_side_by_side(run: Path) -> None:
    loaded = load_run(run)
    found = exhibits(loaded.stages, "exact", 12)
    assert [(shown.number, shown.of) for shown in found] == [(1, 2), (2, 2)] * 6
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert {one.question, two.question} == {f"Which number is on the {card} card?" for card in ("red", "blue")}
    assert "question 2 of 2 about this image" in page_of(run).text


def test_an_unfinished_last_line_is_left_out_and_a_bad_line_is_not(run: Path) -> None:
    log = run / "iter0/stage1/log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 61, "lo')
    assert len(load_run(run).curves[0].rows) == 60
    log.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ReportError, match=r"log\.jsonl, line 2"):
        write_report(run)
    log.unlink()
    rewrite(run / "eval/sft.jsonl", iou=None)
    assert "answer_accuracy" in load_run(run).stages[0].scores
    write_records(run / "eval/sft.jsonl", [{"id": "test-0", "question": "?"}])
    with pytest.raises(ReportError, match=r"sft\.jsonl, row 1: no 'answer'"):
        write_report(run)


def test_the_command_says_where_the_page_is_or_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(run)
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(run / "nowhere")])
    assert stopped.value.code == 1
    assert "no run at" in capsys.readouterr().err


def test_evaluations_are_shown_by_mode(tmp_path: Path) -> None:
    for mode, mean in (("own", 0.75), ("truth", 1.0)):
        facts = {"benchmark": "samples", "model": "<tiny>", "mode": mode, "n": 20, "failed": 1}
        columns = {"correct": {"counted": {"n": 20, "mean": mean, "low": 0.5, "high": 1.0}}, "iou": {"counted": None}}
        (tmp_path / f"eval-{mode}").mkdir()
        (tmp_path / f"eval-{mode}" / "scores.json").write_text(json.dumps(facts | {"columns": columns}))
    both = write_report(tmp_path).read_text()
    assert "2 evaluations of &lt;tiny&gt;." in both
    assert both.index("0.750 <small>[0.500, 1.000]</small>") < both.index("1.000 <small>[0.500, 1.000]</small>")
    assert 'id="results"' in both
    assert "not there yet" not in both
    alone = write_report(tmp_path / "eval-truth").read_text()
    assert "1 evaluation of" in alone
    assert "0.750" not in alone


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run at"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "runs" / "iter0").mkdir(parents=True)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ReportError, match=r"holds no summary\.json, iter0, log\.jsonl or scores\.json; give"):
        write_report(tmp_path)  # a folder of runs, or a data set's, is none
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"summary\.json is not JSON"):
        write_report(tmp_path)


def test_no_answer_has_a_say_in_the_gallery(run: Path) -> None:
    def shown() -> list[str]:
        text = write_report(run).read_text(encoding="utf-8")
        return re.findall(r'class="picture"[^>]*alt="([^"]*?) with the boxes', text)

    for name in STAGES:
        for path in run.glob(f"eval/{name}.jsonl"):
            write_records(path, [{**row, "question": row["id"]} for row in read_jsonl(path)])
    before = shown()
    rewrite(run / "eval/iter1-stage2.jsonl", correct=False, box=None, iou=0.0)
    assert shown() == before
    assert len(before) == 36 == len(set(before))
    assert draw_lot(str(number) for number in range(500)) == draw_lot(str(number) for number in reversed(range(500)))


def test_the_draw_is_set_beside_all_questions(run: Path) -> None:
    rewrite(run / "eval/sft.jsonl", correct=False)
    rewrite(run / "eval/iter1-stage2.jsonl", correct=True)
    page = page_of(run)
    assert f"{OUTCOMES[0]} 36 100 % 60 100 %" in page.text
    assert f"{OUTCOMES[1]} 0 0 % 0 0 %" in page.text


def test_a_picture_that_is_gone_is_named_in_its_place(run: Path) -> None:
    for name in STAGES:
        rewrite(run / f"eval/{name}.jsonl", image="gone.png")
    page = page_of(run)
    assert page.text.count("no picture at gone.png") == 36
    assert not page.all("img")


def test_pictures_are_named_from_the_folder_that_the_run_was_given(run: Path, finished: Path) -> None:
    for name in STAGES:
        path = run / f"eval/{name}.jsonl"
        write_records(path, [{**row, "image": Path(row["image"]).name} for row in read_jsonl(path)])
    loaded = load_run(run)
    assert all("no picture at" in shown.problem for shown in exhibits(loaded.stages, "exact", 2))
    write_manifest(run, verb="evolve", config={"image_root": str(finished / "pictures")}, parents={})
    found = exhibits(loaded.stages, "exact", 2, load_run(run).image_root)
    assert [shown.problem for shown in found] == ["", ""]


def test_words_of_a_model_cannot_become_markup(run: Path) -> None:
    for name in STAGES:
        rewrite(run / f"eval/{name}.jsonl", question='<script>alert("1")</script>', prediction="</p><img src=x>")
    page = page_of(run)
    assert len(page.all("script")) == 1
    assert all(attrs["src"].startswith("data:") for attrs in page.all("img"))
    assert "</p><img src=x>" in page.text


def test_a_step_that_hurt_and_controls_out_of_order_are_said(run: Path) -> None:
    (run / "summary.json").unlink()
    rewrite(run / "eval/iter1-stage2.jsonl", correct=False)
    rewrite(run / "eval/sft.random.jsonl", correct=True)
    loaded = load_run(run)
    assert change(loaded.stages[3], loaded.stages[4], "answer_accuracy").verdict == "worse"
    notes = " ".join(caveats(loaded))
    assert "Stage 2, iteration 1 made the answers worse than Stage 1, iteration 1" in notes
    assert "does not hold: random box, 100.0\u00a0%, is above centre box" in notes
    assert "a loss on the same questions" in page_of(run).text


def test_a_summary_that_its_answers_do_not_bear_out_is_said(run: Path) -> None:
    assert "evaluate again" not in " ".join(caveats(load_run(run)))
    rewrite(run / "eval/iter0-stage2.jsonl", correct=True)
    assert "Stage 2, iteration 0: the summary says" in " ".join(caveats(load_run(run)))


def test_checkpoints_still_being_evaluated_are_compared_over_what_both_answered(run: Path) -> None:
    (run / "summary.json").unlink()
    path = run / "eval/iter1-stage2.jsonl"
    write_records(path, list(read_jsonl(path))[:40])
    page = page_of(run)
    assert "answered between 40 and 60 questions so far" in page.text
    assert "36 of 40 test questions" in page.text


def test_a_checkpoint_that_changed_nothing_is_not_praised(run: Path) -> None:
    shutil.copy(run / "eval/sft.jsonl", run / "eval/iter0-stage1.jsonl")
    loaded = load_run(run)
    assert change(loaded.stages[0], loaded.stages[1], "box_iou").verdict == "no measurable difference"


def test_boxes_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (200, 100), "#888888")
    drawn = annotate(image, [(Box(0.25, 0.2, 0.75, 0.8), FIRST_COLOUR, ""), (Box(0.0, 0.0, 1.0, 1.0), TRUE_COLOUR, "")])
    orange, black = (0xE0, 0x7B, 0x00), (0x11, 0x13, 0x18)
    assert [drawn.getpixel(at) for at in ((50, 50), (150, 50), (100, 20), (100, 80))] == [orange] * 4
    assert [drawn.getpixel(at) for at in ((0, 50), (199, 50), (100, 0), (100, 99))] == [black] * 4
    assert drawn.getpixel((100, 50)) == (0x88, 0x88, 0x88)
    assert image.getcolors() == [(20_000, (0x88, 0x88, 0x88))]


def test_labels_keep_clear_of_each_other_and_any_size_can_be_drawn() -> None:
    image = Image.new("RGB", (300, 300), "#888888")
    box = Box(0.4, 0.4, 0.6, 0.6)
    alone = annotate(image, [(box, TRUE_COLOUR, "true")])
    both = annotate(image, [(box, TRUE_COLOUR, "true"), (box, FIRST_COLOUR, "SFT")])
    tag = [(x, y) for x in range(118, 150) for y in range(104, 116) if alone.getpixel((x, y)) != (0x88, 0x88, 0x88)]
    assert len(tag) > 200
    assert all(alone.getpixel(at) == both.getpixel(at) for at in tag)
    for size in ((1, 1), (2, 300), (28, 28), (1000, 40)):
        assert annotate(Image.new("RGB", size), [(Box(0.999, 0, 1, 0.001), TRUE_COLOUR, "true")]).size == size


def test_a_noisy_picture_is_made_coarser_until_it_fits() -> None:
    noise = Image.effect_noise((448, 448), 90).convert("RGB")
    assert len(data_uri(noise)) > 75_000 >= len(data_uri(noise, 75_000))
