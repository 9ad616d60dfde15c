"""`visrl filter`: what it reads, counts and refuses, the paper's table, and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from visrl.box import Box
from visrl.config import ConfigError
from visrl.data.native import read_records
from visrl.evolve.config import FilterConfig
from visrl.evolve.filter import filter_pairs, table_lines
from visrl.manifest import write_manifest
from visrl.records import Preference, RecordError, Sample, Trajectory, Verdict, write_records
from visrl.rollout.diversity import random_box_apart
from visrl.scenes import scene_samples

DATASET = "scenes:preference/0+5"
SAMPLES = scene_samples("preference", 0, 5, with_box=True)


def tried(sample: Sample, branch: int, box: Box | None, answer: str | None, error: str | None = None) -> Trajectory:
    text = "" if box is None else str(box.as_list())
    return Trajectory(sample.id, 0, branch, text, box, "sampled", answer, "test", 0, error)


def scored(trajectory: Trajectory, box: float | None, answer: float | None) -> Verdict:
    return Verdict(trajectory.sample_id, trajectory.round, trajectory.branch, box, answer)


def generated(folder: Path, rows: list[tuple[Trajectory, Verdict]]) -> Path:
    write_records(folder / "trajectories.jsonl", [trajectory for trajectory, _ in rows])
    write_records(folder / "verdicts.jsonl", [verdict for _, verdict in rows])
    return folder


def rows() -> list[tuple[Trajectory, Verdict]]:
    """Five questions: WP-LN, WN-LN, two without a pair, one whose tries failed."""
    found = []
    for number, sample in enumerate(SAMPLES):
        truth = sample.box
        away, other = (random_box_apart(truth, truth, seed) for seed in (1, 2))
        win = tried(sample, 0, truth if number == 0 else other, sample.answer)
        lose = tried(sample, 1, away, "99")
        scores = {0: (1.0, 0.0), 1: (1.0, 0.0), 2: (0.5, 0.0), 3: (None, None)}.get(number, (None, None))
        if number == 4:
            win, lose = (tried(sample, b, None, None, "engine: lost") for b in (0, 1))
        found += [(win, scored(win, scores[0], scores[0])), (lose, scored(lose, scores[1], scores[1]))]
    return found


def test_questions_are_kept_or_counted_and_boxes_set_against_the_truth(tmp_path, capsys):
    config = FilterConfig(input_dir=generated(tmp_path / "g", rows()), dataset=DATASET, output_dir=tmp_path / "f")
    counts = filter_pairs(config)
    assert counts["questions"] == 5
    assert counts["dropped_by_reason"] == {"every_try_failed": 1, "no_winner": 1, "nothing_readable": 1}
    assert counts["boxes"] == {"WP-LP": 0, "WP-LN": 1, "WN-LP": 0, "WN-LN": 1}
    told = capsys.readouterr().out
    assert re.search(r"WP-LN +1 +50\.00 %   \(paper 64\.64 %\)", told)
    assert filter_pairs(config) == counts, "the same command again changes nothing"
    preferences = list(read_records(Preference, tmp_path / "f" / "preferences.jsonl"))
    assert {p.id for p in preferences} == {SAMPLES[0].id, SAMPLES[1].id}
    assert table_lines(counts["boxes"])[0].endswith("of 2 pairs:")


def test_the_page_shows_kept_and_dropped_and_needs_nothing_else(tmp_path):
    config = FilterConfig(input_dir=generated(tmp_path / "g", rows()), dataset=DATASET, output_dir=tmp_path / "f")
    filter_pairs(config)
    page = (tmp_path / "f" / "pairs.html").read_text()
    assert page.count("<figure>") == page.count("data:image/jpeg;base64,") == 5
    assert "dropped: no winner" in page
    assert "engine: lost" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    none = config.model_copy(update={"output_dir": tmp_path / "none", "pictures": 0})
    filter_pairs(none)
    assert not (tmp_path / "none" / "pairs.html").exists()


def test_without_the_box_critic_answers_decide_alone(tmp_path):
    sample = SAMPLES[0]
    win, lose = tried(sample, 0, sample.box, "1"), tried(sample, 1, Box(0, 0, 0.1, 0.1), "2")
    folder = generated(tmp_path / "g", [(win, scored(win, None, 1.0)), (lose, scored(lose, None, 0.0))])
    given = {"input_dir": folder, "dataset": "scenes:preference/0+1"}
    assert filter_pairs(FilterConfig(**given, output_dir=tmp_path / "a"))["kept"] == 0
    assert filter_pairs(FilterConfig(**given, output_dir=tmp_path / "b", use_box_critic=False))["kept"] == 1


def test_shards_are_read_in_order_and_once(tmp_path):
    all_rows = rows()
    first, second = generated(tmp_path / "1", all_rows[:4]), generated(tmp_path / "2", all_rows[4:])
    given = {"dataset": DATASET}
    joined = filter_pairs(FilterConfig(input_dir=(first, second), output_dir=tmp_path / "f", **given))
    assert joined["questions"] == 5
    part = filter_pairs(FilterConfig(input_dir=first, output_dir=tmp_path / "g", **given))
    assert part["dropped_by_reason"]["not_generated"] == 3
    with pytest.raises(RecordError, match="give each shard once"):
        filter_pairs(FilterConfig(input_dir=(first, first), output_dir=tmp_path / "h", **given))


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(RecordError, match="must be a folder that `visrl generate` finished"):
        filter_pairs(FilterConfig(input_dir=tmp_path, dataset=DATASET, output_dir=tmp_path / "f"))
    folder = generated(tmp_path / "g", rows())
    with pytest.raises(ConfigError, match=r"say what .* was generated from"):
        filter_pairs(FilterConfig(input_dir=folder, output_dir=tmp_path / "f"))
    with pytest.raises(RecordError, match="is not in the data set"):
        filter_pairs(FilterConfig(input_dir=folder, dataset="scenes:preference/2+3", output_dir=tmp_path / "f2"))
    lines = (folder / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (folder / "verdicts.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(RecordError, match="let `visrl generate` finish"):
        filter_pairs(FilterConfig(input_dir=folder, dataset=DATASET, output_dir=tmp_path / "f3"))


def test_the_data_set_is_that_of_the_generation(tmp_path):
    folder = generated(tmp_path / "g", rows())
    told = {"dataset": DATASET, "dataset_dir": "data", "skip_samples": 0, "max_samples": None, "image_root": None}
    write_manifest(folder, verb="generate", config=told, parents={})
    assert filter_pairs(FilterConfig(input_dir=folder, output_dir=tmp_path / "f"))["questions"] == 5
    assert json.loads((tmp_path / "f" / "manifest.json").read_text())["config"]["dataset"] == DATASET
