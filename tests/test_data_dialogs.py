"""Rows of LLaMA-Factory, ms-swift and LLaVA: each is read whole, or refused by the name of what has no place here."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from data_rows import write_lines
from PIL import Image
from typer.testing import CliRunner

from visrl.box import Box
from visrl.cli import app
from visrl.conversation import PromptError
from visrl.data.convert import convert
from visrl.data.formats import Reading, read_format
from visrl.data.rows import json_items
from visrl.data.sizes import Sizes
from visrl.data.sources import named_preferences, named_samples
from visrl.records import Message, RecordError, VisrlWarning

SENTENCE = "Please provide the bounding box coordinate of the region that can help you answer the question better."


def said(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def told(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def rows_of(folder: Path, *raw: Any, entry: dict[str, Any] | None = None, images: Path | None = None, **reading: Any):
    path = write_lines(folder / "rows.jsonl", list(raw))
    (folder / "dataset_info.json").unlink(missing_ok=True)
    if entry is not None:
        (folder / "dataset_info.json").write_text(json.dumps({"set": {"file_name": "rows.jsonl"} | entry}))
    return list(read_format("sharegpt", path, Reading(Sizes(images=images), **reading)))


def record_of(folder: Path, raw: Any, **more: Any):
    (row,) = rows_of(folder, raw, **more)
    assert row.records, row.reason
    (record,) = row.records
    return record


def fault_of(folder: Path, raw: Any, **more: Any) -> tuple[str, str]:
    (row,) = rows_of(folder, raw, **more)
    assert not row.records
    return row.fault, row.reason


# --- Several turns ------------------------------------------------------------------------------------------------


def test_each_question_of_several_turns_is_a_sample_and_that_is_counted(tmp_path):
    raw = {"id": 7, "images": ["a.jpg"], "messages": said("<image>\nWhat game?", "chess", "Who moves?", "white")}
    (row,) = rows_of(tmp_path, raw)
    assert [(s.id, s.image, s.question, s.answer) for s in row.records] == [
        ("7/1", "a.jpg", "What game?", "chess"),
        ("7/2", "a.jpg", "Who moves?", "white"),
    ]
    assert row.notes == ("each question of several turns is a sample of its own, asked without the turns before it",)


def test_a_box_belongs_to_its_own_question(tmp_path):
    turns = told(
        f"<image>\nThe red one? {SENTENCE}", "[0.1, 0.1, 0.3, 0.3]", "What does it say?", "seven",
        f"The blue one? {SENTENCE}", "[0.6, 0.6, 0.9, 0.9]",
    )  # fmt: skip
    (row,) = rows_of(tmp_path, {"images": ["a.jpg"], "conversations": turns}, box_space="image")
    assert [(s.question, s.box and s.box.as_list(), s.answer) for s in row.records] == [
        ("The red one?", [0.1, 0.1, 0.3, 0.3], ""),
        ("What does it say?", None, "seven"),
        ("The blue one?", [0.6, 0.6, 0.9, 0.9], ""),
    ]


def test_the_second_round_of_a_question_is_no_question_of_its_own(tmp_path):
    crop = {"ref": "a.jpg", "crop": [0.1, 0.1, 0.4, 0.4]}
    turns = told(f"<image>\nThe red one? {SENTENCE}", "[0.100, 0.100, 0.300, 0.300]", "<image>", "seven")
    sample = record_of(tmp_path, {"images": ["a.jpg", crop], "conversations": turns}, box_space="image")
    assert (sample.question, sample.box, sample.answer) == ("The red one?", Box(0.1, 0.1, 0.4, 0.4), "seven")


def test_boxes_without_a_named_space_are_refused_not_learned_as_words(tmp_path):
    turns = told(f"<image>\nThe red one? {SENTENCE}", "[0.1, 0.1, 0.3, 0.3]")
    fault, reason = fault_of(tmp_path, {"images": ["a.jpg"], "conversations": turns})
    assert (fault, "--box-space" in reason) == ("no_box_space", True)


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        (said("<image><image>Which is larger?", "the left"), ["a.jpg", "b.jpg"], "turn 1 shows 2 pictures"),
        (said("<image>\nA?", "1", "<image>\nB?", "2", "Which?", "a"), ["a.jpg", "b.jpg"], "turn 5 may be about any of"),
        (said("<image>\nA?", "1"), ["a.jpg", "b.jpg"], "1 <image> marks but 2 pictures"),
        (said("<image>\nA?", "1", "B?"), ["a.jpg"], "the last question has no answer"),
        (said("<image>\nA?", "<image>"), ["a.jpg"], "the reply in turn 2 holds an <image> mark"),
        (said("<image>\nA?", " "), ["a.jpg"], "the reply in turn 2 is empty"),
        (said("<image><video>\nA?", "1"), ["a.jpg"], "turn 1 holds a <video> mark"),
        (said("<image>\nA?", "1"), [{"bytes": "x", "path": "a.jpg"}], "'ref' must be a string"),
        ([*said("<image>\nA?"), *said("B?")], ["a.jpg"], "turn 2 must be the assistant's"),
        ([{"role": "tool", "content": "x"}], ["a.jpg"], "message 1 is from 'tool'"),
    ],
)
def test_turns_that_cannot_be_kept_are_refused_by_name(tmp_path, turns, images, reason):
    assert reason in fault_of(tmp_path, {"images": images, "messages": turns})[1]


def test_questions_about_a_picture_each_are_read(tmp_path):
    (row,) = rows_of(tmp_path, {"images": ["a.jpg", "b.jpg"], "messages": said("<image>\nA?", "1", "<image>\nB?", "2")})
    assert [(s.image, s.question, s.answer) for s in row.records] == [("a.jpg", "A?", "1"), ("b.jpg", "B?", "2")]


@pytest.mark.parametrize("by", ["role", "column", "described"])
def test_a_system_message_is_named_when_it_is_left_out(tmp_path, by):
    turns = said("<image>\nA?", "1")
    raw: dict[str, Any] = {"images": ["a.jpg"], "messages": turns}
    entry = None
    if by == "role":
        turns.insert(0, {"role": "system", "content": "Be brief."})
    else:
        raw["system"] = "Be brief."
    if by == "described":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        columns = {"messages": "messages", "system": "system", "images": "images"}
        entry = {"formatting": "sharegpt", "columns": columns, "tags": tags}
    (row,) = rows_of(tmp_path, raw, entry=entry)
    assert row.records[0].question == "A?"
    assert row.notes == ("the system message is left out: a sample is asked with the prompt of visrl alone",)


# --- Columns that change what a row means -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"kto_tag": False}, "label"),
        ({"label": True}, "label"),
        ({"videos": ["a.mp4"]}, "media"),
        ({"audios": ["a.mp3"]}, "media"),
        ({"tools": "[]x"}, "tools"),
        ({"weight": 0.5}, "weight"),
        ({"objects": {"ref": ["x"], "bbox": []}}, "objects"),
        ({"rejected_response": 3}, "unparseable"),
    ],
)
def test_columns_that_change_the_meaning_are_refused_by_name(tmp_path, more, fault):
    found, reason = fault_of(tmp_path, {"images": ["a.jpg"], "messages": said("<image>\nA?", "1")} | more)
    assert found == fault
    assert next(iter(more)) in reason or "objects" in reason


def test_a_label_by_another_name_is_known_from_the_entry(tmp_path):
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "kto_tag": "liked", "images": "images"}}
    raw = {"images": ["a.jpg"], "conversations": told("<image>\nA?", "1"), "liked": "yes"}
    assert fault_of(tmp_path, raw, entry=entry)[0] == "label"


@pytest.mark.parametrize("more", [{"videos": []}, {"audios": None}, {"tools": ""}, {"weight": 1}, {"objects": {}}])
def test_empty_columns_mean_nothing(tmp_path, more):
    assert record_of(tmp_path, {"images": ["a.jpg"], "messages": said("<image>\nA?", "1")} | more).answer == "1"


def test_other_columns_are_counted_by_name(tmp_path):
    raw = {"images": ["a.jpg"], "messages": said("<image>\nA?", "1"), "model": "x", "score": 3, "empty": None}
    (row,) = rows_of(tmp_path, raw)
    assert row.notes == (
        "the column 'model' has no meaning here and is passed by",
        "the column 'score' has no meaning here and is passed by",
    )


@pytest.mark.parametrize(("key", "value"), [("loss", False), ("weight", 0), ("tool_calls", [1])])
def test_keys_of_a_message_that_say_what_is_learned_are_refused(tmp_path, key, value):
    turns = said("<image>\nA?", "1")
    turns[1][key] = value
    assert key in fault_of(tmp_path, {"images": ["a.jpg"], "messages": turns})[1]


# --- Forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        {"image": "a.jpg", "conversations": told("<image>\nA?", "1")},
        {"image": "a.jpg", "conversations": told("A?\n<image>", "1")},
        {"images": ["a.jpg"], "conversations": told("A?", "1")},
        {"images": ["a.jpg"], "conversation": [{"human": "<image>A?", "assistant": "1"}]},
        {"images": ["a.jpg"], "query": "<image>A?", "response": "1"},
        {"images": "a.jpg", "instruction": "<image>A?", "input": "", "output": "1"},
        {"images": ["a.jpg"], "messages": told("<image>A?", "1")},
        {"images": [{"path": "a.jpg", "bytes": None}], "messages": said("<image>A?", "1"), "id": None},
    ],
)
def test_the_documented_forms_are_one_sample(tmp_path, raw):
    sample = record_of(tmp_path, raw)
    assert (sample.image, sample.question, sample.answer) == ("a.jpg", "A?", "1")


def test_alpaca_rows_are_read_by_their_entry_with_input_and_history(tmp_path):
    columns = {"prompt": "task", "query": "about", "response": "reply", "history": "before", "images": "shown"}
    raw = {
        "task": "Count",
        "about": "the dots",
        "reply": "3",
        "before": [["<image>Name it", "dice"]],
        "shown": ["a.jpg"],
    }
    (row,) = rows_of(tmp_path, raw, entry={"columns": columns})
    assert [(s.question, s.answer) for s in row.records] == [("Name it", "dice"), ("Count\nthe dots", "3")]


def test_query_and_response_with_history(tmp_path):
    raw = {"images": ["a.jpg"], "query": "B?", "response": "2", "history": [["<image>A?", "1"]]}
    (row,) = rows_of(tmp_path, raw)
    assert [(s.question, s.answer) for s in row.records] == [("A?", "1"), ("B?", "2")]


# --- Grounding --------------------------------------------------------------------------------------------------------


def grounding(bbox: Any, reply: str = "<bbox>", **objects: Any) -> dict[str, Any]:
    turns = said("<image>\nFind the <ref-object>", reply)
    return {"images": ["a.png"], "messages": turns, "objects": {"ref": ["dog"], "bbox": bbox} | objects}


def test_objects_fill_their_marks_and_give_the_box(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    for raw in (grounding([[20, 10, 60, 50]]), grounding([[0.1, 0.1, 0.3, 0.5]], bbox_type="norm1")):
        sample = record_of(tmp_path, raw, images=tmp_path)
        assert (sample.question, sample.answer) == ("Find the dog", "")
        assert sample.box.as_list() == pytest.approx([0.1, 0.1, 0.3, 0.5])
    assert record_of(tmp_path, grounding([[20, 10, 60, 50]]) | {"width": 200, "height": 100}).box.x1 == 0.3


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (grounding([[20, 10, 60, 50]]), "no_size"),
        (grounding([[20, 10]], bbox_type="norm1"), "objects"),
        (grounding([[1, 1, 2, 2]], bbox_type="norm1000"), "objects"),
        (grounding([[1, 1, 2, 2]], image_id=[1]), "objects"),
        (grounding([[1, 1, 2, 2]], label=["x"]), "objects"),
        (grounding([]), "objects"),
        (grounding([[0, 0, 1, 1]] * 2, "<bbox><bbox>", bbox_type="norm1"), "objects"),
        (grounding([[0, 0, 1, 1]], "It is at <bbox>", bbox_type="norm1"), "objects"),
        (grounding([[0, 0, 1, 2]], bbox_type="norm1"), "outside"),
        (grounding([[0.5, 0, 0.2, 1]], bbox_type="norm1"), "inverted"),
        (grounding("x"), "objects"),
        (grounding([[1, 1, 2, 2]]) | {"objects": [1]}, "objects"),
        ({"images": ["a.png"], "messages": said("<image>\nWhat is in <bbox>?", "a dog")}, "objects"),
    ],
)
def test_objects_of_another_form_are_refused(tmp_path, raw, fault):
    assert fault_of(tmp_path, raw)[0] == fault


# --- Preferences ------------------------------------------------------------------------------------------------------

RANKED = {
    "images": ["a.png"],
    "conversations": told("<image>What hangs there?", "Tags.", "And the red one?"),
    "chosen": told("", "7")[1],
    "rejected": told("", "70")[1],
}


def test_a_preference_keeps_the_conversation_before_its_last_reply(tmp_path):
    preference = record_of(tmp_path, RANKED | {"system": "Be brief."})
    assert (preference.prompt, preference.chosen, preference.rejected) == ("And the red one?", "7", "70")
    assert preference.context == (
        Message("system", "Be brief."), Message("user", "<image>What hangs there?"), Message("assistant", "Tags."),
    )  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"rejected_response": "70"},
        {"rejected_messages": said("<image>What hangs there?", "Tags.", "And the red one?", "70")},
    ],
)
def test_rankings_of_ms_swift_are_over_the_last_reply(tmp_path, more):
    turns = said("<image>What hangs there?", "Tags.", "And the red one?", "7")
    preference = record_of(tmp_path, {"images": ["a.png"], "messages": turns} | more)
    assert (preference.prompt, preference.chosen, preference.rejected) == ("And the red one?", "7", "70")
    assert [message.text for message in preference.context] == ["<image>What hangs there?", "Tags."]


def test_a_ranking_of_alpaca_columns(tmp_path):
    columns = {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad", "images": "images"}
    raw = {"instruction": "<image>A?", "input": "", "good": "7", "bad": "70", "images": ["a.png"]}
    preference = record_of(tmp_path, raw, entry={"ranking": True, "columns": columns})
    assert (preference.prompt, preference.chosen, preference.context) == ("<image>A?", "7", ())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (RANKED | {"conversations": told("<image>A?", "1")}, "the last turn must be the user's"),
        (RANKED | {"images": ["a.png", "b.png"]}, "1 <image> marks but 2 pictures"),
        (RANKED | {"images": ["a.png", "b.png"], "conversations": told("<image><image>A?")}, "crops of the same"),
        (RANKED | {"chosen": told("", "7")[0]}, "'chosen' is from the user"),
        (RANKED | {"rejected": None}, "needs a chosen and a rejected reply"),
        (RANKED | {"rejected_response": "x"}, "must end with the chosen reply"),
        ({"images": ["a.png"], "messages": said("<image>A?", "7"), "rejected_messages": said("<image>B?", "x")},
         "must differ from the messages in the last reply only"),
    ],
)  # fmt: skip
def test_rankings_that_cannot_be_kept_are_refused(tmp_path, raw, reason):
    assert reason in fault_of(tmp_path, raw)[1]


def test_a_conversation_survives_our_own_files_and_the_way_back(tmp_path):
    path = write_lines(tmp_path / "rl.jsonl", [RANKED | {"id": "q", "weight": 0.25}])
    convert("sharegpt", "visrl", [path], str(tmp_path / "ours.jsonl"))
    (row,) = json_items(tmp_path / "ours.jsonl")
    assert (row["weight"], len(row["context"])) == (0.25, 2)
    (ours,) = next(read_format("visrl", str(tmp_path / "ours.jsonl"), Reading())).records
    convert("visrl", "sharegpt", [str(tmp_path / "ours.jsonl")], str(tmp_path / "back.jsonl"))
    (back,) = next(read_format("sharegpt", str(tmp_path / "back.jsonl"), Reading())).records
    assert ours == back
    assert next(iter(json_items(tmp_path / "back.jsonl")))["conversations"] == RANKED["conversations"]


def test_a_conversation_is_the_prompt_in_training(tmp_path):
    from visrl.models.load import load_encoder
    from visrl.models.tiny import CHECKPOINT
    from visrl.train.rows import preference_row

    encoder = load_encoder(CHECKPOINT)

    Image.new("RGB", (64, 64), (9, 9, 200)).save(tmp_path / "a.png")
    row = preference_row(encoder, record_of(tmp_path, RANKED | {"system": "Be brief."}), tmp_path)
    assert [message.role for message in row.conversation.messages] == ["system", "user", "assistant", "user"]
    assert len(row.conversation.views) == 1
    rendered = encoder.render(row.conversation)
    assert rendered.index("Be brief.") < rendered.index("What hangs there?") < rendered.index("And the red one?")
    encoder.chat_template = encoder.chat_template.replace("messages %}", "messages if message['role'] != 'system' %}")
    with pytest.raises(PromptError, match="leaves out what the system says before the question: 'Be brief"):
        preference_row(encoder, record_of(tmp_path, RANKED | {"system": "Be brief."}), tmp_path)


# --- Entries of dataset_info.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"hf_hub_url": "x/y"}, "it lies elsewhere (hf_hub_url)"),
        ({"columns": {"messages": "m", "sound": "s"}}, "columns has no 'sound'"),
        ({"tags": {"speaker": "s"}}, "tags has no 'speaker'"),
        ({"columns": {"chosen": "a", "rejected": "b"}}, 'not "ranking": true'),
        ({"num_samples": 10}, "give max_samples"),
        ({"formatting": "csv"}, 'formatting must be "alpaca" or "sharegpt"'),
        ({"split": "test"}, "a file has no splits"),
        ({"box_space": "pixels"}, "box_space must be one of"),
        ({"ranking": "yes"}, '"ranking" must be true or false'),
        ({"file_name": 3}, "file_name must name its file"),
        ({"extra": 3}, "'extra' is not understood"),
    ],
)
def test_an_entry_is_honoured_or_refused_where_it_is_used(tmp_path, entry, reason):
    write_lines(tmp_path / "a.jsonl", [{"images": ["a.jpg"], "conversations": told("<image>\nA?", "1")}])
    sets = {
        "bad": {"file_name": "a.jsonl", "formatting": "sharegpt"} | entry,
        "good": {"file_name": "a.jsonl", "formatting": "sharegpt"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(sets))
    with pytest.raises(RecordError, match="'bad'") as error:
        named_samples("bad", tmp_path)
    assert reason in str(error.value)
    assert [sample.answer for sample in named_samples("good", tmp_path)] == ["1"]


def test_sets_of_texts_beside_the_wanted_one_are_named_and_left_out(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"images": ["a.jpg"], "messages": told("<image>\nA?", "1")}])
    write_lines(tmp_path / "b.jsonl", [{"instruction": "Who are you?", "input": "", "output": "a model"}] * 3)
    sets = {
        "pictures": {"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}},
        "identity": {"file_name": "b.jsonl"},
        "far": {"hf_hub_url": "x/y"},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(sets))
    with pytest.warns(VisrlWarning, match="identity is left out: none of its 3 rows has a picture"):
        assert len(named_samples("pictures,identity", tmp_path)) == 1
    with pytest.raises(RecordError, match="3 of 3 rows cannot be read; row 1: the row has no picture"):
        named_samples("identity", tmp_path)


def test_what_check_calls_good_training_takes_and_says_the_same_of_the_rest(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [RANKED, RANKED | {"conversations": told("<image>A?", "1")}]
    write_lines(tmp_path / "rl.jsonl", rows)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    entry = {"file_name": "rl.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"set": entry}))
    arguments = ["data", "check", "--from", "sharegpt", "--images", str(tmp_path), "--dataset", "set", str(tmp_path)]
    text = CliRunner().invoke(app, arguments).stdout
    reason = "two replies answer a question: the last turn must be the user's, it is the assistant's"
    assert "2 rows: 1 good, 1 bad" in text
    assert reason in text
    with pytest.warns(VisrlWarning, match=f"1 of 2 rows cannot be read; row 2: {reason}"):
        assert len(named_preferences("set", tmp_path)) == 1


def test_check_looks_at_every_picture_of_a_row(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    raw = {"images": ["a.png", "b.png"], "messages": said("<image>\nA?", "1", "<image>\nB?", "2")}
    path = write_lines(tmp_path / "a.jsonl", [raw])
    text = CliRunner().invoke(app, ["data", "check", "--from", "sharegpt", "--images", str(tmp_path), path]).stdout
    assert "2 pictures, 1 missing" in text


def test_a_copy_of_an_alpaca_set_is_described_as_one(tmp_path):
    rows_of(tmp_path, {"instruction": "<image>A?", "output": "1", "images": ["a.jpg"]}, entry={})
    convert("sharegpt", "sharegpt", [str(tmp_path / "rows.jsonl")], str(tmp_path / "copy.jsonl"))
    assert [sample.answer for sample in named_samples("copy", tmp_path)] == ["1"]


def test_an_entry_that_names_no_columns_leaves_rows_to_the_names_in_common_use(tmp_path):
    sets = {"formatting": "sharegpt"}
    row = {"images": ["a.jpg"], "messages": said("<image>A?", "1")}
    assert record_of(tmp_path, row, entry=sets).answer == "1"
    convert("sharegpt", "sharegpt", [str(tmp_path / "rows.jsonl")], str(tmp_path / "copy.jsonl"))
    assert [sample.question for sample in named_samples("copy", tmp_path)] == ["A?"]
    pair = {"images": ["a.jpg"], "instruction": "A?", "chosen": "1", "rejected": "2"}
    preference = record_of(tmp_path, pair, entry={"ranking": True})
    assert (preference.prompt, preference.chosen, preference.rejected) == ("<image>\nA?", "1", "2")
    (row,) = rows_of(tmp_path, pair | {"rejected": "1"}, entry={"ranking": True})
    assert row.notes == ("the chosen and the rejected reply are the same: there is nothing to prefer",)


# --- Hints ------------------------------------------------------------------------------------------------------------


def test_a_hint_names_a_format_that_reads_the_row(tmp_path):
    rows = [
        {"id": "1", "image": "a.jpg", "conversations": told("<image>\nA?", "1")},  # LLaVA's, with the keys of viscot
        {"image": "a.jpg", "conversations": "broken"},
        {"img_path": "a.jpg", "expression": "it", "bbox": [1, 1, 2, 2], "width": 9, "height": 9},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    text = CliRunner().invoke(app, ["data", "check", "--from", "viscot", path]).stdout
    assert "1 of them have the keys of sharegpt: read them with --from sharegpt" in text
    assert "1 of them have the keys of viscot-detection: read them with --from viscot-detection" in text
    assert text.count("of them have the keys") == 2
    result = CliRunner().invoke(app, ["data", "check", "--from", "llava", path])
    assert "rows of llava are read with --from sharegpt" in result.stderr


def test_rows_of_llava_do_not_pass_for_rows_of_visual_cot(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a.jpg", "conversations": told("<image>\nA?", "1")}])
    summary = convert("sharegpt", "viscot", [path], str(tmp_path / "b.json"))
    assert summary.bad.total() == 1


# --- To the letter ----------------------------------------------------------------------------------------------------


def test_a_question_is_kept_to_the_letter(tmp_path):
    turns = [f"<image>\n{question} {SENTENCE}" for question in ("Who is it? ", "Who?\n")]
    raw = [{"images": ["a.jpg"], "conversations": told(turn, "[0.1, 0.1, 0.3, 0.3]")} for turn in turns]
    assert [row.records[0].question for row in rows_of(tmp_path, *raw, box_space="image")] == ["Who is it? ", "Who?\n"]


def test_pictures_of_a_named_set_are_looked_for_beside_it(tmp_path, monkeypatch):
    (tmp_path / "data" / "shown").mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(tmp_path / "data" / "shown" / "a.png")
    rows = [grounding([[20, 10, 60, 50]]) | {"images": ["shown/a.png"]}, RANKED | {"images": ["shown/a.png"]}]
    sets = {}
    for name, row in zip(("sft", "rl"), rows, strict=True):
        write_lines(tmp_path / "data" / f"{name}.jsonl", [row])
        columns = {"messages": "messages" if name == "sft" else "conversations"}
        sets[name] = {"file_name": f"{name}.jsonl", "formatting": "sharegpt", "columns": columns}
    sets["rl"] |= {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    sets["sft"]["tags"] = tags
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(sets))
    monkeypatch.chdir(tmp_path)
    (sample,) = named_samples("sft", "data")
    assert (sample.image, sample.box.x1) == ("data/shown/a.png", 0.3)
    assert named_preferences("rl", "data")[0].images[0].ref == "data/shown/a.png"
    assert named_samples("sft", "data", tmp_path / "data")[0].image == "shown/a.png"


def test_entries_of_any_form_are_read_or_refused_in_a_sentence(tmp_path):
    rng = random.Random(5)
    write_lines(tmp_path / "rows.jsonl", [RANKED, {"image": "a.jpg", "conversations": told("<image>A?", "1")}])
    strange: list[Any] = [
        None,
        True,
        0,
        "",
        "x",
        "\0",
        "rows.jsonl",
        [],
        {},
        ["messages"],
        {"messages": ""},
        {"a": 1},
        1e9,
    ]
    keys = ["file_name", "formatting", "ranking", "columns", "tags", "box_space", "split", "subset", "num_samples"]
    good = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "conversations"}, "tags": {}}
    refused = 0
    for _ in range(600):
        entry = dict(good)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(keys)
            inner = rng.choice(["messages", "images", "prompt", "chosen", "kto_tag", "role_tag", "user_tag"])
            nested = key in ("columns", "tags") and rng.random() < 0.7
            entry[key] = {inner: rng.choice(strange)} if nested else rng.choice(strange)
        (tmp_path / "dataset_info.json").write_text(json.dumps({"set": entry}))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VisrlWarning)
                named_samples("set", tmp_path)
        except RecordError:
            refused += 1
    assert refused > 100


def test_a_dataset_info_that_cannot_be_added_to_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "dataset_info.json").write_text("[]")
    path = write_lines(tmp_path / "own.jsonl", [{"image": "a.jpg", "question": "?", "answer": "!"}])
    arguments = ["data", "convert", "--from", "visrl", "--to", "sharegpt", path, str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "must hold an object of data sets by name" in result.stderr
    assert not (tmp_path / "out.json").exists()
