"""The public protocols of several looks: transcripts to the letter, crops to the pixel, and replies that are garbage.

zoom_transcripts.json was written from the protocols' published texts and not by the package: each row holds what a
model says, turn by turn, the whole conversation as its chat template writes it, and for every crop its picture, window
and size. The picture has 1000 × 800 pixels.
"""

import functools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visrl.box import Box
from visrl.codecs import CODECS
from visrl.conversation import View, answer_conversation, crop_view, focus_conversation
from visrl.prompts import IMAGE
from visrl.records import Message, Picture
from visrl.replies import whole_text
from visrl.rollout.protocols import VISCOT
from visrl.zoom.calls import grounding_of
from visrl.zoom.episode import UNFINISHED, advance, begin
from visrl.zoom.protocols import ZOOM_PROTOCOLS, viscot_looks, visrl_looks
from visrl.zoom.windows import twice_as_large
from visrl.zoom.written import CallError, between

SIZE = (1000, 800)
TRANSCRIPTS = json.loads((Path(__file__).parent / "zoom_transcripts.json").read_text(encoding="utf-8"))
PICTURE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"


@functools.cache
def whole() -> View:
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    pixels = np.stack([x % 256, y % 256, (x // 4 + y // 4) % 256], axis=-1).astype(np.uint8)
    return View("picture", Image.fromarray(pixels))


def played(name, replies, shown=SIZE, protocol=None):
    """The episode after these replies, or as many of them as it takes to end."""
    episode = begin(protocol or ZOOM_PROTOCOLS[name], TRANSCRIPTS[name]["question"], whole())
    for reply in replies:
        episode = advance(episode, reply, shown)
        if episode.end is not None:
            break
    return episode


def as_chatml(episode) -> str:
    """The conversation in the form of Qwen's chat templates, the next turn opened where it is the model's."""
    text = "".join(f"<|im_start|>{one.role}\n{one.text}<|im_end|>\n" for one in episode.messages)
    return text.replace(IMAGE, PICTURE_TOKENS)


@pytest.mark.parametrize("name", ZOOM_PROTOCOLS)
def test_a_transcript_is_the_published_one_to_the_letter_and_its_crops_to_the_pixel(name):
    wanted = TRANSCRIPTS[name]
    episode = played(name, wanted["replies"])
    assert as_chatml(episode) == wanted["text"]
    assert (episode.end, episode.answer.strip(".")[-1]) == ("answered", "7")
    assert [
        (look.source, *look.window, *view.size) for look, view in zip(episode.looks, crops(episode), strict=False)
    ] == [tuple(crop) for crop in wanted["crops"]]
    for look, view in zip(episode.looks, crops(episode), strict=False):
        cut = episode.pictures[look.source].image.crop(look.window)
        assert np.array_equal(
            np.asarray(view.image), np.asarray(cut if cut.size == view.size else resized(cut, view, name))
        )


def crops(episode) -> list[View]:
    return [view for view in episode.views[1:] if view.is_crop]


def resized(cut, view, name):
    lanczos = name in ("mini_o3", "chain_of_focus", "vigorl")
    return cut.resize(view.size, Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC)


def test_boxes_that_are_spoken_of_are_looks_without_a_crop():
    episode = played("treevgr", TRANSCRIPTS["treevgr"]["replies"], shown=(500, 400))
    (look,) = episode.looks
    assert look.box.as_list() == [0.2, 0.5, 0.8, 1.0]  # 600 of 400 px is clamped
    assert len(episode.views) == 1


def test_coordinates_of_a_shrunken_picture_are_mapped_unless_the_fault_is_asked_for():
    """What scripts of the protocol forget: the model saw half the size and its crop was cut from the original."""
    said = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 200, 400, 390]}}</tool_call>'
    faulty = ZOOM_PROTOCOLS["deepeyes"].with_faults("unmapped_coordinates")
    assert played("deepeyes", [said], shown=(500, 400)).looks[0].window == (200, 400, 800, 780)
    assert played("deepeyes", [said], shown=(500, 400), protocol=faulty).looks[0].window == (100, 200, 400, 390)
    with pytest.raises(ValueError, match="deepeyes has no fault 'labels_count_turns'; known are: unmapped_coordinates"):
        ZOOM_PROTOCOLS["deepeyes"].with_faults("labels_count_turns")


