"""Every format read, written back and turned into the others, over rows made in tests/data_rows.py."""

from __future__ import annotations

import json

import pytest
from data_rows import benchmark, good_boxes, meta, refcoco, viscot, write_lines

from visrl.box import Box, enclosing
from visrl.codecs import CODECS
from visrl.data.convert import Selection, convert, share_of
from visrl.data.formats import FORMATS, SOURCES, Reading, is_own_row, read_format
from visrl.data.rows import RowFault, json_items
from visrl.data.sizes import Sizes
from visrl.records import Preference, RecordError, Sample


def reading(sizes: str | None = None, **more) -> Reading:
    return Reading(Sizes([sizes] if sizes else None), **more)


def records(name: str, path, **more) -> list:
    return [record for row in read_format(name, str(path), reading(**more)) for record in row.records]


def test_every_row_is_read_or_listed_with_its_reason(tmp_path):
    path, sizes, rows = benchmark(tmp_path)
    read = list(read_format("viscot", path, reading(sizes)))
    assert len(read) == len(rows)
    faults = [row.fault for row in read]
    assert faults == [""] * 20 + ["inverted", "inverted", "outside", "outside", "outside", "empty"]
    assert all(row.reason for row in read if row.fault)
    assert [row.fault for row in read_format("viscot-detection", sizes, Reading())] == faults


def test_cutting_off_hides_what_the_detection_file_shows(tmp_path):
    # x1 = 640.2 of 640: the integers and the rounded text are inside.
    case = ((10.0, 10.0, 640.2, 90.0), (640, 480))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([viscot(0, *case)]))
    sizes = write_lines(tmp_path / "meta.jsonl", [meta(0, [[0, 0, 1, 1]], (640, 480))])
    assert [row.fault for row in read_format("viscot", str(path), reading(sizes))] == [""]
    from data_rows import detection

    sizes = write_lines(tmp_path / "detection.jsonl", [detection(0, *case)])
    assert [row.fault for row in read_format("viscot", str(path), reading(sizes))] == ["outside"]


def test_text_pixels_and_fractions_of_a_row_agree(tmp_path):
    path, sizes, _ = benchmark(tmp_path, good=200)
    boxes = [case for case in good_boxes(200)]
    for sample, (corners, size) in zip(records("viscot", path, sizes=sizes), boxes, strict=True):
        assert sample.box.to_pixels(size) == pytest.approx(corners, abs=1e-6)
        text = sample.raw["conversations"][1]["value"]
        read = CODECS["viscot"].parse(text, size, size).to_pixels(size)
        assert read == pytest.approx(corners, abs=0.0005 * max(size) + 1e-6)
        assert sample.size == size


@pytest.mark.parametrize("change", ["text", "pixels", "other question"])
def test_versions_of_one_box_that_disagree_are_a_fault(tmp_path, change):
    case = ((100.0, 100.0, 300.0, 300.0), (640, 480))
    row = viscot(0, *case)
    if change == "text":
        row["conversations"][1]["value"] = "[0.156, 0.156, 0.469, 0.469]"  # of the image, not of the padded square
    elif change == "pixels":
        row["image"][1] = "cot/gqa/0.jpg###[100, 100, 300, 310]"
    else:
        row["image"][1] = "cot/gqa/1.jpg###[100, 100, 300, 300]"
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]))
    sizes = write_lines(tmp_path / "meta.jsonl", [meta(0, [[0, 0, 1, 1]], (640, 480))])
    (read,) = read_format("viscot", str(path), reading(sizes))
    assert read.fault == ("unparseable" if change == "other question" else "disagree")


def test_without_sizes_a_row_is_no_size_and_never_guessed(tmp_path):
    path, _, _ = benchmark(tmp_path)
    faults = [row.fault for row in read_format("viscot", path, Reading())]
    assert faults == ["no_size"] * 20 + ["inverted", "inverted"] + ["no_size"] * 3 + ["empty"]


