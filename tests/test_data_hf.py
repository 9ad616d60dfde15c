"""Parquet files and folders that `datasets` saved: pictures however deep, values that JSON has not, several answers."""

from __future__ import annotations

import datetime
import decimal
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_rows import write_lines
from PIL import Image
from typer.testing import CliRunner

from visrl.cli import app
from visrl.data.convert import convert
from visrl.data.formats import Reading, read_format
from visrl.data.rows import json_items
from visrl.data.sizes import Sizes
from visrl.data.sources import hash_source, named_samples, read_preferences, read_samples
from visrl.images import open_image
from visrl.records import MAX_DEPTH, RecordError, VisrlWarning


def png(red: int = 9, size: tuple[int, int] = (30, 40)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (red, 9, 200)).save(stream, "PNG")
    return stream.getvalue()


def picture(red: int = 9, size: tuple[int, int] = (30, 40)) -> dict[str, Any]:
    return {"bytes": png(red, size), "path": None}


def parquet(folder: Path, **columns: list[Any]) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def rows(path: Path, **reading: Any):
    return list(read_format("hf", str(path), Reading(**reading)))


def saved(folder: Path, features: Any, **columns: list[Any]) -> Path:
    import datasets

    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder / "saved")
    return folder / "saved"


def test_a_list_of_one_picture_is_the_picture(tmp_path):
    import datasets

    texts = {"question": datasets.Value("string"), "answer": datasets.Value("string")}
    columns = {"images": [[picture(), picture()], [picture()], []], "question": ["A?"] * 3, "answer": ["1"] * 3}
    path = saved(tmp_path, {"images": datasets.List(datasets.Image()), **texts}, **columns)
    found = rows(path, columns={"image": "images"})
    assert [row.fault for row in found] == ["several_pictures", "", "no_picture"]
    assert found[0].reason == "'images' holds 2 pictures; a sample is about one"
    assert open_image(found[1].records[0].image).size == (30, 40)
    assert [row.fault for row in rows(path)] == [row.fault for row in found]  # the usual name need not be given


def test_pictures_deep_in_a_row_are_not_decoded(tmp_path):
    import datasets

    features = {
        "image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string"),
        "turns": datasets.List({"shown": datasets.Image(), "text": datasets.Value("string")}),
    }  # fmt: skip
    columns = {
        "image": [picture()],
        "question": ["A?"],
        "answer": ["1"],
        "turns": [[{"shown": picture(), "text": "x"}]],
    }
    (row,) = rows(saved(tmp_path, features, **columns))
    assert row.records[0].answer == "1"
    assert row.notes == ("the column 'turns' holds pictures of its own and is passed by",)


STRANGE = {
    "taken": [datetime.datetime(2026, 1, 2, 3, 4, 5), None],
    "day": [datetime.date(2026, 1, 2), None],
    "price": [decimal.Decimal("2.40"), None],
    "bytes": [b"\x00\xff", None],
    "detail": [{"when": datetime.date(2026, 1, 2), "many": [decimal.Decimal("1.5")]}, None],
}


def test_values_that_json_has_not_are_listed_and_kept_as_text(tmp_path):
    path = parquet(tmp_path, image=["a.jpg", "a.jpg"], question=["A?", None], answer=["1", "2"], **STRANGE)
    out = tmp_path / "out.jsonl"
    summary = convert("hf", "visrl", [str(path)], str(out))
    assert summary.bad == {"unparseable": 1}
    (good,) = json_items(out)
    assert good["raw"]["taken"] == "2026-01-02T03:04:05"
    assert good["raw"]["price"] == "2.40"
    assert good["raw"]["detail"] == {"when": "2026-01-02", "many": ["1.5"]}
    (bad,) = json_items(f"{out}.bad.jsonl")
    assert (bad["row"], "'question'" in bad["reason"]) == (2, True)


def test_a_decimal_number_is_an_answer(tmp_path):
    path = parquet(tmp_path, image=["a.jpg"], question=["What does it cost?"], answer=[decimal.Decimal("2.40")])
    assert rows(path)[0].records[0].answer == "2.40"


@pytest.mark.parametrize(
    ("answers", "taken"),
    [
        (["two", "2", "2"], "2"),
        (["two", "2"], "two"),
        ([{"answer": "no", "confidence": "yes"}, {"answer": "no", "confidence": "no"}], "no"),
        ({"answer": ["red", "blue", "blue"], "id": [1, 2, 3]}, "blue"),
    ],
)
def test_of_several_answers_the_most_frequent_is_taken_and_all_are_kept(tmp_path, answers, taken):
    path = parquet(tmp_path, image=["a.jpg"], question=["A?"], answers=[answers])
    (row,) = rows(path)
    sample = row.records[0]
    assert sample.answer == taken
    note = "the most frequent of several answers is taken, the first of equally frequent ones"
    assert row.notes == (() if taken == "no" else (note,))  # where all are the same, nothing was chosen
    assert sample.raw == {"answers": answers}


