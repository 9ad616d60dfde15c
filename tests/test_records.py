import json
from itertools import pairwise

import pytest

from visrl.box import Box
from visrl.data.native import from_json, read_records
from visrl.manifest import NAME, hash_checkpoint
from visrl.records import (
    Journal,
    Picture,
    Preference,
    RecordError,
    Sample,
    Trajectory,
    TrajectoryLook,
    Verdict,
    read_jsonl,
    to_json,
    write_records,
)
from visrl.sequences import batched

RECORDS = [
    Sample("a", "a.png", "What?", "that", Box(0.1, 0.2, 0.3, 0.4), "mine", {"any": ["row", 1]}),
    Trajectory("a", 0, 1, "[0.1, 0.2, 0.3, 0.4]", Box(0.1, 0.2, 0.3, 0.4), "random", "that", "local", 7),
    Trajectory("a", 0, 1, "no box", None, "sampled", None, "local", 7, "box: none"),
    Verdict("a", 0, 1, 0.5, None, "score: 0.5"),
    Preference(
        "a", "answer", "<image>\nWhat?\n<image>", (Picture("a.png"), Picture("a.png", Box(0, 0, 1, 1))), "x", "y"
    ),
    Trajectory(
        "a", 0, 1, "[0, 0, 1, 1]", Box(0, 0, 1, 1), "sampled", "7", "local", 7, path=(2, 0), end="answered",
        looks=(TrajectoryLook("there", Box(0.1, 0.2, 0.3, 0.4)), TrajectoryLook("[0, 0, 1, 1]", Box(0, 0, 1, 1))),
    ),
    Verdict("a", 0, 1, None, 1.0, path=(2, 0)),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_comes_back_from_json_as_it_was(record):
    assert from_json(type(record), json.loads(json.dumps(to_json(record)))) == record


def test_what_is_no_record_is_refused_by_file_and_row(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_records(path, [RECORDS[0], {"id": "b", "image": "b.png"}])
    with pytest.raises(RecordError, match=r"samples\.jsonl, row 2: not a Sample"):
        list(read_records(Sample, path))
    path.write_text('{"id": "a", "image"\n')
    with pytest.raises(RecordError, match=r"samples\.jsonl, line 1: not JSON"):
        list(read_records(Sample, path))


def test_a_line_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"id": 1}\n\xff\n')
    with pytest.raises(RecordError, match=r"samples\.jsonl, line 2: not UTF-8"):
        list(read_jsonl(path))


def test_a_journal_drops_the_line_a_kill_left_unfinished(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with Journal(path) as journal:
        journal.append([RECORDS[3]])
    with open(path, "a") as file:
        file.write('{"sample_id": "b", "rou')
    with Journal(path) as journal:
        journal.append([RECORDS[3]])
    assert list(read_records(Verdict, path)) == [RECORDS[3], RECORDS[3]]


def test_an_unread_score_is_none_and_not_zero(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    write_records(path, [Verdict("a", 0, 0, None, 0.0)])
    (verdict,) = read_records(Verdict, path)
    assert verdict.box_score is None
    assert verdict.answer_score == 0.0


def test_a_checkpoint_is_known_by_its_weights_and_by_how_it_looks_at_pictures(tmp_path):
    files = {"model.safetensors": "w", "visrl.json": "{}", "chat_template.jinja": "t", "log.jsonl": "", NAME: "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    hashes = [hash_checkpoint(tmp_path)]
    for name in files:
        (tmp_path / name).write_text("changed")
        hashes.append(hash_checkpoint(tmp_path))
    assert [after != before for before, after in pairwise(hashes)] == [True, True, True, False, False]
    assert hash_checkpoint("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("end", "values"),
    [
        (b'{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        (b'{"a": 2}', [{"a": 1}, {"a": 2}]),  # whole, but for its line end
        (b'{"a": 2, "b', [{"a": 1}]),
        (b'{"a": "\xc3', [{"a": 1}]),  # within a character
        (b"", [{"a": 1}]),
    ],
)
def test_every_reader_has_one_rule_for_the_line_that_a_kill_cut_off(tmp_path, end, values):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n' + end)
    assert list(read_jsonl(path, unfinished="leave_out")) == values
    if not end or values[1:]:
        assert list(read_jsonl(path)) == values
    else:
        with pytest.raises(RecordError, match=r"any\.jsonl, line 3: not (JSON|UTF-8).*; mend or remove this line"):
            list(read_jsonl(path))
    with Journal(path) as journal:
        journal.append([{"a": 3}])
    assert list(read_jsonl(path)) == [*values, {"a": 3}]


def test_a_bad_line_with_a_line_end_is_nobodys_kill(tmp_path):
    path = tmp_path / "any.jsonl"
    for text in ('{"a": 1}\n{"a"\n', '{"a": 1}\n{"a"\n{"a": 2}'):
        path.write_text(text)
        with pytest.raises(RecordError, match=r"line 2: not JSON"):
            list(read_jsonl(path, unfinished="leave_out"))


def test_batches_have_fixed_members_in_order():
    assert batched([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert batched((1, 2), 2) == [(1, 2)]
    assert batched([], 3) == []
    assert "".join(batched("abcdef", 4)) == "abcdef"
