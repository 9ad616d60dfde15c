"""The whole loop on the embedded model: what it writes, what its data may not hold, and kills that change nothing."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from visrl.box import overlap
from visrl.config import CONFIGS, ConfigError, read_config
from visrl.data.native import read_records
from visrl.evolve.config import DemoConfig
from visrl.evolve.demo import run_demo
from visrl.evolve.generate import read_questions
from visrl.manifest import ManifestError, hash_checkpoint, read_manifest
from visrl.models.tiny import CHECKPOINT, LOOKS_CHECKPOINT
from visrl.records import Preference, Trajectory, read_jsonl
from visrl.report.several_looks import EVALUATED, LOOKS, ONLINE, WARM_UP
from visrl.scenes import KINDS, find_question, true_box
from visrl.train.config import TrainConfig

SMALL = {"questions": 64, "test_questions": 64, "rounds": 5, "iterations": 1, "online_steps": 2}
SMALL |= {"look_steps": 1, "look_questions": 48}


def command(out: Path) -> list[str]:
    given = [f"{key}={value}" for key, value in SMALL.items()]
    return [sys.executable, "-m", "visrl.cli", "demo", f"output_dir={out}", *given]


def numbers(out: Path) -> dict:
    """The summary without what depends on the clock and the machine."""
    summary = json.loads((out / "summary.json").read_text())
    return {
        k: v
        for k, v in summary.items()
        if k not in ("seconds", "seconds_by_step", "cpu_seconds_by_step", "peak_rss_mb", "config")
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(DemoConfig(output_dir=out, **SMALL))
    return out


def test_the_summary_has_every_stage_and_every_control(demo):
    summary = json.loads((demo / "summary.json").read_text())
    assert [(s["name"], s["iteration"], s["n"]) for s in summary["stages"]] == [
        ("sft", 0, 64),
        ("stage1", 0, 64),
        ("stage2", 0, 64),
        ("online", 0, 64),
    ]
    assert summary["cpu_seconds_by_step"]["online"] > 0
    for stage in summary["stages"]:
        for measure in ("answer_accuracy", "box_iou", "box_accuracy_50"):
            assert 0 <= stage[measure]["low"] <= stage[measure]["mean"] <= stage[measure]["high"] <= 1
    assert set(summary["controls"]) >= {"no_crop", "random", "center", "truth"}
    assert summary["controls"]["truth"]["box_iou"]["mean"] == 1.0
    (pairs,) = summary["pairs"]
    assert pairs["questions"] == 64
    assert pairs["kept"] + sum(pairs["dropped_by_reason"].values()) == 64
    page = (demo / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_training_data_holds_no_true_box(demo):
    preferences = list(read_records(Preference, demo / "iter0" / "filter" / "preferences.jsonl"))
    assert preferences
    tried = {t.box_text for t in read_records(Trajectory, demo / "iter0" / "generate" / "trajectories.jsonl")}
    for preference in preferences:
        if preference.step == "box":
            assert {preference.chosen, preference.rejected} <= tried, "boxes come from the policy or the controller"
        scene, question = find_question(preference.id)
        truth = true_box(scene, question).as_list()
        assert json.dumps([round(value, 6) for value in truth]) not in json.dumps(preference.prompt)
        assert all(picture.crop is None or picture.crop.as_list() != truth for picture in preference.images)


def test_preference_and_test_questions_are_not_those_of_the_warm_up(demo):
    manifest = read_manifest(CHECKPOINT)
    assert manifest["config"]["stage"] == "sft"
    for file in (demo / "iter0" / "filter" / "preferences.jsonl", demo / "eval" / "sft.jsonl"):
        for line in file.read_text().splitlines():
            assert not json.loads(line)["id"].startswith("train")


def test_the_embedded_model_reads_the_crop_and_not_the_whole_picture(demo):
    controls = json.loads((demo / "summary.json").read_text())["controls"]
    read = {mode: scores["answer_accuracy"]["mean"] for mode, scores in controls.items()}
    assert read["truth"] > 0.4
    assert max(read["no_crop"], read["random"], read["center"]) < read["truth"] - 0.15


def test_several_looks_are_learned_beside_the_loop_and_shown_by_kind(demo):
    rows = {}
    for name in (WARM_UP, ONLINE):
        rows[name] = list(read_jsonl(demo / LOOKS / EVALUATED.format(name) / "results.jsonl"))
        assert len(rows[name]) == SMALL["look_questions"]
    assert [row["id"] for row in rows[WARM_UP]] == [row["id"] for row in rows[ONLINE]]
    taken = Counter(len(row["looks"]) for row in rows[WARM_UP])
    assert min(taken[count] for count in (0, 1, 2)) > 3, taken
    trained = read_manifest(demo / LOOKS / ONLINE)
    assert (trained["steps"], trained["config"]["look_price"] > 0) == (1, True)
    page = (demo / "report.html").read_text()
    assert "Several looks, where they pay" in page
    assert re.search(r"<th scope=.row.>sum</th>", page)


def test_the_model_of_several_looks_is_made_by_its_config():
    manifest = read_manifest(LOOKS_CHECKPOINT)
    config = read_config(TrainConfig, CONFIGS / "tiny" / "train_looks.yaml", [])
    assert manifest["parents"]["model"] == hash_checkpoint(CHECKPOINT)
    assert manifest["config"]["curriculum"] == config.recorded()["curriculum"]
    for key in ("seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "per_device_train_batch_size"):
        assert manifest["config"][key] == config.recorded()[key], key


def test_the_same_command_again_is_complete_and_another_is_refused(demo):
    before = numbers(demo)
    run_demo(DemoConfig(output_dir=demo, **SMALL))
    assert numbers(demo) == before
    with pytest.raises(ManifestError, match=r"holds other work \(questions differ\)"):
        run_demo(DemoConfig(output_dir=demo, **{**SMALL, "questions": 65}))


def test_no_model_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no model at"):
        run_demo(DemoConfig(output_dir=tmp_path / "x", model_name_or_path=str(tmp_path / "nothing")))


DEMOS = [
    {},
    {"questions": 65, "test_questions": 1},
    {"per_scene": 3, "seed": 2},
    {"per_scene": 1},
    {"tags": 1},
    {"tags": 1, "kinds": ["count"]},
    {"kinds": ["relation", "shape"], "iterations": 1},
]


@pytest.mark.parametrize("keys", DEMOS)
def test_a_demo_asks_as_many_questions_as_it_says(keys):
    config = DemoConfig(**{"questions": 64, "test_questions": 40, **keys})
    evolution = config.evolution()
    asked = [
        read_questions(source, limit=limit)
        for sources, limit in (
            (evolution.dataset, evolution.max_samples),
            ([evolution.eval_dataset], evolution.eval_samples),
        )
        for source in sources
    ]
    assert [len(samples) for samples in asked] == [config.questions] * config.iterations + [config.test_questions]
    places = [{sample.image for sample in samples} for samples in asked]
    assert sum(map(len, places)) == len(set().union(*places)), "no scene is asked about twice"
    other = config.model_copy(update={"seed": config.seed + 1}).evolution()
    assert not {sample.image for sample in read_questions(other.dataset[0], limit=64)} & set().union(*places)


def test_the_questions_of_a_demo_share_their_scene_with_one_of_another_tag():
    evolution = DemoConfig().evolution()
    samples = read_questions(evolution.eval_dataset, with_box=True)
    assert len(samples) == DemoConfig().test_questions
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        assert one.image == other.image
        assert overlap(one.box, other.box) == 0
    shares = Counter(sample.source for sample in samples)
    assert set(shares) == {f"scenes-{kind}" for kind in KINDS}
    assert min(shares.values()) > 0.08 * len(samples)


def test_a_demo_of_questions_that_its_scenes_do_not_allow_is_refused():
    with pytest.raises(ConfigError, match=r"at most 1 tags have fewer than 64 questions of kind place, relation; name"):
        DemoConfig(questions=64, tags=1, kinds=["place", "relation"]).evolution()


@pytest.mark.slow
def test_a_demo_killed_again_and_again_ends_with_the_same_numbers(demo, tmp_path):
    out = tmp_path / "run"
    rng = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(4, 16))
        process.kill()
        process.wait()
    subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert numbers(out) == numbers(demo)


def test_the_papers_method_is_the_papers_critic_and_rule() -> None:
    paper, shipped = DemoConfig(method="paper").evolution(), DemoConfig().evolution()
    assert (paper.critic, paper.answers, paper.losers, paper.diversity, paper.compare_paper) == (
        "auto", 1, "paper", True, False
    )  # fmt: skip
    assert (shipped.critic, shipped.losers, shipped.compare_paper) == ("outcome", "own", True)
    assert paper.dataset == shipped.dataset