@pytest.mark.parametrize(
    ("faults", "label", "followed"), [((), "Observation 1", True), (("labels_count_turns",), "Observation 2", False)]
)
def test_labels_of_observations_name_the_pictures_that_calls_can_reach(faults, label, followed):
    protocol = ZOOM_PROTOCOLS["mini_o3"].with_faults(*faults)
    call = '<grounding>{"bbox_2d": [0.1, 0.1, 0.9, 0.9], "source": "%s"}</grounding>'
    episode = played("mini_o3", ["<grounding>nothing</grounding>", call % "original_image"], protocol=protocol)
    assert "ERROR occurs during grounding" in episode.messages[3].text
    assert f"({label})" in episode.messages[-1].text
    episode = advance(episode, call % label.lower().replace(" ", "_"), SIZE)
    assert (len(episode.looks) == 2) is followed


def test_limits_end_an_episode_as_unfinished_and_a_last_turn_is_asked_where_the_protocol_has_words_for_it():
    call = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 200, 400, 500]}}</tool_call>'
    episode = played("deepeyes", [call] * 9)
    assert (episode.end, len(episode.looks), episode.answer) == ("turns", 4, None)
    assert episode.end in UNFINISHED
    arguments = '{"bbox_2d": [1, 1, 500, 500], "label": "", "img_idx": 0}'
    many = f'<tool_call>{{"name": "image_zoom_in_tool", "arguments": {arguments}}}</tool_call>'
    assert played("qwen3vl", [many * 12]).end == "pictures"
    assert advance(played("deepeyes", []), "<think>long", SIZE, cut_short=True).end == "tokens"
    point = '<tool_call>{"name": "search_coordinate", "arguments": {"coordinate": [%d, 400]}}</tool_call>'
    episode = played("vigorl", ["<think>hm</think>", *(point % x for x in (100, 300, 500, 700))])
    assert episode.end is None
    assert episode.conversation.prefill.endswith("</think>\n<answer>")
    assert advance(episode, " 7 </answer>", SIZE).answer == "7"


PIECES = (
    "<image>", "<tool_call>", "</tool_call>", "{", "}", "]", "NaN", "1e999", '"bbox_2d"', "\ud800", "<answer>",
    "9" * 400, "null", "<grounding>", "</grounding>", "[" * 3000, "\x00", ", ", '"source": "observation_3"}',
)  # fmt: skip


@pytest.mark.parametrize("name", ZOOM_PROTOCOLS)
def test_truncations_and_garbage_never_part_pictures_from_their_marks(name):
    """Any text may come: then the next conversation can be built, which checks its marks, or the episode ends."""
    draw = random.Random(7)
    replies = TRANSCRIPTS[name]["replies"]
    ends = set()
    for _ in range(150):
        episode = played(name, [])
        for _ in range(14):
            text = draw.choice(replies)
            at = draw.randrange(len(text))
            kind = draw.randrange(3)
            if kind == 0:
                text = text[:at]
            elif kind == 1:
                text = text[:at] + draw.choice(PIECES) + text[at + draw.randrange(20) :]
            else:
                text = "".join(draw.choice(PIECES) for _ in range(9))
            episode = advance(episode, text, SIZE, cut_short=draw.random() < 0.05)
            assert len(episode.conversation.views) == sum(one.text.count(IMAGE) for one in episode.messages)
            assert len(episode.pictures) == len(episode.boxes)
            if episode.end is not None:
                break
        ends.add(episode.end)
    assert ends >= ({"answered"} if name in ("treevgr", "qwen3vl") else {"answered", "tokens"})


def tool_call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


