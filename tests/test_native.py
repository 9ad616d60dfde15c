"""Our own JSONL has one typed reader, whatever verb asks; what is written can be read back."""

import json
import random
import re
from contextlib import suppress

import pytest

from visrl.box import Box
from visrl.data.check import check
from visrl.data.convert import convert
from visrl.data.formats import Reading
from visrl.data.info import read_info
from visrl.data.native import from_json, parse_visrl, read_records, visrl_row
from visrl.data.rows import json_items, parsed_row, read_rows
from visrl.data.sources import read_preferences, read_samples
from visrl.evaluate.predictions import read_predictions
from visrl.records import (
    Journal,
    Preference,
    RecordError,
    Sample,
    Trajectory,
    TrajectoryLook,
    belongs_to,
    json_line,
    read_jsonl,
    write_text,
)

SHORT = {"image": "a.png", "question": "What?", "answer": "that"}
PREFERENCE = {
    "id": "a", "step": "box", "prompt": "<image>\nWhere?", "images": ["a.png"], "chosen": "[0]", "rejected": "[1]",
}  # fmt: skip


def written(path, rows, encoding="utf-8"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return str(path)


def reason(row):
    return parsed_row(row, 1, parse_visrl).reason


def test_the_short_form_is_read_by_what_trains_and_evaluates(tmp_path):
    rows = [SHORT, SHORT | {"bbox": [12, 20, 96, 45], "width": 640, "height": 480}, SHORT | {"colour": "red"}]
    first, second, third = read_samples(written(tmp_path / "mine.jsonl", rows))
    assert (first.id, first.answer, first.raw) == ("row-1", "that", None)
    assert second.box == Box(12 / 640, 20 / 480, 96 / 640, 45 / 480)
    assert second.size == (640, 480)
    assert third.raw == rows[2]  # keys of one's own are kept


def test_keys_beside_a_raw_row_are_put_to_it():
    raw = SHORT | {"raw": {"conversations": []}, "colour": "red", "split": "val"}
    assert parsed_row(raw, 1, parse_visrl).records[0].raw == {"conversations": [], "colour": "red"}


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (-3, "-3"), (2.5, "2.5"), (7.0, "7.0"), (10**30, "1" + "0" * 30), ("7", "7")]
)
def test_a_number_stands_for_its_text(value, text):
    row = parsed_row(SHORT | {"answer": value, "question": value, "source": value}, 1, parse_visrl)
    (sample,) = row.records
    assert (sample.answer, sample.question, sample.source) == (text, text, text)
    (preference,) = parsed_row(PREFERENCE | {"chosen": value}, 1, parse_visrl).records
    assert preference.chosen == text


@pytest.mark.parametrize("value", [None, True, False, [], ["a"], {}, {"a": 1}, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["question", "answer", "source"])
def test_what_is_no_text_is_refused_by_name(key, value):
    assert repr(key) in reason(SHORT | {key: value})
    assert json.dumps(value) in reason(SHORT | {key: value})


def test_a_missing_or_null_key_is_named():
    assert reason({"question": "What?"}) == "'image' must be a string, it is missing"
    assert reason(SHORT | {"image": None}) == "'image' must be a string, it is null"
    assert reason({"image": "a.png"}) == "'question' is missing"
    assert reason({key: value for key, value in PREFERENCE.items() if key != "rejected"}) == "'rejected' is missing"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a", "a"), (7, "7"), (0, "0"), (1.5, "1.5"), (True, "true"), (None, "row-4"), ([1, "b"], '[1, "b"]'), ({}, "{}")],
)
def test_an_id_may_be_any_json_value(name, text):
    assert parse_visrl(SHORT | {"id": name}, 4)[0].id == text
    assert parse_visrl(PREFERENCE | {"id": name}, 4)[0].id == text


@pytest.mark.parametrize("question", ["", " \n", "<image>", "<image>\n "])
def test_a_row_without_a_question_is_refused(question):
    assert "'question' is empty" in reason(SHORT | {"question": question})


def test_what_a_good_row_holds_for_nothing_is_counted(tmp_path):
    own = [SHORT | {"bboxes": [[1, 2, 3, 4]]}, SHORT | {"bboxes": [[1, 2, 3, 4]], "box": [0, 0, 1, 1]}, SHORT]
    same = PREFERENCE | {"rejected": PREFERENCE["chosen"]}
    report = check("visrl", [written(tmp_path / "a.jsonl", [*own, same, PREFERENCE])], Reading())
    assert report.good == 5
    assert report.notes == {
        "'bboxes' is not read: a box is given as 'box' or 'bbox'": 1,
        "the chosen and the rejected reply are the same: there is nothing to prefer": 1,
    }


