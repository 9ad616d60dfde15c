"""Streams of rows: lists and lines of any length, damage, and what fuzzing finds."""

from __future__ import annotations

import json
import random

import pytest
from data_rows import BAD, detection, good_boxes, meta, refcoco, viscot
from hypothesis import given, settings
from hypothesis import strategies as st

from visrl import records
from visrl.data import rows
from visrl.data.native import parse_visrl
from visrl.data.refcoco import parse_refcoco
from visrl.data.rows import BadLine, Writer, json_bytes, json_items, parsed_row
from visrl.data.sharegpt import DatasetEntry, parse_sharegpt
from visrl.data.sizes import Sizes
from visrl.data.viscot import parse_detection, parse_meta, parse_viscot
from visrl.records import RecordError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(values=st.lists(JSON, max_size=8), indent=st.sampled_from([None, 1, 4]), chunk=st.integers(1, 40))
def test_a_list_is_read_whole_whatever_the_chunks(tmp_path_factory, values, indent, chunk):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    before = rows.CHUNK
    rows.CHUNK = chunk
    try:
        assert list(json_items(path)) == values
    finally:
        rows.CHUNK = before


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=8), suffix=st.sampled_from(["json", "jsonl"])
)
def test_what_is_written_is_read_back(tmp_path_factory, values, suffix):
    path = tmp_path_factory.mktemp("out") / f"a.{suffix}"
    with Writer(path) as writer:
        for value in values:
            writer.write(value)
    assert list(json_items(path)) == values


@pytest.mark.parametrize(
    ("text", "row", "what"),
    [
        ('[{"a": 1}, {"a": ', 2, "nothing from here on can be read"),
        ('[{"a": 1} {"a": 2}]', 2, "where ',' or ']' must stand"),
        ('[{"a": 1}, oops]', 2, "Expecting value"),
        ('[{"a": 1},', 2, "the list has no end"),
        ('[{"a": 1}] and more', 2, "follows the end"),
        ("[" * 100_000, 1, "nothing from here on can be read"),
    ],
)
def test_a_damaged_list_is_refused_with_file_and_row(tmp_path, text, row, what):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=rf"a\.json, row {row}: .*{what}"):
        list(json_items(path))


def test_a_bad_line_is_kept_as_it_stood_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b'{"a": ', b'{"a": "\xff\xfe"}', b"[" * 50_000, b'{"b": 2}', b'{"n": ' + b"9" * 5000 + b"}"]
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    items = list(json_items(path))
    assert [isinstance(item, BadLine) for item in items] == [False, True, True, True, False, True]
    assert [json_bytes(item) for item in items] == lines
    reasons = [parsed_row(item, 1, lambda raw, number: ()).reason for item in items]
    assert "not JSON: Expecting value at character 7" in reasons[1]
    assert "not UTF-8" in reasons[2]
    assert "nested too deeply" in reasons[3]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(RecordError, match=r"no data at .*nowhere\.json"):
        list(json_items(tmp_path / "nowhere.json"))
    (tmp_path / "empty.json").write_text("")
    assert list(json_items(tmp_path / "empty.json")) == []


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_ROW", 1000)
    (tmp_path / "a.jsonl").write_text('{"a": "' + "x" * 5000 + '"}')
    with pytest.raises(RecordError, match="longer than 1,000 characters"):
        list(json_items(tmp_path / "a.jsonl"))


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    def interrupted() -> None:
        with Writer(tmp_path / "a.json") as writer:
            writer.write({"a": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_goes_back_as_it_came():
    raw = json.loads('{"a": "\\ud800"}')
    assert json.loads(json_bytes(raw)) == raw


SIZES = Sizes()
SIZES._sizes = {viscot(number, *case)["image"][0]: case[1] for number, case in enumerate(good_boxes(20) + BAD)}
RANKING = DatasetEntry("r", None, True, {}, box_space="image")  # type: ignore[arg-type]
SFT = DatasetEntry("s", None, columns={})  # type: ignore[arg-type]


def said(text: str, speaker: str = "gpt") -> dict[str, str]:
    return {"from": speaker, "value": text}


STEP_ROW = {
    "id": "a",
    "images": ["a.jpg"],
    "size": [10, 20],
    "conversations": [said("<image>\nq", "human")],
    "chosen_step": said("[0.1, 0.2, 0.3, 0.4]"),
    "rejected_step": said("[0.5, 0.2, 0.6, 0.4]"),
    "chosen": said("x"),
    "rejected": said("y"),
}
SFT_ROW = {
    "images": ["cot/gqa/0.jpg", {"ref": "cot/gqa/0.jpg", "crop": [0.1, 0.2, 0.3, 0.4]}],
    "conversations": [said("<image>\nq\n<image>", "human"), said("x")],
}
SAMPLE = {"id": "a", "image": "a.jpg", "question": "?", "answer": "!", "box": [0.1, 0.2, 0.3, 0.4], "raw": {}}
PREFERENCE = {
    "id": "a",
    "step": "answer",
    "prompt": "<image>\nq\n<image>",
    "images": ["a.jpg", {"ref": "a.jpg", "crop": [0.1, 0.2, 0.3, 0.4], "size": [10, 20]}],
    "chosen": "x",
    "rejected": "y",
    "weight": 0.5,
}
GROUNDING_ROW = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<image>Find the <ref-object>"},
        {"role": "assistant", "content": "<bbox>"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "x"},
    ],
    "images": ["cot/gqa/0.jpg"],
    "objects": {"ref": ["dog"], "bbox": [[0.1, 0.1, 0.5, 0.5]], "bbox_type": "norm1", "image_id": [0]},
}
SWIFT_RANKING = {"messages": GROUNDING_ROW["messages"][3:], "images": "a.jpg", "rejected_response": "y", "weight": 0.5}
OTHER_TOOLS = [
    GROUNDING_ROW,
    SWIFT_RANKING,
    {"messages": SWIFT_RANKING["messages"], "image": "a.jpg", "rejected_messages": SWIFT_RANKING["messages"]},
    {"query": "q", "response": "r", "history": [["<image>a", "b"]], "system": "s", "images": ["a.jpg"]},
    {"id": 3, "image": "a.jpg", "conversations": [said("<image>\nq", "human"), said("x")], "width": 9, "height": 9},
    {"conversation": [{"human": "<image>q", "assistant": "x"}], "images": ["a.jpg"], "label": 3, "tools": ""},
    STEP_ROW | {"conversations": [said("<image>a", "human"), said("b"), said("c", "human")]},
]
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "h", "images": "images"}
ALPACA = DatasetEntry("t", None, False, ALPACA_COLUMNS, formatting="alpaca")  # type: ignore[arg-type]
ALPACA_ROW = {"instruction": "<image>q", "input": "i", "output": "o", "h": [["a", "b"]], "images": ["a.jpg"]}
PARSERS = [
    (lambda raw, number: parse_viscot(raw, number, SIZES), viscot(0, *good_boxes(1)[0])),
    (parse_meta, meta(1, [[1, 2, 30, 40], [5, 5, 50, 50.5]], (100, 80))),
    (parse_detection, detection(1, (1.5, 2, 30, 40), (100, 80))),
    (parse_refcoco, refcoco(1, (1.5, 2, 30, 40), (100, 80))),
    (parse_visrl, SAMPLE),
    (parse_visrl, {"image": "a.jpg", "question": "?", "bbox": [1, 2, 3, 4], "width": 9, "height": 9, "mine": 1}),
    (parse_visrl, PREFERENCE),
    (lambda raw, number: parse_sharegpt(raw, number, RANKING, SIZES, "image"), STEP_ROW),
    (lambda raw, number: parse_sharegpt(raw, number, SFT, SIZES, "padded_square"), SFT_ROW),
    *((lambda raw, number: parse_sharegpt(raw, number, SFT, SIZES, "image"), row) for row in OTHER_TOOLS),
    (lambda raw, number: parse_sharegpt(raw, number, ALPACA, SIZES, "image"), ALPACA_ROW),
]
STRANGE = [
    None, True, 0, -1, 10**40, 1e300, float("nan"), float("inf"), "", "x", "[0.1, 0.2]", "\ud800", [], {}, [[]], [None],
    [1, 2, 3, 4], ["a", "b"], {"from": "gpt"}, "[9, 9, 1, 1]",
]  # fmt: skip