def test_several_boxes_become_their_enclosing_box(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [meta(0, [[10, 10, 20, 20], [30, 5, 40, 15]], (100, 50), "textcap")])
    (sample,) = records("viscot-meta", path)
    assert sample.box == enclosing([Box(0.1, 0.2, 0.2, 0.4), Box(0.3, 0.1, 0.4, 0.3)]) == Box(0.1, 0.1, 0.4, 0.4)
    assert sample.image == "cot/textvqa/0.jpg"  # textcap's pictures lie with textvqa's


# --- Round trips ----------------------------------------------------------------------------------------------------


def test_visual_cot_goes_back_exactly_bad_rows_included(tmp_path):
    path, sizes, rows = benchmark(tmp_path)
    rows.insert(3, {"not": "a row"})
    rows.append("nor this")
    (tmp_path / "benchmark.json").write_text(json.dumps(rows, indent=1))
    out = tmp_path / "back.json"
    summary = convert("viscot", "viscot", [path], str(out), reading=reading(sizes))
    assert json.loads(out.read_text()) == rows
    listed = list(json_items(f"{out}.bad.jsonl"))
    assert len(listed) == 8 == summary.bad.total()
    assert [item["raw"] for item in listed] == [rows[3], *rows[21:28]]
    assert all(item["reason"] and item["fault"] and item["row"] for item in listed)


def test_visual_cot_through_our_own_format_and_parquet_is_the_same_row(tmp_path):
    path, sizes, rows = benchmark(tmp_path)
    convert("viscot", "visrl", [path], str(tmp_path / "a.jsonl"), reading=reading(sizes))
    convert("visrl", "hf", [str(tmp_path / "a.jsonl")], str(tmp_path / "a.parquet"))
    convert("hf", "viscot", [str(tmp_path / "a.parquet")], str(tmp_path / "b.json"))
    assert json.loads((tmp_path / "b.json").read_text()) == rows[:20]
    assert records("visrl", tmp_path / "a.jsonl") == records("hf", tmp_path / "a.parquet")


def test_visual_cot_to_detection_keeps_boxes_within_a_pixel(tmp_path):
    path, sizes, rows = benchmark(tmp_path, good=100)
    metadata = write_lines(
        tmp_path / "m.jsonl", [meta(i, [[0, 0, 9, 9]], size) for i, (_, size) in enumerate(good_boxes(100))]
    )
    for given in (sizes, metadata):
        out = tmp_path / "out.jsonl"
        convert("viscot", "viscot-detection", [path], str(out), reading=reading(given))
        written = list(json_items(out))
        for row, (corners, size) in zip(written, good_boxes(100), strict=True):
            assert row["bbox"] == pytest.approx(corners, abs=1.0)
            assert (row["width"], row["height"]) == size
            assert set(row) == {"img_path", "expression", "bbox", "height", "width", "question_id", "split"}
        assert len(written) + len(list(json_items(f"{out}.bad.jsonl"))) == len(rows)


@pytest.mark.parametrize("name", ["viscot", "viscot-meta", "viscot-detection", "refcoco"])
def test_a_box_survives_every_pixel_format(tmp_path, name):
    samples = [
        Sample(f"gqa/val/{i}", f"cot/gqa/{i}.jpg", "What?", "this", Box.from_pixels(corners, size), "gqa", None, size)
        for i, (corners, size) in enumerate(good_boxes(50))
    ]
    from visrl.records import write_records

    write_records(tmp_path / "a.jsonl", samples)
    out = tmp_path / f"b.{'json' if name == 'viscot' else 'jsonl'}"
    summary = convert("visrl", name, [str(tmp_path / "a.jsonl")], str(out))
    assert not summary.bad
    sizes = write_lines(tmp_path / "s.jsonl", [meta(i, [[0, 0, 1, 1]], s.size) for i, s in enumerate(samples)])
    for sample, read in zip(samples, records(name, out, sizes=sizes), strict=True):
        assert read.box.to_pixels(sample.size) == pytest.approx(sample.box.to_pixels(sample.size), abs=1.0)
        assert (read.image, read.question) == (sample.image, sample.question)