@pytest.mark.parametrize("answers", [[], [None], {"text": "x"}, [{"reply": "x"}]])
def test_answers_of_another_form_are_bad_rows(tmp_path, answers):
    path = parquet(tmp_path, image=["a.jpg"], question=["A?"], answers=[answers])
    assert rows(path)[0].fault == "unparseable"


def test_a_box_in_pixels_is_read_with_the_size_of_its_picture(tmp_path):
    box = [[3, 4, 15, 20]]
    path = parquet(tmp_path, image=[picture()], question=["A?"], answer=["1"], bbox=box)
    assert rows(path)[0].records[0].box.as_list() == pytest.approx([0.1, 0.1, 0.5, 0.5])
    (tmp_path / "a.png").write_bytes(png())
    path = parquet(tmp_path, image=["a.png"], question=["A?"], answer=["1"], bbox=box)
    assert rows(path)[0].fault == "no_size"
    assert rows(path, sizes=Sizes(images=tmp_path))[0].records[0].size == (30, 40)
    own = write_lines(tmp_path / "own.jsonl", [{"image": "a.png", "question": "A?", "answer": "1", "bbox": box[0]}])
    assert read_samples(own, image_root=str(tmp_path))[0].box.x1 == 0.5
    with pytest.raises(RecordError, match="is not known: no picture"):
        read_samples(own)


def test_several_answers_of_our_own_rows_are_voted_on_and_kept(tmp_path):
    answers = [["two", "2", "2"], [{"answer": "x"}, {"answer": "x"}], [None]]
    raw = [{"image": "a.jpg", "question": "A?", "answers": several} for several in answers]
    path = write_lines(tmp_path / "own.jsonl", [*raw, {"image": "a.jpg", "question": "A?", "answer": ["yes", "no"]}])
    found = list(read_format("visrl", path, Reading()))
    assert [row.records[0].answer if row.records else row.fault for row in found] == ["2", "x", "unparseable", "yes"]
    assert [bool(row.notes) for row in found] == [True, False, False, True]
    assert [row.records[0].raw["answers"] for row in found if row.records] == [*answers[:2], ["yes", "no"]]
    with pytest.warns(VisrlWarning, match="in 1 row the most frequent of several answers is taken"):
        (sample,) = read_samples(write_lines(tmp_path / "one.jsonl", raw[:1]))
    assert sample.answer == "2"


def test_a_converted_set_names_files_and_holds_no_picture_itself(tmp_path):
    path = parquet(
        tmp_path, image=[picture(1), picture(2), picture(1)], question=["A?", "B?", None], answer=["1", "2", "3"]
    )
    out = tmp_path / "made" / "out.jsonl"
    arguments = ["data", "convert", "--from", "hf", "--to", "visrl", str(path), str(out)]
    text = CliRunner().invoke(app, arguments).stdout
    assert f"wrote 2 pictures to {out.parent / 'out_pictures'}" in text
    assert "base64" not in out.read_text() + Path(f"{out}.bad.jsonl").read_text()
    assert [open_image(row["image"], out.parent).getpixel((0, 0))[0] for row in json_items(out)] == [1, 2]
    before = {file: file.read_bytes() for file in out.parent.rglob("*") if file.is_file()}
    CliRunner().invoke(app, arguments)
    assert {file: file.read_bytes() for file in out.parent.rglob("*") if file.is_file()} == before


def test_a_conversion_that_fails_leaves_no_picture(tmp_path):
    path = parquet(tmp_path, image=[picture(1)], question=["A?"], answer=["1"])
    with pytest.raises(RecordError, match="no data at"):
        convert("hf", "visrl", [str(path), str(tmp_path / "nowhere.parquet")], str(tmp_path / "out.jsonl"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.parquet"]


def test_a_parquet_file_is_named_where_a_data_set_is(tmp_path):
    path = str(parquet(tmp_path, image=[picture()] * 2, question=["A?", None], answer=["1", "2"]))
    with pytest.warns(VisrlWarning, match="1 of 2 rows cannot be read; row 2: 'question'"):
        (sample,) = read_samples(path)
    assert open_image(sample.image).size == (30, 40)
    assert hash_source(path) not in (path, hash_source(str(tmp_path / "other.parquet")))
    with pytest.raises(RecordError, match="is parquet, which holds samples"):
        read_preferences(path)


def test_conversations_in_parquet_are_read_by_their_entry(tmp_path):
    turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "1"}]
    path = parquet(tmp_path, images=[[picture()]], conversations=[turns])
    entry = {"file_name": path.name, "formatting": "sharegpt", "columns": {"messages": "conversations"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"set": entry}))
    (sample,) = named_samples("set", tmp_path)
    assert (sample.question, open_image(sample.image).size) == ("A?", (30, 40))
    with pytest.raises(
        RecordError, match="with 'conversations' it holds conversations: read them with --from sharegpt"
    ):
        rows(path)
    (row,) = read_format("sharegpt", str(path), Reading())
    assert row.records[0].question == "A?"
    convert("sharegpt", "visrl", [str(path)], str(tmp_path / "out.jsonl"))
    assert "base64" not in (tmp_path / "out.jsonl").read_text()


