"""Tools in the OpenAI protocol, through OpenAI's own client: calls handed on, tool messages with images taken, and a
zoom loop that the client runs, to the letter the episode that the server runs by itself."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import random
import shutil
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from http_server import serving as scripted
from PIL import Image
from serve_help import NAME, KnownEngine, body, data_url, known, picture, picture_part, post, serving
from test_serve_local import chunks_of, example, output_of
from test_serve_looks import picture_url
from test_zoom import SIZE, TRANSCRIPTS, whole
from tiny_families import make

from visrl.conversation import Conversation, ToolTurn
from visrl.engines.base import Sampling
from visrl.engines.local import LocalEngine
from visrl.models.tiny import CHECKPOINT
from visrl.prompts import IMAGE
from visrl.serve.backend import Loaded
from visrl.serve.batching import ContinuousBatcher
from visrl.serve.config import ServeConfig
from visrl.serve.errors import RequestError
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend
from visrl.serve.schemas import Limits, read_request, to_conversation
from visrl.zoom.episode import advance, begin
from visrl.zoom.protocols import ZOOM_PROTOCOLS
from visrl.zoom.tool_calls import CallReader, WrittenCall
from visrl.zoom.windows import qwen3vl_window

QUESTION = TRANSCRIPTS["qwen3vl"]["question"]
TEMPLATE = (files("trl") / "chat_templates" / "qwen3_vl.jinja").read_text(encoding="utf-8")
SYSTEM = ZOOM_PROTOCOLS["qwen3vl"].system or ""
ZOOM = json.loads(SYSTEM.partition("<tools>\n")[2].partition("\n</tools>")[0])
USER = {"role": "user", "content": "What is it?"}


def call_text(box: list[int], index: int = 0, label: str = "sign") -> str:
    arguments = json.dumps({"bbox_2d": box, "label": label, "img_idx": index})
    return f'<tool_call>\n{{"name": "image_zoom_in_tool", "arguments": {arguments}}}\n</tool_call>'


def client_of(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0).chat.completions


def made(identity: str = "a", name: str = "image_zoom_in_tool", arguments: str = '{"bbox_2d": [1, 2, 3, 4]}') -> Any:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Any, content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def answering(identity: str = "a", content: Any = "seen") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": content}


# --- Calls in a reply -------------------------------------------------------------------------------------------------

FIRST, SECOND = call_text([1, 2, 3, 4]), call_text([5, 6, 7, 8], 1, "Tür")
REPLIES = {  # what is said: the content, the arguments of the calls, why it ended
    "a call alone": (FIRST, None, [[1, 2, 3, 4]], "tool_calls"),
    "a thought and a call": (f"<think>Far.</think>\n{FIRST}\n", "<think>Far.</think>", [[1, 2, 3, 4]], "tool_calls"),
    "two calls": (f"Both.\n{FIRST}\n{SECOND}", "Both.", [[1, 2, 3, 4], [5, 6, 7, 8]], "tool_calls"),
    "words between": (f"a {FIRST} b {SECOND} c", "a b c", [[1, 2, 3, 4], [5, 6, 7, 8]], "tool_calls"),
    "no closing tag": (FIRST.removesuffix("\n</tool_call>"), None, [[1, 2, 3, 4]], "tool_calls"),
    "broken JSON": ("x <tool_call>{'name': 1</tool_call> ", "x <tool_call>{'name': 1</tool_call> ", [], "stop"),
    "broken, then whole": (f"<tool_call></tool_call>{FIRST}", "<tool_call></tool_call>", [[1, 2, 3, 4]], "tool_calls"),
    "cut in a call": (FIRST[:40], FIRST[:40], [], "stop"),
    "no number of JSON": (FIRST.replace("1,", "NaN,"), FIRST.replace("1,", "NaN,"), [], "stop"),
    "no call at all": (" <tool>7 < 8</tool> ", " <tool>7 < 8</tool> ", [], "stop"),
    "a list": ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", [], "stop"),
}  # fmt: skip


def collected(chunks: Iterator[Any]) -> tuple[str | None, list[dict[str, str]], str]:
    """What a client puts together of a stream."""
    content, calls, reason = "", list[dict[str, str]](), ""
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments or ""
        reason = choice.finish_reason or reason
    return content or None, calls, reason


def test_calls_are_handed_to_the_client_whole_and_in_a_stream_and_no_word_is_lost() -> None:
    with known(lambda talk: REPLIES[talk.messages[-1].text.removeprefix(IMAGE)][0]) as (url, engine, _):
        for name, (said, content, boxes, reason) in REPLIES.items():
            given = body(name, tools=[ZOOM], max_tokens=500)
            message, ended = (reply := client_of(url).create(**given).choices[0]).message, reply.finish_reason
            streamed = collected(client_of(url).create(**given, stream=True))
            assert engine.batches[-1][0].conversation.tools == (json.dumps(ZOOM),)
            plain = client_of(url).create(**body(name, max_tokens=500)).choices[0].message
            assert engine.batches[-1][0].conversation.tools == ()
            assert (message.content, ended) == (content, reason), name
            calls = message.tool_calls or []
            assert [json.loads(call.function.arguments)["bbox_2d"] for call in calls] == boxes
            assert all((call.type, call.function.name) == ("function", "image_zoom_in_tool") for call in calls)
            assert len({call.id for call in calls}) == len(boxes)
            told = (streamed[0], [call["arguments"] for call in streamed[1]], streamed[2])
            assert told == (content, [call.function.arguments for call in calls], reason)
            assert (plain.content, plain.tool_calls) == (said, None)  # who defines no tools is told the text


def test_half_characters_in_arguments_and_a_reply_that_is_cut_are_told_as_they_are() -> None:
    half = FIRST.replace("sign", "\\ud800")
    with known(lambda _: half) as (url, _, _):
        (call,) = client_of(url).create(**body(tools=[ZOOM], max_tokens=500)).choices[0].message.tool_calls
        cut = client_of(url).create(**body(tools=[ZOOM], max_tokens=len(half) - 3)).choices[0]
    assert json.loads(call.function.arguments)["label"] == "\ufffd"
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert cut.message.content == half[:-3]


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_turn_that_grows_is_taken_apart_as_one_that_is_whole(piece: int) -> None:
    dice = random.Random(piece)
    pieces = ["<tool_call>", "</tool_call>", FIRST, "{}", " ", "\n", "<tool", "_call>", "a", "<", SECOND, "é"]
    for _ in range(60):
        text = "".join(dice.choices(pieces, k=dice.randrange(9)))
        reader, parts = CallReader(), list[Any]()
        for end in range(0, len(text), piece):
            parts += reader.feed(text[:end])
        parts += reader.finish(text)
        at_once = list(CallReader().finish(text))
        calls = [one for one in at_once if isinstance(one, WrittenCall)]
        assert [one for one in parts if isinstance(one, WrittenCall)] == calls
        joined = "".join(one for one in parts if isinstance(one, str))
        assert joined == "".join(one for one in at_once if isinstance(one, str))
        assert len(calls) == text.count(FIRST) + text.count(SECOND) or "<tool_call><tool_call>" in text or joined
        if not calls:
            assert joined == text


def test_whether_and_what_is_called_can_be_said() -> None:
    given = '{"bbox_2d": [1, 2, 3, 4]}'
    named = {"type": "function", "function": {"name": "image_zoom_in_tool"}}

    def speak(talk: Conversation) -> str:
        if not talk.prefill:
            return FIRST + SECOND
        name = "" if talk.prefill.endswith(":") else 'image_zoom_in_tool", "arguments":'
        return f"{name} {given}}}\n</tool_call>"

    with known(speak, sampling=Sampling(max_tokens=500)) as (url, engine, _):
        ask = client_of(url).create
        none = ask(**body(tools=[ZOOM], tool_choice="none")).choices[0]
        forced = ask(**body(tools=[ZOOM], tool_choice="required")).choices[0]
        one = ask(**body(tools=[ZOOM], tool_choice=named)).choices[0]
        single = ask(**body(tools=[ZOOM], parallel_tool_calls=False)).choices[0]
        streamed = collected(ask(**body(tools=[ZOOM], parallel_tool_calls=False), stream=True))
    assert (none.message.content, none.message.tool_calls, none.finish_reason) == (FIRST + SECOND, None, "stop")
    assert [call.function.arguments for call in forced.message.tool_calls] == [given]
    assert (forced.message.content, forced.finish_reason) == (None, "tool_calls")
    assert [call.function.arguments for call in one.message.tool_calls] == [given]
    assert one.finish_reason == "stop"  # as of OpenAI, where the tool was named
    prefills = [batch[0].conversation.prefill for batch in engine.batches]
    assert prefills[:3] == [
        "", '<tool_call>\n{"name": "', '<tool_call>\n{"name": "image_zoom_in_tool", "arguments":'
    ]  # fmt: skip
    assert (len(single.message.tool_calls), len(streamed[1])) == (1, 1)
    assert engine.said[-1] == FIRST  # it ends there, and is not cut afterwards


# --- A loop that the client runs --------------------------------------------------------------------------------------

LOOP = [
    f"Far away.\n{call_text([100, 250, 400, 500])}",
    f"<think>Closer.</think>\n{call_text([200, 200, 800, 900], 1)}\n{call_text([0, 0, 5, 900], 7)}",
    "The number is 7.",
]


class RenderingEngine(KnownEngine):
    """Says what is scripted, and shows each conversation to a real encoder whose template takes tools."""

    def __init__(self) -> None:
        super().__init__(lambda talk: LOOP[sum(one.role == "assistant" for one in talk.messages)])
        self.encoder = tools_encoder()

    def prepare(self, conversation: Conversation) -> list[Any]:
        self.encoder.render(conversation)
        return []


@functools.cache
def tools_encoder() -> Any:
    encoder = make("qwen3_vl")[1]
    encoder.chat_template = TEMPLATE
    return encoder


def followed(call: Any, pictures: list[Image.Image]) -> tuple[Any, Image.Image | None]:
    """What a client answers a call with: the crop, cut by itself, or the words of an error."""
    given = json.loads(call["arguments"])
    if not 0 <= given["img_idx"] < len(pictures):
        return ZOOM_PROTOCOLS["qwen3vl"].no_source(len(pictures)), None
    source = pictures[given["img_idx"]]
    crop = source.crop(qwen3vl_window(tuple(given["bbox_2d"]), source.size, source.size))
    shown = ZOOM_PROTOCOLS["qwen3vl"].resize(crop)
    file = io.BytesIO()
    shown.save(file, "PNG")
    part = picture_part("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return [part], crop


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_that_the_client_runs_is_the_episode_to_the_letter_and_to_the_pixel(stream: bool) -> None:
    engine, metrics = RenderingEngine(), Metrics()
    backend = ContinuousBatcher(lambda: Loaded(engine), metrics)  # type: ignore[arg-type]
    content = [picture_part(picture_url()), {"type": "text", "text": QUESTION}]
    messages: list[Any] = [{"role": "user", "content": content}]
    pictures = [whole().image]
    with serving(backend, metrics, sampling=Sampling(max_tokens=500)) as url:
        while True:
            reply = client_of(url).create(model=NAME, messages=messages, tools=[ZOOM], stream=stream)
            if stream:
                text, calls, reason = collected(reply)
                messages.append(
                    calling(*(made(one["id"], one["name"], one["arguments"]) for one in calls), content=text)
                )
            else:
                reason, said = reply.choices[0].finish_reason, reply.choices[0].message
                messages.append(said)  # as the client's own object
                text = said.content
                calls = [{"id": one.id, "arguments": one.function.arguments} for one in said.tool_calls or ()]
            if reason != "tool_calls":
                break
            for call in calls:
                shown, crop = followed(call, pictures)
                pictures += [crop] if crop else []
                messages.append(answering(call["id"], shown))
    assert text == "The number is 7."
    episode, encoder = begin(ZOOM_PROTOCOLS["qwen3vl"], QUESTION, whole()), tools_encoder()
    for batch, reply_text in zip(engine.batches, LOOP, strict=True):
        talk = batch[0].conversation
        assert encoder.render(talk) == encoder.render(episode.conversation)
        for sent, wanted in zip(talk.views, episode.views, strict=True):
            assert np.array_equal(np.asarray(sent.image), np.asarray(wanted.image))
        episode = advance(episode, reply_text, SIZE)
    assert (episode.end, episode.answer, len(episode.looks)) == ("answered", text, 2)


def shown_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return picture_part("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


@pytest.mark.parametrize("name", [name for name, row in ZOOM_PROTOCOLS.items() if row.tool])
def test_the_tool_of_a_checkpoints_protocol_is_handed_over_in_the_protocols_own_words(name: str) -> None:
    """Templates of most such checkpoints show no tools; what the model reads is still its own episode, letter by
    letter."""
    row, question = ZOOM_PROTOCOLS[name], TRANSCRIPTS[name]["question"]
    replies = [one for one in TRANSCRIPTS[name]["replies"] if "500}}" not in one]  # that one is no JSON
    own = tool(row.tool[0], parameters={"type": "object", "properties": {key: {} for key in row.tool[1:]}})
    messages: list[Any] = [
        {"role": "user", "content": [picture_part(picture_url()), {"type": "text", "text": question}]}
    ]
    episode, states = begin(row, question, whole()), list[Any]()

    def speak(talk: Conversation) -> str:
        return replies[sum(one.role == "assistant" for one in talk.messages)]

    with known(speak, protocol=row, sampling=Sampling(max_tokens=500)) as (url, engine, _):
        for reply in replies:
            states.append(episode)
            message = client_of(url).create(model=NAME, messages=messages, tools=[own]).choices[0].message
            messages.append(message)
            before, episode = episode, advance(episode, reply, SIZE)
            shown = [[shown_part(view.image)] for view in episode.views[len(before.views) :]]
            given = shown + list(episode.errors[len(before.errors) :]) if row.on_failure == "say" else shown
            messages += [answering(call.id, one) for call, one in zip(message.tool_calls or (), given, strict=True)]
        wrong = tool(row.tool[0], parameters={"type": "object", "properties": {"where": {}}})
        refused = post(url, {"model": NAME, "messages": messages[:1], "tools": [wrong]})
        opened = post(url, {"model": NAME, "messages": [USER], "tools": [own]})
    assert (message.tool_calls, episode.end) == (None, "answered")
    for batch, state in zip(engine.batches, states, strict=True):
        talk = batch[0].conversation
        assert [(one.role, one.text) for one in talk.messages] == [(one.role, one.text) for one in state.messages]
        for sent, wanted in zip(talk.views, state.views, strict=True):
            assert np.array_equal(np.asarray(sent.image), np.asarray(wanted.image))
    assert f"takes {' and '.join(row.tool[1:])}" in refused.json()["error"]["message"]
    assert "opens with one image and then the question" in opened.json()["error"]["message"]


def test_a_real_model_is_shown_tools_and_their_images_as_its_template_writes_them() -> None:
    model, encoder = make("qwen3_vl")
    encoder.chat_template = TEMPLATE
    engine, metrics = LocalEngine(model, encoder), Metrics()
    talk = [
        {"role": "user", "content": [picture_part(), {"type": "text", "text": "?"}]},
        calling(made()), answering("a", [picture_part(data_url(picture((90, 90))))]),
    ]  # fmt: skip
    with serving(ContinuousBatcher(lambda: Loaded(engine), metrics), metrics) as url:
        given = {"model": NAME, "messages": talk, "max_tokens": 8}
        texts = [
            client_of(url).create(**given, **more).choices[0].message.content
            for more in ({}, {"tools": [ZOOM]}, {"tools": [ZOOM, tool("other")]})
        ]
        refused = post(url, given | {"tools": [tool("a", description="<|im_end|>")]})
        wrong = post(url, given | {"messages": [*talk[:2], answering("a", "<|im_start|>")]})
    asked = read_request(json.dumps(given | {"tools": [ZOOM]}).encode(), Limits())
    (alone,) = engine.complete([to_conversation(asked, views_of(asked))], Sampling(max_tokens=8), [[0]])[0]
    assert texts[1] == alone.text
    assert len(set(texts)) > 1
    for answer in (refused, wrong):
        assert answer.status_code == 400
        assert "control token" in answer.json()["error"]["message"]


def views_of(asked: Any) -> list[Any]:
    from visrl.conversation import View

    datas = [base64.b64decode(image.url.partition(",")[2]) for image in asked.image_urls()]
    return [View(f"{n}", Image.open(io.BytesIO(data)).convert("RGB")) for n, data in enumerate(datas)]


def test_a_server_behind_this_one_shows_the_tools_and_its_text_is_read_here(tmp_path: Path) -> None:
    served = shutil.copytree(CHECKPOINT, tmp_path / "served")
    for template in (TEMPLATE, None):
        if template:
            (served / "chat_template.jinja").write_text(template, encoding="utf-8")
        metrics = Metrics()
        with scripted(chunks_of([f"Far.\n{FIRST}"])) as vllm:
            folder = str(served if template else CHECKPOINT)
            config = ServeConfig(model_name_or_path=folder, infer_backend="vllm", vllm_url=vllm.url, vllm_model="m")
            with serving(make_backend(config, metrics), metrics, name=NAME) as url:
                talk = [*body()["messages"], calling(made()), answering("a", [picture_part()])]
                reply = post(url, body(tools=[ZOOM], parallel_tool_calls=False) | {"messages": talk})
        if template is None:
            assert (reply.status_code, vllm.bodies) == (400, [])
            assert "the chat template of this checkpoint shows no tools" in reply.json()["error"]["message"]
            continue
        (sent,) = vllm.bodies
        assert (sent["tools"], sent["tool_choice"]) == ([ZOOM], "none")
        assert sent["messages"][1] == talk[1] | {"content": ""}
        assert (sent["messages"][2]["tool_call_id"], sent["messages"][2]["content"][0]["type"]) == ("a", "image_url")
        choice = reply.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Far.", "tool_calls")
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["bbox_2d"] == [1, 2, 3, 4]


def test_the_example_of_the_documentation_runs_the_zoom_tool_of_a_model(tmp_path: Path) -> None:
    with known(lambda talk: LOOP[0] if len(talk.messages) == 1 else LOOP[2], sampling=Sampling(max_tokens=500)) as (
        url, engine, _,
    ):  # fmt: skip
        assert output_of([sys.executable, "-c", example("python", url, "tools=")], tmp_path) == "The number is 7.\n"
    first, second = (batch[0].conversation for batch in engine.batches)
    side = first.views[0].size[0]
    assert second.views[1].size == (round(0.4 * side) - round(0.1 * side), round(0.5 * side) - round(0.25 * side))


# --- What is refused --------------------------------------------------------------------------------------------------


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "'function'"),
        ({"tools": [tool("a b")]}, "tools.0.function.name", "pattern"),
        ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools.2.function.name", "a second tool"),
        ({"tools": [tool("a", strict=True)]}, "tools.0.function.strict", "nothing holds a model to the schema"),
        ({"tools": [tool("a", parameters=nested(30))]}, "tools.0.function.parameters", "more than 20 deep"),
        ({"tools": [tool("a", parameters=[1])]}, "tools.0.function.parameters", "object"),
        ({"tools": [tool("a", returns="x")]}, "tools.0.function.returns", "not supported"),
        ({"tools": [tool(f"a{n}") for n in range(129)]}, None, "129 tools where this server allows 128"),
        ({"tools": [tool("a", description="x" * 9000)]}, None, "bytes of text"),
        ({"tools": [tool("a", description=f"an {IMAGE}")]}, None, "may not hold the mark"),
        ({"tool_choice": "required"}, "tool_choice", "no tools to choose from"),
        ({"tools": [ZOOM], "tool_choice": tool("b")}, "tool_choice", "there is no tool b"),
        ({"tools": [ZOOM], "tool_choice": "any"}, "tool_choice", 'is "none", "auto"'),
        ({"tools": [ZOOM], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice", '"auto"'),
        ({"tools": [ZOOM], "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"functions": [{"name": "x"}]}, "functions", "define them in tools"),
        ({"messages": [USER, answering()]}, "messages.1.tool_call_id", "no call 'a' was made"),
        ({"messages": [USER, calling(made()), answering("b")]}, "messages.2.tool_call_id", "no call 'b'"),
        ({"messages": [USER, calling(made()), USER]}, "messages.2", "the call 'a' has no tool message yet"),
        ({"messages": [USER, calling(made())]}, "messages.1", "the call 'a' has no tool message yet"),
        ({"messages": [USER, calling(made(), made())]}, "messages.1.tool_calls", "the same id"),
        ({"messages": [USER, calling(made(), made("b")), answering("b")]}, "messages.2.tool_call_id", "comes before"),
        (
            {"messages": [USER, calling(made(), made("b")), answering(), answering()]},
            "messages.3.tool_call_id", "has an answer already",
        ),
        ({"messages": [USER, calling(made()), answering(content=None)]}, "messages.2.content", "a tool message holds"),
        ({"messages": [USER, calling(made()), {"role": "tool", "content": ""}]}, "messages.2.tool_call_id", "names"),
        ({"messages": [USER, calling(made(arguments="{"))]}, "messages.1.tool_calls.0.function.arguments", "no JSON"),
        ({"messages": [USER, calling(made(arguments="[]"))]}, "messages.1.tool_calls.0.function.arguments", "object"),
        ({"messages": [USER, calling(made(arguments='{"a": NaN}'))]}, "messages.1.tool_calls.0.function.arguments", ""),
        ({"messages": [{**USER, "tool_calls": [made()]}]}, "messages.0.tool_calls", "a user message makes no calls"),
        ({"messages": [{**USER, "tool_call_id": "a"}]}, "messages.0.tool_call_id", "answers no call"),
        ({"model": "m:focus", "tools": [ZOOM]}, None, None),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_honoured_are_refused_by_their_place(
    fields: Any, where: str | None, said: str | None
) -> None:
    if said is None:
        with known() as (url, _, _):
            refused = post(url, body(tools=[ZOOM]) | {"model": f"{NAME}:focus"})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(":focus takes no tools")
        return
    with pytest.raises(RequestError) as error:
        read_request(json.dumps({"model": "m", "messages": [USER]} | fields).encode(), Limits())
    assert error.value.status == 400
    assert said in error.value.message
    assert error.value.param == where


SOUND: dict[str, Any] = {
    "model": NAME,
    "messages": [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [picture_part("u"), {"type": "text", "text": "?"}]},
        calling(made(), made("b"), content="I look."), answering("a", [picture_part("v")]), answering("b"),
        {"role": "assistant", "content": "7"}, USER,
    ],
    "tools": [ZOOM], "tool_choice": "auto", "parallel_tool_calls": True, "max_tokens": 9,
}  # fmt: skip
JUNK: list[Any] = [None, "", 0, -1, 1e400, True, [], {}, "tool", "a" * 300, [[]], {"a": {}}, "\ud800", ["a"], IMAGE]


def mutated(dice: random.Random) -> Any:
    """The request with something of it taken away, doubled, moved or replaced."""
    value = copy.deepcopy(SOUND)
    for _ in range(dice.choice((1, 1, 2, 4))):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(place[key], dict | list) and dice.random() < 0.8:
                place = place[key]
                continue
            what = dice.randrange(4)
            if what == 0:
                del place[key]
            elif what == 1 and isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            elif what == 2 and isinstance(place, list):
                dice.shuffle(place)
            else:
                place[key] = dice.choice(JUNK)
            break
    return value


def test_a_thousand_mutated_requests_are_read_or_refused_in_a_sentence() -> None:
    dice, refused, read = random.Random(0), list[RequestError](), 0
    for _ in range(1000):
        given = json.dumps(mutated(dice)).encode()
        try:
            asked = read_request(given, Limits())
        except RequestError as error:
            refused.append(error)
            continue
        views = [whole()] * len(asked.image_urls())
        assert len(to_conversation(asked, views).views) == len(views)
        read += 1
    assert read > 100
    assert len(refused) > 400
    assert {error.status for error in refused} == {400}
    assert all(" " in error.message and len(error.message) < 600 for error in refused)


def test_no_address_is_fetched_for_a_tool_message_and_no_file_read() -> None:
    with known() as (url, engine, _):
        for address in ("file:///etc/passwd", "http://127.0.0.1:1/x.png", "http://169.254.169.254/", "/etc/passwd"):
            talk = [USER, calling(made()), answering("a", [picture_part(address)])]
            refused = post(url, {"model": NAME, "messages": talk})
            assert refused.status_code == 400
        many = [USER, calling(made()), answering("a", [picture_part()] * 9)]
        assert "9 pictures where this server allows 8" in post(url, {"model": NAME, "messages": many}).text
        sound = post(url, {"model": NAME, "messages": [USER, calling(made()), answering("a", [picture_part()])]})
    assert sound.status_code == 200
    (told,) = (batch[0].conversation for batch in engine.batches)
    assert isinstance(told.messages[-1], ToolTurn)
    assert (told.messages[-1].text, told.messages[-1].call.id) == (IMAGE, "a")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ((files("trl") / "chat_templates" / "qwen2_5_vl.jinja").read_text(encoding="utf-8"), "shows no tools"),
        (TEMPLATE.replace("message.tool_calls", "message.none_of_it"), "writes no calls as JSON"),
        (TEMPLATE.replace("<tool_call>", "<call>"), "writes no calls as JSON"),
        (TEMPLATE.replace('message.role == "tool"', 'message.role == "nobody"'), "shows no images that tools answer"),
        ("{{ raise_exception('no roles') }}", "refuses this conversation: no roles"),
    ],
)
def test_a_template_that_shows_no_tools_is_refused_with_what_to_do(template: str, said: str) -> None:
    encoder = make("qwen3_vl")[1]
    encoder.chat_template = template
    with pytest.raises(ValueError, match=said) as refused:
        encoder.render(Conversation((), tools=(json.dumps(ZOOM),)))
    assert "in a system message" in str(refused.value)