def test_every_source_reads_what_every_target_writes(tmp_path):
    path, sizes, _ = benchmark(tmp_path)
    convert("viscot", "visrl", [path], str(tmp_path / "0.jsonl"), reading=reading(sizes))
    for source in SOURCES:
        first = tmp_path / f"{source}.{'parquet' if source == 'hf' else 'jsonl'}"
        convert("visrl", source, [str(tmp_path / "0.jsonl")], str(first))
        for target in SOURCES:
            last = tmp_path / f"{source}-{target}.{'parquet' if target == 'hf' else 'jsonl'}"
            summary = convert(source, target, [str(first)], str(last), reading=reading(sizes))
            written, bad = sum(summary.written.values()), summary.bad.total()
            assert written + bad == 20
            if bad:  # formats without answers cannot become formats that need them
                assert set(summary.bad) == {"no_answer"}
                assert source in ("viscot-detection", "refcoco")


def test_own_pictures_and_questions_need_three_keys_only(tmp_path):
    rows = [
        {"image": "a.jpg", "question": "What?", "answer": "this", "note": "mine"},
        {"image": "b.jpg", "question": "What?", "answer": "that", "bbox": [10, 10, 20, 30], "width": 100, "height": 50},
    ]
    path = write_lines(tmp_path / "own.jsonl", rows)
    first, second = records("visrl", path)
    assert (first.id, first.box, first.raw) == ("row-1", None, rows[0])
    assert (second.box, second.size) == (Box(0.1, 0.2, 0.2, 0.6), (100, 50))
    convert("visrl", "visrl", [path], str(tmp_path / "back.jsonl"))
    assert list(json_items(tmp_path / "back.jsonl")) == rows


# --- What training reads --------------------------------------------------------------------------------------------


def test_warm_up_rounds_and_the_pool(tmp_path):
    path, sizes, _ = benchmark(tmp_path)
    for target in ("viscot-sft1", "viscot-sft2", "rl-pool"):
        convert("viscot", target, [path], str(tmp_path / f"{target}.jsonl"), reading=reading(sizes))
    (corners, size), *_ = good_boxes(20)
    box = Box.from_pixels(corners, size)
    first = next(iter(json_items(tmp_path / "viscot-sft1.jsonl")))
    assert first["images"] == ["cot/gqa/0.jpg"]
    assert first["conversations"][0]["value"].startswith("<image>\nWhat is number 0? Please first provide")
    read = CODECS["visrl"].parse(first["conversations"][1]["value"], size, size)
    assert read.as_list() == pytest.approx(box.as_list(), abs=0.00051)  # of the image, not of the padded square
    second = next(iter(json_items(tmp_path / "viscot-sft2.jsonl")))
    assert second["images"] == ["cot/gqa/0.jpg", {"ref": "cot/gqa/0.jpg", "crop": box.as_list()}]
    assert second["conversations"][0]["value"].endswith("answer the question better.\n<image>")
    assert second["conversations"][1]["value"] == "thing 0"
    pool = list(json_items(tmp_path / "rl-pool.jsonl"))
    assert len(pool) == 26  # a bad box is no reason to leave out a question that needs none
    assert set(pool[0]) == {"id", "image", "question", "answer", "source", "size"}
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["viscot-sft1"]["box_space"] == "image"
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == []  # no crop is written anywhere


def test_the_pool_needs_no_sizes(tmp_path):
    path, _, _ = benchmark(tmp_path)
    summary = convert("viscot", "rl-pool", [path], str(tmp_path / "pool.jsonl"))
    assert summary.written == {str(tmp_path / "pool.jsonl"): 26}
    assert not summary.bad


def test_warm_up_in_the_padded_square_reads_back(tmp_path):
    path, sizes, _ = benchmark(tmp_path)
    out = tmp_path / "sft.jsonl"
    convert("viscot", "viscot-sft1", [path], str(out), reading=reading(sizes), box_space="padded_square")
    row = next(iter(json_items(out)))
    assert row["conversations"][1]["value"] == viscot(0, *good_boxes(1)[0])["conversations"][1]["value"]
    for sample, (corners, size) in zip(records("sharegpt", out), good_boxes(20), strict=True):
        assert sample.box.to_pixels(size) == pytest.approx(corners, abs=0.0005 * max(size) + 1e-6)


