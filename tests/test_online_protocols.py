"""A public protocol is trained on: DeepEyes on a tiny random Qwen2.5-VL, whose turns are written here.

Three first turns: a call whose crop is answered from twice, the right way and by a turn that is cut short; a wrong
answer at once; and a turn that is cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from online_runs import online_config, read_lines
from tiny_families import make

from visrl.conversation import Conversation
from visrl.engines.base import Completion, Sampling
from visrl.engines.local import LocalEngine
from visrl.records import write_records
from visrl.train import online
from visrl.train.run import train

CALL = (
    '<think>Far.</think><tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [8, 8, 92, 64]}}</tool_call>'
)
CUT = "<think>I see"


class Scripted(LocalEngine):
    """The live model, which is made to say what stands in the script: by how many pictures it has seen, in order."""

    script: ClassVar[dict[int, list[str]]] = {}

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        return [
            [self._said(talk, self.script[len(talk.views)][n]) for n in range(len(own))]
            for talk, own in zip(conversations, seeds, strict=True)
        ]

    def _said(self, talk: Conversation, text: str) -> Completion:
        (prompt,) = self.encoder.encode(talk, [None])
        ids = self.encoder.tokenizer(text, add_special_tokens=False).input_ids
        is_cut = text == CUT
        ids = tuple(ids if is_cut else [*ids, self.encoder.end_id])
        reason: Any = "length" if is_cut else "stop"
        return Completion(text, len(ids), reason, None, len(prompt.ids), False, ids, (-1.0,) * len(ids))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    model, encoder = make("qwen2_5_vl")
    model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder


def trained(out: Path, checkpoint: Path, script: dict[int, list[str]], monkeypatch: Any, **more: Any) -> Path:
    monkeypatch.setattr(Scripted, "script", script)
    monkeypatch.setattr(online, "LocalEngine", Scripted)
    asked = {"id": "1", "image": "scene:preference@1/0", "question": "Which number is red?", "answer": "7"}
    write_records(out.parent / "questions.jsonl", [asked])
    given = {
        "protocol": "deepeyes", "scale_rewards": "none", "max_steps": 1, "per_device_train_batch_size": 1,
        "cutoff_len": 8192, "max_completion_length": 256, "dataset": str(out.parent / "questions.jsonl"), **more,
    }  # fmt: skip
    return train(online_config(out, model_name_or_path=str(checkpoint), **given))


@pytest.mark.parametrize("punished", [False, True])
def test_credit_goes_back_over_calls_and_what_was_cut_teaches_nothing_unless_it_is_punished(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, punished: bool
) -> None:
    """The call is worth 1 (the cut answer is in no mean) and the wrong answer 0: +½ and −½. Punished, a cut turn is
    worth 0: the call ½ and the others 0, against a mean of 1/6; from the crop 1 against 0."""
    right, wrong, sixth = "<think>It is.</think><answer>7</answer>", "<answer>none of them</answer>", 1 / 6
    script = {1: [CALL, wrong, CUT], 2: [right, CUT]}
    out = trained(tmp_path / "out", checkpoint, script, monkeypatch, punish_unfinished=punished)
    (row,) = read_lines(out / "rollouts.jsonl")
    call, answer, cut = row["turns"]
    expected = [0.5 - sixth, -sixth, -sixth] if punished else [0.5, -0.5, None]
    assert [turn["advantage"] for turn in row["turns"]] == pytest.approx(expected)
    assert [turn["advantage"] for turn in call["turns"]] == ([0.5, -0.5] if punished else [0.0, None])
    assert [turn["end"] for turn in (*call["turns"], answer, cut)] == ["answered", "tokens", "answered", "tokens"]
    (look,) = call["looks"]
    assert 0 < look[0] < look[2] < 1
    assert call["text"] == CALL
    log = next(row for row in read_lines(out / "log.jsonl") if "loss" in row)
    assert log["grad_norm"] > 0
    assert log["rollout/unfinished"] == pytest.approx(sixth + 2 * sixth)
    assert log["left_out"] == (0 if punished else 0.5)
    assert log["rollout/looks_mean"] == pytest.approx(2 * sixth)


def test_a_step_whose_episodes_all_come_to_no_end_changes_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = trained(tmp_path / "out", checkpoint, {1: [CALL, CUT, CUT], 2: [CUT, CUT]}, monkeypatch)
    log = next(row for row in read_lines(out / "log.jsonl") if "loss" in row)
    assert (log["grad_norm"], log["left_out"], log["rollout/unfinished"]) == (0, 1, 1)
    (row,) = read_lines(out / "rollouts.jsonl")
    assert {turn["value"] for turn in row["turns"]} == {None}
