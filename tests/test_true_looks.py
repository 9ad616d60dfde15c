"""Samples whose true looks are known, none to several: their file, their rows to train on, their prompts."""

from dataclasses import replace

import pytest

from visrl.box import Box
from visrl.conversation import PromptError, looks_conversation, open_view
from visrl.data.convert import convert
from visrl.data.native import from_json, pool_row
from visrl.models.load import load_encoder
from visrl.models.tiny import CHECKPOINT
from visrl.records import Picture, RecordError, Sample, to_json, write_records
from visrl.train.data import SftSamples
from visrl.train.rows import crop_of, sft_rows
from visrl.zoom.episode import advance, begin
from visrl.zoom.protocols import visrl_looks

A, B = Box(0.1, 0.2, 0.3, 0.4), Box(0.55, 0.6, 0.8, 0.9)
ASKED = Sample("a", "scene:train/0", "Which is larger?", "7")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(CHECKPOINT)


@pytest.mark.parametrize("looks", [None, (), (A,), (A, B)])
def test_looks_are_written_where_they_are_known_and_read_back(looks):
    sample = replace(ASKED, looks=looks)
    row = to_json(sample)
    assert ("looks" in row) == (looks is not None)
    assert from_json(Sample, row) == sample
    assert "looks" not in pool_row(sample)


def test_one_box_is_the_one_look_unless_looks_say_otherwise():
    assert (ASKED.true_looks, replace(ASKED, box=A).true_looks) == (None, (A,))
    assert (replace(ASKED, looks=()).true_looks, replace(ASKED, box=B, looks=(A, B)).true_looks) == ((), (A, B))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"looks": "left"}, "'looks' must be a list of boxes"),
        ({"looks": [[0.1, 0.2, 0.3]]}, r"'looks\[0\]' must be four numbers"),
        ({"looks": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.4, 0.6]]}, "inverted"),
        ({"looks": [[0.1, 0.2, 0.3, 0.4]], "box": [0.1, 0.2, 0.3, 0.5]}, "'box' is none of 'looks'"),
    ],
)
def test_looks_that_are_none_are_refused_with_a_sentence(values, says):
    with pytest.raises(RecordError, match=says):
        from_json(Sample, to_json(ASKED) | values)


def test_a_format_with_room_for_one_box_lists_what_it_cannot_hold(tmp_path):
    rows = [replace(ASKED, id=str(n), looks=looks) for n, looks in enumerate([(), (A, B), (A,)])]
    write_records(tmp_path / "in.jsonl", [*rows[:2], replace(rows[2], box=A)])
    found = convert("visrl", "sharegpt", [str(tmp_path / "in.jsonl")], str(tmp_path / "out.json"))
    assert (sum(found.written.values()), dict(found.bad)) == (1, {"several_looks": 2})
    assert "says where to look 2 times; write it as visrl" in (tmp_path / "out.json.bad.jsonl").read_text()


def test_a_turn_after_looks_is_shown_as_the_episode_shows_it(encoder):
    whole = open_view(Picture(ASKED.image))
    shown, rule = encoder.processed_size(whole.size), encoder.settings.crop_rule
    episode, crops = begin(visrl_looks(encoder.codec, whole.size, shown, rule, 2), ASKED.question, whole), []
    for box in (A, B):
        text = encoder.codec.format(box, whole.size, shown)
        crops.append(crop_of(whole, encoder.codec.parse(text, whole.size, shown), encoder))
        assert episode.conversation == looks_conversation(ASKED.question, whole, crops[:-1])
        episode = advance(episode, text, shown)
    assert episode.conversation == looks_conversation(ASKED.question, whole, crops)


@pytest.mark.parametrize("looks", [(), (A,), (A, B)])
def test_a_sample_gives_a_row_for_each_look_and_one_for_its_answer(encoder, looks):
    rows = sft_rows(encoder, replace(ASKED, looks=looks))
    assert [row.key for row in rows] == [*["a/box", "a/box2"][: len(looks)], "a/answer"]
    whole, size = open_view(Picture(ASKED.image)), encoder.processed_size((672, 672))
    for place, row in enumerate(rows):
        crops = [crop_of(whole, box, encoder) for box in looks[:place]]
        assert [view.key for view in row.conversation.views] == [whole.key, *(crop.key for crop in crops)]
        assert row.conversation.messages == looks_conversation(ASKED.question, whole, crops).messages
        said = encoder.codec.format(looks[place], (672, 672), size) if place < len(looks) else "7"
        assert (row.step, row.responses) == ("box" if place < len(looks) else "answer", (("target", said),))
    only = sft_rows(encoder, replace(ASKED, looks=looks), ["read"], details=[B] * len(looks))
    assert [[view.key for view in row.conversation.views[1:]] for row in only] == [
        [crop_of(whole, B, encoder).key] * len(looks)
    ]


def test_what_says_nowhere_to_look_is_counted_and_what_needs_no_look_is_not(encoder):
    samples = [ASKED, replace(ASKED, looks=()), replace(ASKED, box=A)]
    assert SftSamples(encoder, samples).without_box() == 1
    with pytest.raises(PromptError, match="neither a box nor an answer"):
        sft_rows(encoder, replace(ASKED, looks=(), answer=""))