STEP_ROWS = [
    {
        "id": f"q{number}",
        "images": [f"{number}.jpg"],
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
        "size": [200, 100],
        "chosen_step": {"from": "gpt", "value": "[0.100, 0.200, 0.300, 0.400]"},
        "rejected_step": {"from": "gpt", "value": "[0.500, 0.500, 0.900, 0.900]"},
        "chosen": {"from": "gpt", "value": "right"},
        "rejected": {"from": "gpt", "value": "wrong"},
    }
    for number in range(3)
]


def info(folder, **entries) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries))


def test_rankings_with_steps_are_two_preferences_that_share_the_chosen_crop(tmp_path):
    path = write_lines(tmp_path / "rl.jsonl", STEP_ROWS)
    box, answer = records("sharegpt", path)[:2]
    assert (box.step, box.chosen, len(box.images)) == ("box", "[0.100, 0.200, 0.300, 0.400]", 1)
    assert (answer.step, answer.chosen, answer.rejected) == ("answer", "right", "wrong")
    assert answer.prompt == "<image>\nWhat?\n<image>"
    assert answer.images[1].crop == Box(0.1, 0.2, 0.3, 0.4)
    assert box.id == answer.id == "q0"


def test_the_columns_of_stage_1_give_box_preferences_only(tmp_path):
    write_lines(tmp_path / "rl.jsonl", STEP_ROWS)
    columns = {"messages": "conversations", "chosen": "chosen_step", "rejected": "rejected_step", "images": "images"}
    info(
        tmp_path,
        stage1={"file_name": "rl.jsonl", "ranking": True, "formatting": "sharegpt", "columns": columns},
        alpaca={"file_name": "other.json"},
    )
    read = records("sharegpt", tmp_path, dataset="stage1")
    assert [(each.step, each.chosen) for each in read] == [("box", "[0.100, 0.200, 0.300, 0.400]")] * 3
    with pytest.raises(RecordError, match="no data set 'stage3'; it has: stage1"):
        records("sharegpt", tmp_path, dataset="stage3")


def test_rankings_without_steps_are_answers_or_boxes_by_what_they_say(tmp_path):
    row = {key: value for key, value in STEP_ROWS[0].items() if not key.endswith("_step")}
    (answer,) = records("sharegpt", write_lines(tmp_path / "a.jsonl", [row]))
    assert (answer.step, len(answer.images)) == ("answer", 1)
    boxes = row | {"chosen": STEP_ROWS[0]["chosen_step"], "rejected": STEP_ROWS[0]["rejected_step"]}
    (box,) = records("sharegpt", write_lines(tmp_path / "b.jsonl", [boxes]))
    assert box.step == "box"


