"""Every command of docs/EVALUATION.md, run in a folder that holds what the page speaks of."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from benchmark_files import write_benchmark
from serve_help import known
from typer.testing import CliRunner
from zoom_files import write_treebench, write_vstar

from visrl.cli import app
from visrl.cli.evaluate import app as eval_app
from visrl.evaluate.config import EvalConfig
from visrl.models.tiny import CHECKPOINT
from visrl.prompts import JUDGE_SYSTEM

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "EVALUATION.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch) -> Path:
    """The files that the page names: a small benchmark of our own under the published names, and a model."""
    made = write_benchmark(tmp_path / "made", ("gqa",))
    (tmp_path / "data" / "viscot").mkdir(parents=True)
    for found, named in (
        ("benchmark", "viscot/benchmark"),
        ("detection", "viscot/benchmark_det"),
        ("cot", "viscot/cot"),
    ):
        (tmp_path / "data" / named).symlink_to(made / found)
    (tmp_path / "data" / "refcoco").mkdir()
    rows = (made / "refcoco" / "REC_gqa.jsonl").read_text()
    (tmp_path / "data" / "refcoco" / "REC_refcoco_unc_val.jsonl").write_text(rows)
    (tmp_path / "data" / "coco").mkdir()
    (tmp_path / "data" / "coco" / "train2014").symlink_to(made)
    (tmp_path / "REC_refcoco_unc_val.jsonl").write_text(
        "".join(json.dumps({"text": "[0.1, 0.1, 0.5, 0.5]"}) + "\n" for _ in rows.splitlines())
    )
    (tmp_path / "answers").mkdir()
    boxes = [json.loads(line) | {"text": "[0.1, 0.1, 0.5, 0.5]"} for line in rows.splitlines()]
    (tmp_path / "answers" / "gqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boxes))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "gqa.jsonl").write_text(
        "".join(json.dumps({"question_id": number, "text": "7"}) + "\n" for number in range(4))
    )
    write_vstar(tmp_path / "data" / "vstar_bench", 2)
    write_treebench(tmp_path / "data" / "TreeBench", 3)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    embedded = tmp_path / CHECKPOINT.relative_to(ROOT)
    embedded.parent.mkdir(parents=True)
    embedded.symlink_to(CHECKPOINT)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for name in ("merged", "tiny/warm"):
        (tmp_path / "runs" / name).symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
def test_every_command_of_the_page_runs(folder):
    shown = commands()
    with known(lambda talk: "score: 0.5" if talk.messages[0].text == JUDGE_SYSTEM else "?", name="my-judge") as (
        url,
        _,
        _,
    ):
        for command in shown:
            words = shlex.split(command.replace("http://127.0.0.1:8000", url))
            assert words[0] == "visrl", command
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, (command, result.output, result.exception)
    assert {words.split()[2] for words in shown if " eval " in words} >= {
        command.name or command.callback.__name__ for command in eval_app.registered_commands
    } - {"run"}
    for name in ("ask.png", "leaderboard.html", "runs/eval/refcoco/scores.json", "runs/tiny/eval-truth/results.jsonl"):
        assert (folder / name).is_file()


def test_every_key_that_the_page_names_is_one():
    named = set(re.findall(r"`(\w+)=", TEXT)) | set(
        re.findall(r"`(policy_\w+|judge_\w+|box_dir|codec|extra_body)`", TEXT)
    )
    assert named - {"judge_published"} <= EvalConfig.known_keys()
    assert len(named) > 10