@pytest.mark.parametrize(
    ("question", "read"), [("<image>\nWhat?", "What?"), ("What?\n<image>", "What?"), ("  What? ", "  What? ")]
)
def test_the_mark_of_the_picture_is_no_part_of_a_question(question, read):
    assert parse_visrl(SHORT | {"question": question}, 1)[0].question == read
    assert "2 <image> marks" in reason(SHORT | {"question": "<image>What?<image>"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": []},
        {"images": ["a.png", "b.png"]},
        {"images": [{"ref": "a.png", "crop": [0, 0, 0.5, 0.5]}]},
        {"images": ["a.png", {"ref": "b.png", "crop": [0, 0, 0.5, 0.5]}], "prompt": "<image>\n<image>"},
        {"prompt": "no mark"},
        {"step": "both"},
        {"weight": None},
        {"note": "mine"},
    ],
)
def test_a_preference_that_cannot_be_shown_as_it_says_is_refused_when_it_is_read(wrong):
    assert reason(PREFERENCE | wrong)


def test_a_byte_order_mark_is_passed_by_wherever_text_is_read(tmp_path):
    samples = written(tmp_path / "s.jsonl", [SHORT], "utf-8-sig")
    assert len(read_samples(samples)) == 1
    assert check("visrl", [samples], Reading()).good == 1
    assert read_preferences(written(tmp_path / "p.jsonl", [PREFERENCE], "utf-8-sig"))[0].id == "a"
    assert list(read_jsonl(written(tmp_path / "any.jsonl", [{"a": 1}], "utf-8-sig"))) == [{"a": 1}]
    for text in ('{"text": "x"}\n', '\n [{"text": "x"}]'):
        (tmp_path / "answers.json").write_text(text, encoding="utf-8-sig")
        assert read_predictions(tmp_path / "answers.json") == [{"text": "x"}]
    info = {"mine": {"file_name": "m.json", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8-sig")
    assert list(read_info(tmp_path)) == ["mine"]


def test_all_readers_call_the_same_rows_good(tmp_path):
    """`check`, `convert` and what trains take and refuse the same rows, each by itself."""
    rows = [SHORT, SHORT | {"id": [1]}, SHORT | {"answer": None}, SHORT | {"box": [0, 0, 2, 2]}, PREFERENCE, 5]
    for number, row in enumerate(rows):
        path = written(tmp_path / f"{number}.jsonl", [row])
        good = check("visrl", [path], Reading()).good == 1
        assert good == (convert("visrl", "visrl", [path], f"{path}.out").bad.total() == 0)
        read = read_preferences if row is PREFERENCE else read_samples
        if good:
            assert len(read(path)) == 1
        else:
            with pytest.raises(RecordError, match=r"row 1: not a Sample"):
                read(path)


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(tmp_path):
    path = written(tmp_path / "mine.jsonl", [SHORT, SHORT | {"answer": None}, PREFERENCE, {"image": 5}])
    with pytest.raises(RecordError, match=r"mine\.jsonl, row 2: not a Sample: 'answer'.*2 more .*data check"):
        read_samples(path)
    with pytest.raises(RecordError, match=r"row 1: not a Preference: it is a Sample"):
        read_preferences(written(tmp_path / "one.jsonl", [SHORT]))


def test_rows_of_one_id_are_told_apart_by_where_they_stand(tmp_path):
    rows = [SHORT | {"id": name, "question": str(n)} for n, name in enumerate(["a", "b", "a", "a", 7, "7"])]
    samples = read_samples(written(tmp_path / "mine.jsonl", rows))
    assert [sample.place for sample in samples] == [("a",), ("b",), ("a", 1), ("a", 2), ("7",), ("7", 1)]
    assert "repeat" not in visrl_row(samples[2])


def test_a_step_of_an_item_follows_it_with_its_id_and_picture():
    box = parse_visrl(PREFERENCE, 1)[0]
    answer = parse_visrl(PREFERENCE | {"step": "answer"}, 2)[0]
    elsewhere = parse_visrl(PREFERENCE | {"step": "answer", "images": ["b.png"]}, 3)[0]
    assert isinstance(box, Preference)
    assert isinstance(answer, Preference)
    assert isinstance(elsewhere, Preference)
    assert belongs_to([box], answer)
    assert not belongs_to([], box)
    assert not belongs_to([box], box)
    assert not belongs_to([box, answer], answer)
    assert not belongs_to([box], elsewhere)
    crops = [{"ref": "a.png", "crop": [0, 0, 0.5, 0.1 * n]} for n in (5, 6)]
    later = parse_visrl(PREFERENCE | {"images": ["a.png", *crops], "prompt": "<image>\nWhat?" + "\n<image>" * 2}, 4)[0]
    assert belongs_to([box, answer], later)
    assert not belongs_to([box, later], later)


# --- What is written can be read back ---------------------------------------------------------------------------------

HALF = "half \ud83d of a pair"


def test_half_a_character_is_written_and_comes_back(tmp_path):
    tried = Trajectory("a", 0, 0, HALF, None, "sampled", None, "x", 1, f"box: none in {HALF}", repeat=2)
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.append([tried, {"row": HALF, "end": "\u2028\x85"}])
    assert next(read_records(Trajectory, tmp_path / "t.jsonl"), None) == tried
    assert list(read_jsonl(tmp_path / "t.jsonl"))[1] == {"row": HALF, "end": "\u2028\x85"}
    write_text(tmp_path / "scores.json", json.dumps({"said": HALF}, ensure_ascii=False))
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")) == {"said": HALF}


@pytest.mark.parametrize("line", ["1" * 5000, "[" * 100_000, '{"a": 1'])
def test_a_line_that_json_cannot_hold_is_named_and_no_traceback(tmp_path, line):
    (tmp_path / "j.jsonl").write_text("{}\n" + line + "\n")
    with pytest.raises(RecordError, match=r"j\.jsonl, line 2"):
        list(read_jsonl(tmp_path / "j.jsonl"))
    assert [row.fault for row in read_rows(tmp_path / "j.jsonl", parse_visrl)] == ["unparseable"] * 2


def test_a_record_of_ours_with_a_value_of_another_type_is_refused(tmp_path):
    good = json.loads(json_line(Trajectory("a", 0, 0, "", None, "sampled", None, "x", 1)))
    assert from_json(Trajectory, good).repeat == 0  # which is not written
    for wrong in ({"sample_id": 5}, {"round": "0"}, {"error": 1}, {"box": "abc"}, {"seed": True}, {"repeat": None}):
        with pytest.raises(RecordError, match="not a Trajectory"):
            from_json(Trajectory, good | wrong)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"looks": [["[0]", [0, 0, 1, 1]]]}, "'looks' must hold objects of text and box"),
        ({"looks": [{"text": 7, "box": [0, 0, 1, 1]}]}, "the text of a look cannot be 7"),
        ({"looks": [{"text": "[0]", "box": [0, 0, 1]}]}, "box"),
        ({"end": "tired"}, '\'end\' cannot be "tired"; it is one of "answered"'),
        ({"end": None}, "there is no 'end'"),
        ({"end": "tokens"}, "'answer' and 'end' do not go together: it ended 'tokens'"),
        ({"answer": None}, "'answer' and 'end' do not go together"),
        ({"answers": ["7", "8"]}, "each answer is a trajectory of its own"),
        ({"path": [0.5]}, "'path' cannot hold [0.5]"),
        ({"path": [0, 1]}, "'path' must hold a place for the turn after each look"),
    ],
)
def test_several_looks_that_do_not_go_together_are_refused(wrong, why):
    looks = (TrajectoryLook("[0]", Box(0, 0, 1, 1)),)
    tried = Trajectory(
        "a", 0, 0, "[0]", Box(0, 0, 1, 1), "sampled", "7", "x", 1, looks=looks, end="answered", path=(1,)
    )
    good = json.loads(json_line(tried))
    assert from_json(Trajectory, good) == tried
    with pytest.raises(RecordError, match=f"not a Trajectory: .*{re.escape(why)}"):
        from_json(Trajectory, good | wrong)
    for key in good:  # and any value at all in any place: a record or a sentence
        for value in VALUES:
            with suppress(RecordError):
                from_json(Trajectory, good | {key: value})