@pytest.mark.parametrize("described", [True, False])
def test_messages_with_roles_are_read_by_their_tags_or_by_their_usual_names(tmp_path, described):
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": "a cup"},
        ],
        "images": ["a.jpg"],
    }
    path = write_lines(tmp_path / "a.jsonl", [row])
    if described:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        columns = {"messages": "messages", "images": "images"}
        info(tmp_path, a={"file_name": "a.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags})
    (sample,) = records("sharegpt", path)
    assert (sample.question, sample.answer, sample.image, sample.box) == ("What is it?", "a cup", "a.jpg", None)
    convert("sharegpt", "sharegpt", [path], str(tmp_path / "b.jsonl"))
    assert list(json_items(tmp_path / "b.jsonl")) == [row]
    assert records("sharegpt", tmp_path / "b.jsonl")[0].answer == "a cup"


def test_chosen_boxes_are_read_in_the_named_space(tmp_path):
    write_lines(tmp_path / "rl.jsonl", STEP_ROWS)
    info(tmp_path, rl={"file_name": "rl.jsonl", "ranking": True, "formatting": "sharegpt", "box_space": "padded_square",
                       "columns": {"messages": "conversations", "images": "images", "chosen": "chosen",
                                   "rejected": "rejected", "chosen_step": "chosen_step",
                                   "rejected_step": "rejected_step"}})  # fmt: skip
    rows = list(read_format("sharegpt", str(tmp_path / "rl.jsonl"), Reading()))
    # y 0.200 of the square of 200 × 200 is 10 px above the picture's top edge at 50.
    assert {row.fault for row in rows} == {"outside"}


def test_pairs_to_rankings_and_back(tmp_path):
    path = write_lines(tmp_path / "rl.jsonl", STEP_ROWS)
    convert("sharegpt", "visrl", [path], str(tmp_path / "pairs.jsonl"))
    convert("visrl", "sharegpt", [str(tmp_path / "pairs.jsonl")], str(tmp_path / "back.jsonl"))
    assert list(json_items(tmp_path / "back.jsonl")) == STEP_ROWS
    entry = json.loads((tmp_path / "dataset_info.json").read_text())["back"]
    assert entry["ranking"] is True
    assert entry["columns"] == {
        "messages": "conversations",
        "images": "images",
        **{name: name for name in ("chosen", "rejected", "chosen_step", "rejected_step")},
    }


def test_pairs_of_a_family_with_its_own_box_text_keep_their_crop(tmp_path):
    from visrl.data.native import visrl_row
    from visrl.records import Picture

    box = Box(0.123, 0.2, 0.3, 0.4)
    text = CODECS["qwen2_5_vl"].format(box, (200, 100), (224, 112))
    worse = CODECS["qwen2_5_vl"].format(Box(0.5, 0.5, 0.9, 0.9), (200, 100), (224, 112))
    pairs = [
        Preference("q", "box", "<image>\nWhat?", (Picture("a.jpg"),), text, worse),
        Preference(
            "q", "answer", "<image>\nWhat?\n<image>", (Picture("a.jpg"), Picture("a.jpg", box)), "right", "wrong"
        ),
    ]
    path = write_lines(tmp_path / "pairs.jsonl", [visrl_row(pair) for pair in pairs])
    convert("visrl", "sharegpt", [path], str(tmp_path / "rl.jsonl"))
    assert records("sharegpt", tmp_path / "rl.jsonl") == pairs


# --- Selection and splits -------------------------------------------------------------------------------------------


def test_skip_and_take_count_within_each_data_set(tmp_path):
    rows = [viscot(i, (10, 10, 90, 90), (100, 100), dataset) for i in range(10) for dataset in ("gqa", "vsr", "docvqa")]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    selection = Selection(skip={"": 3}, take={"": 4, "docvqa": 0, "vsr": 2})
    summary = convert("viscot", "rl-pool", [str(path)], str(tmp_path / "b.jsonl"), selection=selection)
    taken = [(row["source"], row["id"].rpartition("/")[2]) for row in json_items(tmp_path / "b.jsonl")]
    assert sorted(taken) == [("gqa", "3"), ("gqa", "4"), ("gqa", "5"), ("gqa", "6"), ("vsr", "3"), ("vsr", "4")]
    assert summary.left_out == 24


def test_splits_are_by_picture_and_the_same_at_every_run(tmp_path):
    rows = [meta(i % 40, [[1, 1, 9, 9]], (10, 10)) for i in range(120)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    convert("viscot-meta", "visrl", [path], str(tmp_path / "b.jsonl"), validation=0.25, seed=1)
    train, val = ({row["image"] for row in json_items(tmp_path / name)} for name in ("b.jsonl", "b.val.jsonl"))
    assert len(train) + len(val) == 40
    assert not train & val
    assert 2 <= len(val) <= 20
    assert val == {row["image"] for row in json_items(tmp_path / "b.val.jsonl")}
    assert {image for image in train | val if share_of(2, image) < 0.25} != val


def test_a_sample_without_what_a_format_needs_is_listed(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", [{"image": "a.jpg", "question": "What?", "answer": "this"}])
    for target in ("viscot-sft1", "viscot-sft2", "viscot-meta"):
        summary = convert("visrl", target, [path], str(tmp_path / "out.jsonl"))
        assert set(summary.bad) <= {"no_box", "no_size"}
        assert summary.bad.total() == 1


def test_hub_columns_are_named_by_the_user(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"img": ["a.jpg"], "query": ["What?"], "label": ["this"], "box": [[0.1, 0.2, 0.3, 0.4]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RecordError, match="no column 'image'; it has img, query, label, box"):
        records("hf", tmp_path / "a.parquet")
    columns = {"image": "img", "question": "query", "answer": "label"}
    (sample,) = records("hf", tmp_path / "a.parquet", columns=columns)
    assert (sample.image, sample.answer, sample.box) == ("a.jpg", "this", Box(0.1, 0.2, 0.3, 0.4))


def test_pictures_in_parquet_become_data_urls(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from visrl.images import open_image

    stream = io.BytesIO()
    Image.new("RGB", (30, 40), (9, 9, 200)).save(stream, "PNG")
    table = pa.table({"image": [{"bytes": stream.getvalue(), "path": None}], "question": ["What?"], "answer": ["blue"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (sample,) = records("hf", tmp_path)
    assert open_image(sample.image).size == (30, 40)


def test_folders_that_datasets_saved_are_read_with_their_pictures_and_splits(tmp_path):
    import datasets
    from PIL import Image

    from visrl.images import open_image

    rows = {"image": [Image.new("RGB", (30, 40), (9, 9, 200))], "question": ["What?"], "answer": ["blue"]}
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "saved")
    (sample,) = records("hf", tmp_path / "saved", split="test")
    assert open_image(sample.image).size == (30, 40)
    with pytest.raises(RecordError, match="no split 'train'; it has test"):
        records("hf", tmp_path / "saved")
    with pytest.raises(RecordError, match="no data at"):
        records("hf", tmp_path / "nowhere")


def test_two_boxes_under_one_question_number_are_not_mixed_up(tmp_path):
    from data_rows import detection

    boxes = [(10.0, 10.0, 50.0, 50.0), (200.25, 200.5, 300.75, 300.0)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([viscot(0, box, (640, 480)) for box in boxes]))
    sizes = write_lines(tmp_path / "d.jsonl", [detection(0, box, (640, 480)) for box in boxes])
    read = records("viscot", path, sizes=sizes)
    assert [sample.box.to_pixels((640, 480)) for sample in read] == [pytest.approx(box) for box in boxes]
    boxes = [(10.0, 10.0, 50.0, 50.0), (10.0, -0.9, 300.0, 300.0)]  # cutting off hides that the second is outside
    path.write_text(json.dumps([viscot(0, box, (640, 480)) for box in boxes]))
    sizes = write_lines(tmp_path / "d.jsonl", [detection(0, box, (640, 480)) for box in boxes])
    assert [row.fault for row in read_format("viscot", str(path), reading(sizes))] == ["", "outside"]


def format_of(raw):
    return next((name for name, each in FORMATS.items() if is_own_row(each, raw)), None)


def test_refcoco_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [refcoco(7, (10.5, 20, 30, 40), (100, 80))])
    (sample,) = records("refcoco", path)
    assert (sample.id, sample.source, sample.answer) == ("refcoco/validation/7", "refcoco", "")
    assert sample.box.to_pixels((100, 80)) == pytest.approx((10.5, 20, 30, 40))
    assert format_of(sample.raw) == "refcoco"


# --- Sizes from pictures ------------------------------------------------------------------------------------------


def test_sizes_come_from_pictures_too(tmp_path):
    from PIL import Image

    (tmp_path / "cot" / "gqa").mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(tmp_path / "cot" / "gqa" / "0.jpg")
    sizes = Sizes(images=tmp_path)
    assert sizes.of("cot/gqa/0.jpg") == (640, 480)
    with pytest.raises(RowFault, match="no picture at"):
        sizes.of("cot/gqa/1.jpg")


def test_a_picture_with_an_exif_turn_is_read_the_way_its_boxes_were_drawn(tmp_path):
    from PIL import Image

    from visrl.images import open_image

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cot" / "gqa").mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(tmp_path / "cot" / "gqa" / "0.jpg", exif=exif.tobytes())
    for size in ((640, 480), (480, 640)):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([viscot(0, (300.0, 100.0, 470.0, 479.0), size)]))
        (row,) = read_format("viscot", str(path), Reading(Sizes(images=tmp_path)))
        assert row.records[0].size == size, row.reason
        assert open_image("cot/gqa/0.jpg", tmp_path, size).size == size
