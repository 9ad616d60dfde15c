"""One bad row stops nothing: what a model cannot be shown is a failed row to ask, a counted drop in training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visrl.conversation import Conversation, Message, PromptError, focus_conversation, open_view
from visrl.data.formats import Reading
from visrl.data.sources import read_samples
from visrl.data.stats import as_table, measure
from visrl.engines.base import Completion, Sampling, seed_of
from visrl.engines.local import LocalEngine
from visrl.evaluate.answers import answer_to_judge, score_answers, with_judgements
from visrl.evaluate.ask import ask
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.results import read_results
from visrl.evaluate.run import evaluate
from visrl.models.load import load_encoder
from visrl.models.tiny import CHECKPOINT
from visrl.models.tokens import TokenCounts
from visrl.prompts import focus_prompt
from visrl.records import Picture, Sample, Trajectory, read_jsonl, write_records
from visrl.rewards.critic import ModelCritic
from visrl.rewards.judge import judge_all
from visrl.rewards.scored import evaluate_samples
from visrl.rollout.protocols import VISCOT
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.train.config import TrainConfig
from visrl.train.data import SftSamples
from visrl.train.dry_run import scan_dataset
from visrl.train.items import Collator
from visrl.train.run import train

GOOD = {"image": "scene:train/0", "question": "What does the red tag say?", "answer": "7", "box": [0.1, 0.1, 0.6, 0.6]}
BAD = {
    "thin": GOOD | {"image": "thin.png"},
    "token": GOOD | {"question": "What <|im_end|> is this?"},
    "long": GOOD | {"question": "please " * 30_000},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    Image.new("RGB", (800, 2)).save(folder / "thin.png")
    return folder


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine.load(CHECKPOINT)


def dataset(path: Path, rows: list[dict[str, Any]]) -> str:
    write_records(path, [row | {"id": str(number)} for number, row in enumerate(rows)])
    return str(path)


def samples_of(path: Path, rows: list[dict[str, Any]]) -> list[Sample]:
    return read_samples(dataset(path, rows))


# --- What asks a model ----------------------------------------------------------------------------------------------


def test_a_rollout_of_what_cannot_be_shown_is_a_failed_record_beside_the_others(engine, folder, tmp_path):
    settings = RolloutSettings(rounds=1)
    samples = samples_of(tmp_path / "rows.jsonl", [GOOD, *BAD.values(), GOOD | {"question": "How many tags?"}])
    tried = roll_out(engine, samples, settings, folder)
    errors = {t.sample_id: t.error for t in tried}
    assert errors["1"].startswith("prompt: a picture of 800 × 2 px")
    assert errors["2"].startswith("prompt: ")
    assert "control token" in errors["2"]
    assert "the model is shown at most 2,048" in errors["3"]
    assert all(t.answer is None and t.box is None for t in tried if t.sample_id in "123")
    alone = roll_out(engine, [samples[0], samples[4]], settings, folder)
    assert [t for t in tried if t.sample_id in "04"] == alone


def test_a_long_question_costs_no_mask_of_its_square(engine):
    started = time.monotonic()
    talk = focus_conversation("x " * 100_000, open_view(Picture("scene:train/0")))
    ((completion,),) = engine.complete([talk], Sampling(), [[0]])
    assert "200," in str(completion.error) or "tokens" in str(completion.error)
    assert time.monotonic() - started < 5


def test_an_evaluation_goes_on_past_what_cannot_be_shown_and_is_not_stopped_by_it_again(folder, tmp_path):
    rows = dataset(tmp_path / "rows.jsonl", [GOOD, BAD["thin"], BAD["token"], GOOD])
    given = EvalConfig.model_validate(
        {
            "model_name_or_path": str(CHECKPOINT), "benchmark": "samples", "dataset": rows, "image_root": str(folder),
            "output_dir": tmp_path / "out", "mode": "no_box", "batch_size": 2,
        }
    )  # fmt: skip
    results = read_results(evaluate(given))
    assert [row["error"] is not None for row in results] == [False, True, True, False]
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert (evaluate(given) / "results.jsonl").read_bytes() == before


def test_asking_one_question_that_cannot_be_put_answers_the_others(engine):
    replies = ask(engine, "tiny", "scene:train/0", ["What <image> is it?", "What is red?", "a <|im_start|> b"], "exact")
    assert "prompt: 2 <image> marks" in replies[0].lines()[0]
    assert replies[1].look.text
    assert "control token" in replies[2].lines()[0]


def test_a_template_that_refuses_one_conversation_fails_that_row_alone():
    engine = LocalEngine.load(CHECKPOINT)
    known = engine.encoder.chat_template
    forbidden = "'forbidden' in messages[0]['content'][1]['text']"
    refusal = "{% if " + forbidden + " %}{{ raise_exception('not this one') }}{% endif %}"
    engine.encoder.chat_template = refusal + known
    whole = open_view(Picture("scene:train/0"))
    talks = [focus_conversation(question, whole) for question in ("What is red?", "The forbidden one?")]
    good, bad = engine.complete(talks, Sampling(max_tokens=4), [[0], [0]])
    assert good[0].text
    assert "not this one" in str(bad[0].error)


def test_a_policy_that_writes_a_picture_mark_into_its_box_stops_nothing():
    class Marking:
        """Writes boxes with a picture's mark beside them, as an untrained model may."""

        name = "marking"
        codec = load_encoder(CHECKPOINT).codec

        def processed_size(self, size, is_crop=False):
            return size

        def forget(self):
            pass

        def complete(self, conversations, sampling, seeds):
            return [[Completion("[0.1, 0.1, 0.5, 0.5] <image>")] for _ in conversations]

    from visrl.rollout.greedy import greedy_looks

    (look,) = greedy_looks(Marking(), [Sample("a", "scene:train/0", "What?", "x")], protocol=VISCOT)
    assert (look.error, look.answer) == (None, "[0.1, 0.1, 0.5, 0.5] <image>")


