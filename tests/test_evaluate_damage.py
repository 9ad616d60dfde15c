"""Files of evaluations that are damaged or odd: one sentence with file and row, and never a guess."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from visrl.box import Box
from visrl.cli import app
from visrl.engines.base import Completion
from visrl.evaluate.answers import answer_to_judge, with_judgements
from visrl.records import RecordError, Sample, write_records
from visrl.rewards.judge import Judgement, judge_all, read_judgements
from visrl.rewards.results import Result

JUDGEMENT = Judgement("1", "gqa", "court", "score: 1", 1.0, 1.0, None, "key")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": [1]}, "id cannot be"),
        ({"judge": {"name": "court"}}, "judge cannot be"),
        ({"score": "1"}, "score cannot be '1': it lies between 0 and 1"),
        ({"score": float("nan")}, "score cannot be 'nan'"),
        ({"published": None}, "published cannot be"),
        ({"published": 3}, "published cannot be '3'"),
        ({"reply": 7}, "reply cannot be"),
        ({"max_tokens": "many"}, "max_tokens cannot be"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_what_is_no_judgement_is_named(change, said, tmp_path):
    write_records(tmp_path / "j.jsonl", [asdict(JUDGEMENT), {**asdict(JUDGEMENT), **change}])
    with pytest.raises(RecordError, match=r"j\.jsonl, row 2: not a judgement") as caught:
        list(read_judgements(tmp_path / "j.jsonl"))
    assert said in str(caught.value)


def test_judgements_of_before_and_with_more_room_fit_their_answers(tmp_path):
    row = Result(Sample("1", "a.png", "What?", "seven", source="gqa"), prediction="7 \ud83d").eval_row()
    asked = answer_to_judge(row)
    assert asked is not None
    says = lambda asks, on_reply=None: [on_reply(n, Completion("score: 1", None)) for n, _ in enumerate(asks)]  # noqa: E731
    (usual,) = judge_all([asked], says, "court")
    (roomy,) = judge_all([asked], says, "court", max_tokens=4000)
    assert (usual.max_tokens, roomy.max_tokens) == (256, 4000)
    old = {key: value for key, value in asdict(usual).items() if key != "max_tokens"}
    write_records(tmp_path / "j.jsonl", [old])
    assert list(read_judgements(tmp_path / "j.jsonl")) == [usual]
    for judgement in (usual, roomy):
        assert with_judgements([row], [judgement])[0]["judge"] == 1.0
    with pytest.raises(RecordError, match="of another answer"):
        with_judgements([row | {"prediction": "8"}], [roomy])


def test_a_published_score_that_is_none_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for score in ("0.5", [1], 7, float("nan")):
        write_records(path, [{"question_id": 1, "text": "x", "gt_answer_text": "x", "score": score}])
        result = CliRunner().invoke(app, ["eval", "score", "--protocol", "answers", "--predictions", str(path)])
        assert result.exit_code == 1
        assert "row 1: score is" in result.stderr


ODD: list[Any] = [None, True, -1, 0, 1e308, float("nan"), "x", "", [], [1], {}, {"a": 1}, "\ud800", 10**30, [None] * 4]


def mutated(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {name: one for name, one in value.items() if name != key}
        return rest if rng.random() < 0.2 else {**rest, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def broken(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    kinds = (data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], b"\xef\xbb\xbf" + data, data + data)
    return rng.choice((*kinds, data.replace(b"\n", b"\r\n"), data.decode().encode("utf-16"), b"[" * 20_000))


def write_inputs(folder: Path) -> list[tuple[list[str], list[Path]]]:
    """Sound files of every kind, and the commands that read them."""
    true = Box(0.1, 0.1, 0.4, 0.4)
    samples = [Sample(str(n), f"{n}.png", "What?", "7", true, source=name) for name in "ab" for n in range(4)]
    for name, said in (("one", "7"), ("two", "8")):
        rows = [Result(one, prediction=said, box=true, box_text="[]").eval_row() for one in samples]
        write_records(folder / f"{name}.jsonl", rows)
    box = {"text": "[0.1, 0.1, 0.5, 0.5]", "bbox": [1, 1, 5, 5], "height": 10, "width": 10}
    write_records(folder / "boxes.jsonl", [box] * 4)
    answer = {"question_id": 1, "text": "x", "gt_answer_text": "x", "score": 0.5, "dataset": "gqa"}
    write_records(folder / "answers.jsonl", [answer, answer | {"question_id": 2}])
    judgements = [replace(JUDGEMENT, id=str(n), score=n / 4) for n in range(4)]
    write_records(folder / "j.jsonl", map(asdict, judgements))
    write_records(folder / "k.jsonl", [asdict(replace(one, judge="other")) for one in judgements])
    one, two, boxes, answers, j, k = (folder / f"{name}.jsonl" for name in ("one", "two", "boxes", "answers", "j", "k"))
    out = ["--out", str(folder / "out.jsonl")]
    return [
        (["compare", str(one), str(two)], [one, two]),
        (["leaderboard", f"me={one}", "--out", str(folder / "page.html")], [one]),
        (["score", "--protocol", "refcoco", "--predictions", str(boxes), *out], [boxes]),
        (["score", "--protocol", "answers", "--predictions", str(answers), *out], [answers]),
        (["agree", str(j), str(k)], [j, k]),
    ]


@pytest.mark.parametrize("count", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_damaged_files_end_in_results_or_in_one_sentence(count, tmp_path):
    commands = write_inputs(tmp_path)
    rng = random.Random(count)
    refused = 0
    for _ in range(count):
        command, files = rng.choice(commands)
        path = rng.choice(files)
        sound = path.read_bytes()
        if rng.random() < 0.3:
            path.write_bytes(broken(sound, rng))
        else:
            lines = sound.decode().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(mutated(json.loads(lines[at]), rng))
            path.write_text("\n".join(lines) + "\n")
        result = CliRunner().invoke(app, ["eval", *command])
        path.write_bytes(sound)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        if result.exit_code:
            refused += 1
            assert result.stderr.startswith("visrl: ")
            assert len(result.stderr) < 600
    assert count / 5 < refused < count