MARK = "\\u003cimage\\u003e"  # as JSON may write it
BOX = '"bbox_2d": [100, 100, 900, 700]'
HOSTILE = (
    "<ima<image>ge>",
    "<i<ima<image>ge>mage><tool_call>{</tool_call>",
    "<ima" * 5000 + "<image>" + "ge>" * 5000,
    *("<tool_call>" * 40_000, "<answer>" * 40_000, "\\boxed{" * 40_000),  # a walk for each would take minutes
    *(text for number in ("1e308", "-1e308", "1e999", "NaN") for text in (
        tool_call("crop_image", f'{{"bbox_2d": [0, 0, {number}, 0.5], "target_image": 1}}'),
        tool_call("search_coordinate", f'{{"coordinate": [{number}, 5]}}'),
        tool_call("image_zoom_in_tool", f'{{"bbox_2d": [1, 1, {number}, 9], "img_idx": 0, "label": ""}}'),
        tool_call("image_zoom_in_tool", f'{{{BOX}, "img_idx": {number}, "label": "\\ud800"}}'),
        tool_call("crop_image", f'{{{BOX}, "target_image": {number}}}'),
        f'<grounding>{{"bbox_2d": [0, 0, {number}, 1], "source": "original_image"}}</grounding>',
    )),
    *(text for string in (MARK, "\\ud800") for text in (
        tool_call(string, "{}"),
        tool_call("image_zoom_in_tool", f'{{"bbox_2d": ["{string}"], "img_idx": 0, "label": ""}}'),
        tool_call("image_zoom_in_tool", f'{{{BOX}, "img_idx": "{string}", "label": ""}}'),
        tool_call("crop_image", f'{{{BOX}, "target_image": "{string}"}}'),
        f'<grounding>{{"bbox_2d": [0, 0, 1, 1], "source": "{string}"}}</grounding>',
        f'<grounding>{{"bbox_2d": ["{string}"], "source": "original_image"}}</grounding>',
    )),
    f"<box>[1,1,{'9' * 400},{'9' * 400}]</box>",
)  # fmt: skip


@pytest.mark.parametrize("name", ZOOM_PROTOCOLS)
def test_no_hostile_turn_raises_or_forges_a_picture_or_leaves_half_a_character(name):
    for text in HOSTILE:
        episode = played(name, [text], shown=(500, 400))
        talk = episode.conversation  # checks its marks
        assert all(whole_text(one.text) == one.text for one in talk.messages)
        assert whole_text(json.dumps([look.label for look in episode.looks], ensure_ascii=False))


def test_tags_are_read_as_the_lazy_pattern_reads_them_and_the_last_grounding_as_the_greedy_one():
    lazy = re.compile("<answer>(.*?)</answer>", re.DOTALL)
    greedy = re.compile(""".*<grounding>{"bbox_2d": (.*),.*"source": [',"](.*)[',"]}</grounding>""", re.DOTALL)
    draw = random.Random(3)
    pieces = ('<grounding>{"bbox_2d": ', "[0,1]", ", ", '"source": "', "'", '"', "}</grounding>", "x")
    read = 0
    for _ in range(2000):
        text = "".join(draw.choice(("<answer>", "</answer>", "a", "\n")) for _ in range(8))
        assert between(text, "answer") == lazy.findall(text)
        text = "".join(draw.choice(pieces) for _ in range(draw.randrange(5, 14)))
        found = greedy.match(text)
        read += found is not None
        if found is None:
            with pytest.raises(CallError):
                grounding_of(text)
        else:
            assert grounding_of(text) == found.groups()
    assert read > 20


def test_a_turn_that_came_to_its_stop_text_is_not_cut_short_by_what_was_sampled_after_it():
    call = '<grounding>{"bbox_2d": [0.1, 0.1, 0.9, 0.9], "source": "original_image"}</grounding>'
    episode = advance(played("mini_o3", []), call + " and so on", SIZE, cut_short=True)
    assert (episode.end, len(episode.looks)) == (None, 1)


def test_what_a_model_thought_aloud_is_no_part_of_a_free_answer():
    assert played("qwen3vl", ["is it 8? <answer>8</answer></think>\n\n7"]).answer == "7"


def test_a_doubled_crop_of_a_large_picture_stays_within_the_area_that_is_shown():
    assert twice_as_large(Image.new("L", (2000, 1000))).size == (4004, 1988)  # multiples of 28
    assert twice_as_large(Image.new("L", (6000, 4000))).size == (5992, 4004)
    assert twice_as_large(Image.new("L", (3000, 3000))).size == (3836, 3836)


# --- The two steps of visrl as 0 to k looks ---------------------------------------------------------------------------


def visrl_episode(max_looks: int, *replies: str):
    protocol = visrl_looks(CODECS["qwen2_5_vl"], SIZE, SIZE, "exact", max_looks)
    episode = begin(protocol, "Which number?", whole())
    for reply in replies:
        episode = advance(episode, reply, SIZE)
    return episode