def test_a_damaged_parquet_file_is_one_sentence(tmp_path):
    path = parquet(tmp_path, image=["a.jpg"] * 500, question=["A?"] * 500, answer=[str(n) for n in range(500)])
    whole = path.read_bytes()
    for damaged in (whole[:100], b"PAR1" + b"\xff" * 50 + b"PAR1", whole[:300] + b"\xff" * 200 + whole[500:], b""):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"rows\.parquet"):
            rows(path)


def test_a_raw_column_that_is_no_json_is_a_bad_row(tmp_path):
    texts = ["{", "[" * 5000, '{"a": 1}', "[" * MAX_DEPTH + "]" * MAX_DEPTH]
    path = parquet(tmp_path, image=["a.jpg"] * 4, question=["A?"] * 4, answer=["1"] * 4, raw=texts)
    assert [row.fault for row in rows(path)] == ["unparseable", "unparseable", "", ""]


# --- What is not parquet, but named the same way ------------------------------------------------------------------


def test_a_file_of_another_format_is_told_how_it_is_read(tmp_path):
    turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "1"}]
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a.jpg", "conversations": turns}])
    with pytest.raises(RecordError, match="keys of sharegpt: `visrl data convert --from sharegpt --to visrl"):
        read_samples(path)


def test_a_list_of_names_says_which_there_is_not(tmp_path):
    write_lines(tmp_path / "a.jsonl", [])
    (tmp_path / "dataset_info.json").write_text('{"demo": {"file_name": "a.jsonl"}, "other": {"file_name": "a.jsonl"}}')
    with pytest.raises(RecordError, match="has no data set 'dem'; it has: demo, other"):
        read_samples("other,dem", dataset_dir=str(tmp_path))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(RecordError, match=r"dataset_info\.json is not JSON"):
        read_samples("demo", dataset_dir=str(tmp_path))


@pytest.mark.parametrize("depth", [MAX_DEPTH - 2, MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_deep_nesting_is_a_bad_row_and_the_rest_is_read(tmp_path, depth, suffix):
    deep = '{"image": "a.jpg", "question": "A?", "mine": ' + "[" * depth + '"]"' + "]" * depth + "}"
    good = '{"image": "a.jpg", "question": "B?", "answer": "1"}'
    path = tmp_path / f"a{suffix}"
    path.write_text(f"[{good},\n{deep},\n{good}]" if suffix == ".json" else f"{good}\n{deep}\n{good}\n")
    out = tmp_path / "b.jsonl"
    summary = convert("visrl", "rl-pool", [str(path)], str(out))
    assert summary.bad == ({} if depth < MAX_DEPTH else {"unparseable": 1})
    assert summary.written[str(out)] + summary.bad.total() == 3
    if summary.bad:
        (row,) = [row for row in read_format("visrl", str(path), Reading()) if row.fault]
        assert "nested too deeply" in row.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "hf", "--columns", "answer=labl"], "has no column 'labl'; it has image, question, answer"),
        (["--from", "hf", "--columns", "imag=image"], "--columns has no 'imag' of ours"),
        (["--from", "visrl", "--columns", "image=img"], "--columns is for --from hf; it says nothing of visrl"),
        (["--from", "hf", "--dataset", "x"], "--dataset is for --from sharegpt"),
        (["--from", "viscot", "--box-space", "image"], "--box-space is for --from sharegpt"),
        (["--from", "sharegpt", "--split", "test"], "--split is for --from hf"),
    ],
)
def test_an_option_is_honoured_or_refused(tmp_path, options, message):
    path = parquet(tmp_path, image=["a.jpg"], question=["A?"], answer=["1"])
    result = CliRunner().invoke(app, ["data", "check", *options, str(path)])
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_split_is_named(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"image": ["a.jpg"], "question": ["A?"], "answer": ["1"]})
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    check = ["data", "check", "--from", "hf", str(tmp_path / "saved")]
    assert "--split` names one" in CliRunner().invoke(app, check).stderr
    assert "1 rows: 1 good" in CliRunner().invoke(app, [*check, "--split", "test"]).stdout
