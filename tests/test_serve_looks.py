"""Public protocols of several looks served as `:focus`: the episode, to the letter and to the pixel, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections import Counter
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serve_help import NAME, body, known, post
from test_zoom import SIZE, TRANSCRIPTS, whole

from visrl.codecs import CODECS
from visrl.conversation import Conversation, View
from visrl.engines.base import Completion, Sampling
from visrl.prompts import IMAGE
from visrl.serve.config import ServeConfig
from visrl.serve.looks import answer_with_looks, own_looks, public_looks, within
from visrl.serve.requests import QueuedRequest
from visrl.zoom.episode import Episode, advance, begin
from visrl.zoom.protocols import ZOOM_PROTOCOLS

FOCUS = f"{NAME}:focus"


def picture_url() -> str:
    file = io.BytesIO()
    whole().image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(name: str, **fields: Any) -> dict[str, Any]:
    return body(TRANSCRIPTS[name]["question"], [picture_url()], model=FOCUS, **fields)


def reading_from(replies: list[str]) -> Any:
    """A model that says these replies, one a turn."""
    return lambda talk: replies[min(turns_of(talk), len(replies) - 1)]


def turns_of(talk: Conversation) -> int:
    return sum(message.role == "assistant" for message in talk.messages)


def states(name: str, replies: list[str]) -> list[Episode]:
    """Where the episode stands before each turn, and at its end."""
    found = [begin(ZOOM_PROTOCOLS[name], TRANSCRIPTS[name]["question"], whole())]
    while found[-1].end is None:
        found.append(advance(found[-1], replies[len(found) - 1], SIZE))
    return found


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


@pytest.mark.parametrize("name", ZOOM_PROTOCOLS)
def test_focus_answers_by_the_whole_episode_of_the_checkpoints_protocol(name: str) -> None:
    replies = TRANSCRIPTS[name]["replies"]
    with known(reading_from(replies), protocol=ZOOM_PROTOCOLS[name]) as (url, engine, _):
        reply = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0).chat.completions.create(**asked(name))
        streamed = post(url, asked(name, stream=True)).text
        told = httpx.get(f"{url}/v1/models").json()["data"][1]
    *before, last = states(name, replies)
    assert [row.conversation.messages for batch in engine.batches for row in batch] == [
        episode.conversation.messages for episode in before
    ] * 2
    for batch, episode in zip(engine.batches, before, strict=False):
        for shown, wanted in zip(batch[0].conversation.views, episode.views, strict=True):
            assert np.array_equal(np.asarray(shown.image), np.asarray(wanted.image))
    choice = reply.choices[0]
    focus = choice.message.model_extra["focus"]
    assert (choice.message.content, choice.finish_reason) == (last.answer, "stop")
    assert (focus["end"], focus["turns"]) == ("answered", replies)
    assert [look["box"] for look in focus["looks"] if look["box"]] == [
        [round(value, 2) for value in look.box.to_pixels(SIZE)] for look in last.looks
    ]
    errors = [look["error"].partition("; the whole picture is shown")[0] for look in focus["looks"] if look["error"]]
    assert errors == list(last.errors)
    cut = [look for look in focus["looks"] if look["crop"]]
    for look, view in zip(cut, last.views[1:], strict=True):
        assert np.array_equal(pixels(look["crop"]), np.asarray(view.image))
    assert reply.usage.completion_tokens == sum(map(len, replies))
    assert reply.usage.prompt_tokens == 7 * len(replies)
    assert (told["id"], told["protocol"]) == (FOCUS, name)
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in streamed.splitlines() if line.startswith("data: {")
    ]
    sent = [delta["focus"] for delta in deltas if "focus" in delta]
    assert sent[:-1] == [look | {"look": number} for number, look in enumerate(focus["looks"])]
    assert sent[-1] == {"end": "answered", "turns": replies}
    assert "".join(delta.get("content", "") for delta in deltas) == last.answer


GARBAGE = [
    "",
    "<image>",
    "\ud800",
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "<think>",
    "[",
    "{",
    "1e999",
    "NaN",
    "\0",
    "é",
]


def test_garbage_and_truncations_end_in_an_answer_or_a_limit_with_every_look_listed() -> None:
    """1,000 requests of all protocols: replies cut anywhere, and strewn with what must not be there."""
    dice, ends = random.Random(7), Counter[str]()
    small = View("small", whole().image.resize((120, 96)))
    rows = {"visrl": None} | dict(ZOOM_PROTOCOLS)
    for number in range(1000):
        name, row = list(rows.items())[number % len(rows)]
        said = TRANSCRIPTS[name]["replies"] if row else ["[0.1, 0.2, 0.6, 0.9]", "7"]
        looks = own_looks(3) if row is None else public_looks(within(row, dice.choice((None, 0, 2))))
        backend: Any = Spoiled(said, dice)
        choice = asyncio.run(answer_with_looks(backend, "?", small, request_of(), looks=looks))
        assert choice.focus is not None
        for look in choice.focus["looks"]:
            assert (look["error"] is None) == (look["box"] is not None)
            assert json.dumps(look, ensure_ascii=False).encode()
        ends[choice.focus.get("end", "visrl")] += 1
    assert set(ends) >= {"visrl", "answered", "no_call", "turns", "tokens"}


def request_of() -> QueuedRequest:
    return QueuedRequest(Conversation(()), Sampling(max_tokens=50), seed=1)


class Spoiled:
    """A backend that says these replies, cut and strewn with garbage; it holds pictures and marks together."""

    codec, crop_rule = CODECS["visrl"], "exact"

    def __init__(self, replies: list[str], dice: random.Random) -> None:
        self.replies, self.dice = replies, dice

    def processed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    async def submit(self, request: QueuedRequest) -> Completion:
        assert sum(one.text.count(IMAGE) for one in request.conversation.messages) == len(request.conversation.views)
        text = self.dice.choice(self.replies)
        for _ in range(self.dice.choice((0, 0, 1, 3))):
            place = self.dice.randrange(len(text) + 1)
            text = text[:place] + self.dice.choice(GARBAGE) + text[place + self.dice.randrange(3) :]
        cut = self.dice.random() < 0.3
        text = text[: self.dice.randrange(len(text) + 1)] if cut else text
        return Completion(text, len(text), "length" if cut else "stop")


CALL = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 200, 400, 600]}}\n</tool_call>'


@pytest.mark.parametrize(
    ("reply", "fields", "end", "looks"),
    [
        (CALL, {}, "turns", 4),
        (CALL, {"max_looks": 2}, "turns", 2),
        (CALL, {"max_looks": 0}, "turns", 0),
        (CALL, {"max_looks": 12}, "turns", 4),
        (CALL, {"max_tokens": 30}, "tokens", 0),
        ("I do not know.", {}, "no_call", 0),
    ],
)
def test_limits_end_an_episode_without_an_answer_and_the_request_may_lower_them(
    reply: str, fields: dict[str, Any], end: str, looks: int
) -> None:
    with known(lambda _: reply, protocol=ZOOM_PROTOCOLS["deepeyes"]) as (url, _, _):
        choice = post(url, asked("deepeyes", **fields)).json()["choices"][0]
    focus = choice["message"]["focus"]
    assert (focus["end"], len(focus["looks"])) == (end, looks)
    answered = end == "no_call"
    assert choice["message"]["content"] == (reply if answered else "")
    assert choice["finish_reason"] == ("stop" if answered else "length")


def test_whole_asks_a_checkpoint_of_a_public_protocol_in_one_turn() -> None:
    with known(lambda _: "7", protocol=ZOOM_PROTOCOLS["deepeyes"]) as (url, engine, _):
        assert (
            post(url, asked("deepeyes") | {"model": f"{NAME}:whole"}).json()["choices"][0]["message"]["content"] == "7"
        )
    (only,) = engine.batches[0][0].conversation.messages
    assert (only.role, only.text) == ("user", f"{IMAGE}{TRANSCRIPTS['deepeyes']['question']}")


def test_an_answer_at_once_is_sampled_once_unless_it_is_beyond_the_callers_limits() -> None:
    """Up to k looks of `visrl`: one turn is asked, and a second time only where the first was longer than allowed."""
    with known(lambda _: "a long answer", max_looks=2) as (url, engine, _):
        for fields, said, turns in (
            ({}, "a long answer", 1),
            ({"stop": " long"}, "a", 1),
            ({"max_tokens": 3}, "a l", 2),
        ):
            engine.batches.clear()
            choice = post(url, asked("deepeyes", **fields)).json()["choices"][0]
            assert choice["message"]["content"] == said
            assert choice["message"]["focus"]["looks"] == []
            assert len(engine.batches) == turns


def test_a_picture_that_the_processor_refuses_is_the_clients_fault_with_several_looks() -> None:
    def refuse(size: tuple[int, int]) -> tuple[int, int]:
        raise ValueError("a picture far too thin")

    with known(lambda _: "7") as (url, engine, _):
        engine.processed_size = refuse  # type: ignore[method-assign]
        refused = post(url, asked("deepeyes", max_looks=2))
    assert refused.status_code == 400
    assert "far too thin" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"protocol": "deepeye"}, "protocol: Input should be 'visrl', 'deepeyes'"),
        ({"protocol": "deepeyes", "max_looks": 3}, "deepeyes has its own limits"),
        ({"protocol_faults": ["labels_count_turns"]}, "protocol_faults needs one of the protocols"),
        ({"protocol": "deepeyes", "protocol_faults": ["labels_count_turns"]}, "deepeyes has no fault"),
        ({"protocol": "mini_o3", "infer_backend": "vllm"}, "set max_images=12"),
        ({"max_looks": 8, "infer_backend": "vllm"}, "set max_images=9"),
    ],
)
def test_keys_of_looks_that_cannot_be_served_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServeConfig(model_name_or_path="m", **keys)