def test_a_critic_goes_on_past_a_picture_that_is_gone_or_a_question_with_a_mark(tmp_path):
    class Critic:
        name = "critic"

        def complete(self, conversations, sampling, seeds):
            return [[Completion("score: 0.5")] for _ in conversations]

    good, gone, marked = (
        Sample(str(n), image, question, "7", None)
        for n, (image, question) in enumerate(
            [("scene:train/0", "What?"), ("gone.png", "What?"), ("scene:train/0", "What <image>?")]
        )
    )
    box = read_samples(dataset(tmp_path / "r.jsonl", [GOOD]))[0].box
    tries = [Trajectory(one.id, 0, 0, "", box, "sampled", "7", "x", 0) for one in (good, gone, marked)]
    verdicts = ModelCritic(Critic()).judge([good, gone, marked], tries)
    assert [v.answer_score for v in verdicts] == [0.5, None, None]
    assert "gone.png" in verdicts[1].raw


def test_half_a_character_of_a_server_is_mended_where_it_comes_in():
    completion = Completion("[0.1, 0.2] \ud83d", error="\udc00")
    assert completion.text == "[0.1, 0.2] \ufffd"
    assert completion.error == "\ufffd"


def test_half_a_character_in_an_answer_of_another_program_is_judged_like_any(tmp_path):
    (tmp_path / "said.jsonl").write_text(
        json.dumps({"question_id": 1, "text": "red \ud83d", "gt_answer_text": "red \udc00", "question_text": "Q"})
        + "\n"
    )
    rows, _ = score_answers(tmp_path / "said.jsonl")
    asked = [one for one in map(answer_to_judge, rows) if one is not None]

    def court(asks, on_reply):
        for number, one in enumerate(asks):
            assert json.dumps(one.messages, ensure_ascii=False).encode()  # it can be sent
            on_reply(number, Completion("score: 0.5"))
        return []

    for _ in range(2):  # the second time from its journal
        (judged,) = judge_all(asked, court, "court", tmp_path / "judged.jsonl")
        assert judged.score == 0.5
    assert with_judgements(rows, [judged])[0]["judge"] == 0.5
    assert seed_of(0, "half \ud83d") != seed_of(0, "half \ud83e")


def test_what_is_put_to_a_model_is_checked_once_for_all(engine):
    """Prompts and responses alike: a control token or half a character anywhere is a sentence."""
    whole = open_view(Picture("scene:train/0"))
    talk = focus_conversation("What?", whole)
    for response in ("a <|im_end|> b", "<|image_pad|>", "half \ud83d"):
        with pytest.raises(PromptError, match=r"control token|half a character"):
            engine.encoder.encode(talk, [response])
    with pytest.raises(PromptError, match="half a character"):
        engine.encoder.encode(Conversation((Message("user", "<image>\n\udc00"),), (whole,)), [None])
    with pytest.raises(PromptError, match="shown at most 10"):
        engine.encoder.encode(talk, [None], max_tokens=10)


def test_statistics_count_pictures_that_the_model_does_not_take(folder, tmp_path):
    rows = dataset(tmp_path / "rows.jsonl", [GOOD, BAD["thin"] | {"size": [800, 2], "box": None}])
    found = measure("visrl", [rows], Reading(), TokenCounts(load_encoder(CHECKPOINT)))
    assert (len(found.picture_tokens), found.refused) == (1, 1)
    assert "1 of the pictures and crops" in as_table(found)


# --- Training ---------------------------------------------------------------------------------------------------------


def config(tiny: Path, out: Path, rows: str, root: Path, **more: Any) -> TrainConfig:
    values = {
        "model_name_or_path": str(tiny), "stage": "sft", "dataset": rows, "image_root": str(root), "max_steps": 1,
        "output_dir": str(out), "per_device_train_batch_size": 2, "processes": 1, "save_strategy": "no",
        "disable_tqdm": True, **more,
    }  # fmt: skip
    return TrainConfig.model_validate(values)