def test_one_look_of_visrl_is_its_two_steps():
    box = Box(0.1, 0.2, 0.5, 0.6)
    text = CODECS["qwen2_5_vl"].format(box, SIZE, SIZE)
    first = visrl_episode(1)
    assert first.conversation == focus_conversation("Which number?", whole())
    second = visrl_episode(1, text)
    detail = crop_view(whole(), Picture("picture", box), "exact")
    assert second.conversation.messages == answer_conversation("Which number?", whole(), detail).messages
    assert [(view.key, view.is_crop, view.size) for view in second.views] == [
        ("picture", False, SIZE), (detail.key, True, detail.size)
    ]  # fmt: skip
    done = advance(second, text, SIZE)  # the last turn answers, whatever it holds
    assert (done.end, done.answer, len(done.looks)) == ("answered", text, 1)


def test_a_turn_of_visrl_without_a_box_answers_and_one_with_a_broken_box_ends():
    text = CODECS["qwen2_5_vl"].format(Box(0.1, 0.2, 0.5, 0.6), SIZE, SIZE)
    assert (visrl_episode(3, "7").answer, visrl_episode(3, "7").looks) == ("7", ())
    later = visrl_episode(3, text, text.replace("100", "120"), "<think>so</think>8")
    assert (later.end, later.answer, len(later.looks), later.conversation.messages[0].text.count(IMAGE)) == (
        "answered", "8", 2, 3
    )  # fmt: skip
    broken = visrl_episode(3, text.replace("100", "9000"))
    assert (broken.end, broken.answer, len(broken.errors)) == ("no_call", None, 1)


# --- The three turns of Visual-CoT as 0 to k looks --------------------------------------------------------------------

BOX_SENTENCE = "Please provide the bounding box coordinate of the region that can help you answer the question better."
AGAIN = "<image>\nPlease answer the question based on the original image and local detail image.Which Number?"


def viscot_episode(max_looks: int, *replies: str):
    episode = begin(viscot_looks(CODECS["viscot"], SIZE, SIZE, "viscot_square", max_looks), "Which Number?", whole())
    for reply in replies:
        episode = advance(episode, reply, SIZE)
    return episode


def test_looks_of_viscot_are_its_three_turns_again_to_the_letter_and_to_the_pixel():
    """Boxes of 200 and 500 px, in fractions of the picture padded to a square; crops are squares of at least 224 px."""
    first, second = "[0.300, 0.400, 0.500, 0.600]", "[0.500, 0.400, 1.000, 0.900]"
    asked = viscot_episode(2)
    assert asked.conversation.messages == (Message("user", f"<image>\nwhich number?. {BOX_SENTENCE}"),)
    episode = viscot_episode(2, first, second, "7")
    assert [(one.role, one.text) for one in episode.messages] == [
        ("user", "<image>\nWhich Number?"),
        ("assistant", first),
        ("user", AGAIN),
        ("assistant", second),
        ("user", AGAIN),
        ("assistant", "7"),
    ]
    assert (episode.end, episode.answer) == ("answered", "7")
    assert [look.window for look in episode.looks] == [(288, 288, 512, 512), (500, 300, 1000, 800)]
    for look, view in zip(episode.looks, crops(episode), strict=True):
        assert np.array_equal(np.asarray(view.image), np.asarray(whole().image.crop(look.window)))


def test_one_look_of_viscot_is_the_published_protocol():
    text = "[0.300, 0.400, 0.500, 0.600]"
    assert viscot_episode(1).conversation == VISCOT.focus("Which Number?", whole())
    second = viscot_episode(1, text)
    detail = crop_view(whole(), Picture("picture", Box(0.3, 0.375, 0.5, 0.625)), "viscot_square")
    assert VISCOT.answer is not None
    published = VISCOT.answer("Which Number?", whole(), text, detail)
    assert second.conversation.messages == published.messages
    assert [view.key for view in second.views] == [view.key for view in published.views]
    assert np.array_equal(np.asarray(second.views[1].image), np.asarray(detail.image))
    assert (viscot_episode(1, text, text).answer, viscot_episode(2, "7").answer) == (text, "7")
    assert viscot_episode(2, "[0.300, 0.400, 0.500, 9.000]").end == "no_call"