def test_every_parser_takes_its_own_good_row():
    for parse, raw in PARSERS:
        row = parsed_row(raw, 1, parse)
        assert row.records, row.reason


def mutate(value, rng: random.Random):
    """`value` with something in it changed, dropped or put in another's place."""
    if rng.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        if isinstance(value, str) and value and rng.random() < 0.6:
            place = rng.randrange(len(value))
            return (
                value[:place] + rng.choice(["", "#", "[", "]", ",", "-", "9", "é", "\ud800", "\0"]) + value[place + 1 :]
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.6:
            return rng.choice([-value, value * 1000, value + 0.5, str(value)])
        return rng.choice(STRANGE)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    action = rng.random()
    if action < 0.15:
        del copy[key]
    elif action < 0.25 and isinstance(copy, list):
        copy.append(copy[key])
    else:
        copy[key] = mutate(copy[key], rng)
    return copy


def fuzz_rows(count: int) -> tuple[int, int]:
    """(good, bad) of `count` mutated rows. Anything but records or a reasoned fault is an exception and fails."""
    rng = random.Random(11)
    good = 0
    for number in range(count):
        parse, raw = PARSERS[number % len(PARSERS)]
        for _ in range(rng.choice((1, 1, 2, 4))):
            raw = mutate(raw, rng)
        row = parsed_row(raw, number, parse)
        assert bool(row.records) != bool(row.fault and row.reason), raw
        for record in row.records:
            json_bytes(rows_json(record))
        good += bool(row.records)
    return good, count - good


def rows_json(record):
    from visrl.data.native import visrl_row

    return visrl_row(record)


def test_mutated_rows_are_records_or_reasoned_faults():
    good, bad = fuzz_rows(8_000)
    assert good > 500
    assert bad > 500


@pytest.mark.slow
def test_a_hundred_thousand_mutated_rows():
    good, bad = fuzz_rows(100_000)
    assert min(good, bad) > 5_000


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5))):
        place = rng.randrange(len(changed))
        changed[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(changed)


def test_mutated_files_are_rows_or_one_clear_error(tmp_path):
    rng = random.Random(3)
    values = [viscot(number, *case) for number, case in enumerate(good_boxes(3))]
    for number in range(400):
        path = tmp_path / "a"
        text = json.dumps(values, indent=1) if number % 2 else "\n".join(map(json.dumps, values))
        path.write_bytes(mutate_bytes(text.encode(), rng))
        try:
            found = [parsed_row(item, 1, PARSERS[0][0]) for item in json_items(path)]
        except RecordError as error:
            found = [error]
        assert found or not path.read_bytes().strip()