# --- Any row at all ---------------------------------------------------------------------------------------------------

VALUES = [
    None, True, False, 0, -1, 7, 2.5, 1e300, float("nan"), float("inf"), "", "a", HALF, "<image>", "scene:train/0",
    "x" * 300, [], {}, [0.1, 0.2, 0.3, 0.4], [4, 3, 2, 1], [0, 0, 0, 0], [1, 2, 30, 40], [640, 480], [[1]], [None] * 4,
    {"ref": "a.png"}, {"ref": "a.png", "crop": [0, 0, 1, 1]}, {"ref": 5}, ["a.png"], ["a.png", {"ref": "a.png"}],
    "box", "answer", 10**40, "\x00", "\u202e", [[[[[[]]]]]],
]  # fmt: skip
KEYS = [
    "id", "image", "question", "answer", "box", "bbox", "width", "height", "size", "source", "raw", "split", "repeat",
    "chosen", "rejected", "prompt", "images", "step", "weight", "mine", "", "é",
]  # fmt: skip


def test_any_row_is_a_record_or_a_sentence_and_a_record_can_be_written_and_read_again(tmp_path):
    chance = random.Random(12)
    good = 0
    for number in range(6000):
        base = dict(chance.choice([SHORT, PREFERENCE, {}]))
        row = base | {chance.choice(KEYS): chance.choice(VALUES) for _ in range(chance.randrange(4))}
        read = parsed_row(row, number, parse_visrl)
        assert bool(read.records) != bool(read.reason)
        for record in read.records:
            good += 1
            assert isinstance(record, (Sample, Preference))
            texts = [record.id] + ([record.question, record.answer] if isinstance(record, Sample) else [record.chosen])
            assert all(type(text) is str and text.encode() is not None for text in texts)
            line = json_line(visrl_row(record))
            (again,) = parse_visrl(json.loads(line), number)
            assert json_line(visrl_row(again)) == line
    assert 500 < good < 5500


def test_a_long_file_is_read_as_a_stream(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"image": "{n % 50}.png", "question": "q{n}", "answer": {n}}}\n' for n in range(20_000)))
    samples = read_samples(str(path))
    assert (len(samples), samples[-1].answer) == (20_000, "19999")
    stream = json_items(path)
    assert next(stream)["answer"] == 0  # before the rest is read