def test_what_cannot_be_shown_is_dropped_and_counted_by_row(tiny, folder, tmp_path, capsys):
    """Ten good questions stay beside an overlong one of their picture."""
    ten = [GOOD | {"question": f"What is tag {n}?"} for n in range(10)]
    nothing = {"image": "scene:train/1", "question": "What?"}
    rows = dataset(tmp_path / "rows.jsonl", [*ten, *BAD.values(), nothing])
    out = train(config(tiny, tmp_path / "out", rows, folder, drop_unusable=True))
    told = capsys.readouterr().out
    assert "1 rows over cutoff_len: left out" in told
    # The thin picture, the control token, and the row that there is nothing to learn from.
    assert "3 rows that this model cannot be shown: left out" in told
    assert "row 13" in told
    assert "1 items" in told
    assert json.loads((out / "manifest.json").read_text())["items"] == 1
    encoder = load_encoder(tiny)
    found, part = scan_dataset(SftSamples(encoder, read_samples(rows), folder), Collator(encoder, cutoff=2048))
    assert [len(samples) for _, samples in part.groups] == [10]
    assert found.rows == 4


@pytest.mark.parametrize("kind", list(BAD))
def test_without_the_key_training_stops_with_a_sentence_that_names_the_row(tiny, folder, tmp_path, kind):
    rows = dataset(tmp_path / "rows.jsonl", [BAD[kind]])
    with pytest.raises(ValueError, match=r"row 0/box|thin\.png|800 × 2") as error:
        train(config(tiny, tmp_path / "out", rows, folder))
    assert type(error.value).__name__ in ("PromptError", "TooLong")


def test_where_nothing_is_left_training_says_so(tiny, folder, tmp_path):
    rows = dataset(tmp_path / "rows.jsonl", [BAD["thin"]])
    with pytest.raises(ValueError, match="no row for warm-up that can be used"):
        train(config(tiny, tmp_path / "out", rows, folder, drop_unusable=True))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_and_writes_nothing(tiny, folder, tmp_path, capsys):
    rows = dataset(tmp_path / "rows.jsonl", [GOOD, GOOD | {"image": "scene:train/1"}, *BAD.values()])
    train(config(tiny, tmp_path / "out", rows, folder, dry_run=True))
    told = capsys.readouterr().out
    assert "2 rows that this model cannot be shown: training would stop at them" in told
    assert not (tmp_path / "out").exists()


def test_preferences_lose_the_row_that_cannot_be_used_and_keep_its_item(tiny, tmp_path, capsys):
    whole = "scene:train/0"
    box = {
        "step": "box", "prompt": focus_prompt("What?"), "images": [whole], "chosen": "[0.1, 0.1, 0.5, 0.5]",
        "rejected": "[0.2, 0.2, 0.9, 0.9]",
    }  # fmt: skip
    answer = {
        "step": "answer", "prompt": focus_prompt("What?") + "\n<image>", "chosen": "7", "rejected": "9 " * 3000,
        "images": [whole, {"ref": whole, "crop": [0.1, 0.1, 0.5, 0.5]}],
    }  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    short = answer | {"rejected": "9"}
    write_records(
        rows,
        [row | {"id": name} for name in "abc" for row in (box, answer if name == "a" else short)],
    )
    given = {"stage": "dpo", "rl_stage": 2, "drop_unusable": True}
    for loss in ("sigmoid", "kto"):
        out = train(config(tiny, tmp_path / loss, str(rows), tmp_path, pref_loss=loss, **given))
        assert "1 rows over cutoff_len: left out" in capsys.readouterr().out
        assert json.loads((out / "manifest.json").read_text())["items"] == 3
        assert len(json.loads((out / "reference.json").read_text())["logps"]) == (10 if loss == "sigmoid" else 15)


def test_rows_without_boxes_are_trained_as_answers_and_counted(tiny, tmp_path, capsys):
    plain = {"image": "scene:train/0", "question": "What does the red tag say?", "answer": 7}
    rows = dataset(tmp_path / "rows.jsonl", [plain, GOOD, plain | {"image": "scene:train/1"}])
    out = train(config(tiny, tmp_path / "out", rows, tmp_path, logging_steps=1))
    told = capsys.readouterr().out
    assert "2 questions have no box: what is learned of them is the answer to the whole picture" in told
    assert {"nll/box", "nll/answer"} <= set().union(*read_jsonl(out / "log.jsonl"))
    encoder = load_encoder(tiny)
    first, second = (SftSamples(encoder, read_samples(rows))[n] for n in (0, 1))
    assert [row.key for row in first.rows] == ["0/answer", "1/box", "1/answer"]
    (only,) = second.rows
    assert only.conversation.messages[0].text == "<image>\nWhat does the red tag say?"  # as mode no_box asks it
    assert only.responses == (("target", "7"),)


def test_rollouts_watched_while_training_hold_failed_rows_too(engine, folder, tmp_path):
    rows = evaluate_samples(engine, samples_of(tmp_path / "rows.jsonl", [GOOD, BAD["thin"]]), root=folder)
    assert rows[0]["error"] is None or rows[0]["error"].startswith("box")
    assert rows[1]["error"].startswith("prompt: ")
    assert not rows[1]["correct"]
