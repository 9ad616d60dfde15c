"""The judge: its prompt, both readings of a reply, and the whole path against a real server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from waiting import wait_until

from visrl.conversation import Conversation
from visrl.engines.base import Completion, Sampling
from visrl.engines.client import Client
from visrl.engines.openai_server import Endpoint
from visrl.prompts import judged_question
from visrl.records import RecordError
from visrl.rewards.judge import (
    AnswerToJudge,
    engine_asker,
    judge_all,
    judge_ask,
    judgement_key,
    read_judgements,
    read_published_score,
    read_score,
)
from visrl.statistics import agreement


@pytest.mark.parametrize(
    ("reply", "published", "ours"),
    [
        ("score: 0.8", 0.8, 0.8),
        ("Score: 1", 1.0, 1.0),
        ("The answer is right.\nSCORE: 0.5 (half)", 0.5, 0.5),
        ("score: 0", 0.0, 0.0),
        # Read by people and by us, not by the published scorer:
        ("score:0.8", 0.0, 0.8),
        ("score: **0.8**", 0.0, 0.8),
        ('{"score": 0.8}', 0.0, 0.8),
        ("0.8", 0.0, 0.8),
        ("score = .5", 0.0, 0.5),
        ("score: 0.8. The model is nearly right.", 0.0, 0.8),  # the published scorer stops with an error here
        ("score: 0.8, so the score: 0.8", 0.0, 0.8),
        # Read by the published scorer as something it does not say:
        ("score: 8/10", 1.0, 0.8),
        ("score: 8 out of 10", 1.0, 0.8),
        ("score: 85", 1.0, None),
        ("score: 85%", 1.0, None),
        ("score: 0.85%", 0.85, None),
        # Read by neither:
        ("score: 0.2 or score: 0.9", 0.0, None),
        ("score: -1", 0.0, None),
        ("score: high", 0.0, None),
        ("no idea", 0.0, None),
        ("score: 1/0", 1.0, None),
        ("", 0.0, None),
        (None, 0.0, None),
    ],
)
def test_both_readings_of_a_reply(reply, published, ours):
    assert read_published_score(reply) == published
    assert read_score(reply) == ours


def test_the_prompt_is_the_published_one():
    row = "<image>\nWhat is it? Please provide the bounding box coordinate of the region that can help you."
    ask = judge_ask(AnswerToJudge("1", judged_question(row), "a cat", "cat"))
    system, user = ask.messages
    assert system["content"].startswith("\nYou are responsible for proofreading the answers, ")
    assert system["content"].endswith(
        " the closer the model's answer is to the standard answer, the higher the score.\n"
    )
    assert user["content"] == "\nquestion: <image>\nWhat is it?\nstandard answer: a cat\nmodel's answer: cat\n"
    assert ask.sampling.temperature == 0


def test_a_judges_limit_is_part_of_what_was_asked():
    answered = AnswerToJudge("1", "What is it?", "a cat", "cat")
    assert judge_ask(answered).sampling.max_tokens == 256
    assert judge_ask(answered, 4000).sampling.max_tokens == 4000
    assert judgement_key(answered, "court") != judgement_key(answered, "court", 4000)


# --- A real server, faulty by what the answer says --------------------------------------------------------------------


class Court:
    """An ASGI app: a judge over HTTP. The model's answer says what it does; `seen` counts the attempts per answer."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "GET":
            await reply(send, 200, b'{"object": "list", "data": [{"id": "court", "object": "model"}]}')
            return
        body = b""
        while True:
            part = await receive()
            body += part.get("body", b"")
            if not part.get("more_body"):
                break
        asked = str(json.loads(body)["messages"][-1]["content"])
        if "model's answer: " not in asked:  # the client's first small question
            await reply(send, 200, completion("yes"))
            return
        answer = asked.rsplit("model's answer: ", 1)[1].strip()
        self.seen[answer] += 1
        await self.answer(answer.split()[0], self.seen[answer], send)

    async def answer(self, kind: str, attempt: int, send: Any) -> None:
        if kind == "busy" and attempt <= 2:
            await reply(send, 429, b'{"error": {"message": "slow down"}}', (b"retry-after", b"0.01"))
        elif kind == "down" and attempt == 1:
            await reply(send, 503, b"upstream gone")
        elif kind == "slow" and attempt == 1:
            await asyncio.sleep(60)  # until its client has left
        elif kind == "garbage" and attempt == 1:
            await reply(send, 200, b"\x00\xff not json")
        elif kind == "never":
            await reply(send, 500, b"{}")
        elif kind == "refused":
            await reply(send, 400, b'{"error": {"message": "content policy"}}')
        elif kind == "mute":
            await reply(send, 200, completion("I would rather not say."))
        else:
            await reply(send, 200, completion("score: 0.8" if kind != "wrong" else "score: 0"))


async def reply(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), *headers]}
    )
    await send({"type": "http.response.body", "body": body})


def completion(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


@contextmanager
def serving(app: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def judging(url: str) -> Iterator[Client]:
    client = Client(Endpoint((url,), "court", concurrency=8, timeout_s=3.0, attempts=3, first_wait_s=0.01))
    try:
        yield client
    finally:
        client.close()


def answers_of(*kinds: str) -> list[AnswerToJudge]:
    return [AnswerToJudge(str(index), "<image>\nQ?", "truth", f"{kind} {index}") for index, kind in enumerate(kinds)]


KINDS = ("good", "busy", "wrong", "down", "slow", "garbage", "never", "refused", "mute", "good")


def test_the_judge_path_against_a_server_of_every_fault(tmp_path):
    court, answers = Court(), answers_of(*KINDS)
    with serving(court) as url, judging(url) as client:
        judgements = judge_all(answers, client.ask_all, "court", tmp_path / "judge.jsonl")
    assert [one.id for one in judgements] == [one.id for one in answers]
    by_kind = dict(zip(KINDS, judgements, strict=True))
    assert {kind: by_kind[kind].score for kind in KINDS} == {
        "good": 0.8, "busy": 0.8, "wrong": 0.0, "down": 0.8, "slow": 0.8, "garbage": 0.8,
        "never": None, "refused": None, "mute": None,
    }  # fmt: skip
    assert [one.published for one in judgements] == [0.8, 0.8, 0.0, 0.8, 0.8, 0.8, 0.0, 0.0, 0.0, 0.8]
    assert re.search(r"500.*3 tries", by_kind["never"].error)
    assert re.search(r"400.*content policy", by_kind["refused"].error)
    assert by_kind["mute"].error is None
    assert by_kind["mute"].reply == "I would rather not say."
    assert court.seen["busy 1"] == 3
    assert court.seen["never 6"] == 3
    assert court.seen["refused 7"] == 1
    assert list(read_judgements(tmp_path / "judge.jsonl")) == judgements


def test_an_interrupted_judge_goes_on_and_ends_in_the_same_file(tmp_path):
    answers = answers_of(*["good", "wrong", "mute"] * 10)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    court = Court()
    with serving(court) as url, judging(url) as client:
        judge_all(answers, client.ask_all, "court", whole)
        judge_all(answers[:13], client.ask_all, "court", part)
        part.write_bytes(part.read_bytes()[:-20])  # a kill in the middle of a line
        judge_all(answers, client.ask_all, "court", part)
    assert part.read_bytes() == whole.read_bytes()
    assert sum(court.seen.values()) == 30 + 13 + 18  # 12 of the 13 were whole


def test_failed_judgements_are_asked_again_and_changed_answers_too(tmp_path):
    path = tmp_path / "judge.jsonl"
    court = Court()
    with serving(court) as url, judging(url) as client:
        judge_all(answers_of("good", "refused"), client.ask_all, "court", path)
        judge_all(answers_of("good", "refused"), client.ask_all, "court", path)
        assert court.seen == {"good 0": 1, "refused 1": 2}
        judge_all(answers_of("wrong", "refused"), client.ask_all, "court", path)
        assert [one.score for one in read_judgements(path)] == [0.0, None]
        with pytest.raises(RecordError, match="file of its own"):
            judge_all(answers_of("good"), client.ask_all, "another", path)


def test_a_model_in_this_process_can_judge_and_two_judges_be_compared():
    class Strict:
        name = "strict"

        def complete(self, conversations: list[Conversation], sampling: Sampling, seeds: Any) -> list[list[Completion]]:
            assert not any(conversation.views for conversation in conversations)
            return [[Completion("score: 0.6" if "good" in c.messages[1].text else "score: 0")] for c in conversations]

    answers = answers_of("good", "wrong", "good", "wrong")
    strict = judge_all(answers, engine_asker(Strict()), "strict")
    with serving(Court()) as url, judging(url) as client:
        court = judge_all(answers, client.ask_all, "court")
    result = agreement([one.score for one in strict], [one.score for one in court])
    assert result["kappa"] == 1
    assert result["mean_absolute"] == pytest.approx(0.1)


def test_a_file_that_is_none_of_judgements_is_named(tmp_path):
    path = tmp_path / "judge.jsonl"
    path.write_text('{"id": "1"}\n')
    with pytest.raises(RecordError, match=r"judge\.jsonl, row 1: not a judgement"):
        list(read_judgements(path))


@pytest.mark.slow
def test_a_judge_killed_at_any_moment_ends_in_the_same_file(tmp_path):
    class Held(Court):
        """Answers as often as it may; whoever asks beyond that waits, and can be killed at leisure."""

        may_answer, waiting = 10**6, 0

        async def answer(self, kind: str, attempt: int, send: Any) -> None:
            self.waiting += 1
            while not self.may_answer:
                await asyncio.sleep(0.01)
            self.may_answer -= 1
            self.waiting -= 1
            await super().answer(kind, 9, send)

    rows = [
        {"question_id": i, "text": f"{'good' if i % 3 else 'wrong'} {i}", "gt_answer_text": "t"} for i in range(200)
    ]
    predictions = tmp_path / "answers.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    court = Held()
    with serving(court) as url:

        def start(out: Path) -> subprocess.Popen[bytes]:
            command = "from visrl.cli.evaluate import app; app()"
            options = ["judge", "--predictions", predictions, "--out", out, "--model", "court", "--base-url", url]
            return subprocess.Popen([sys.executable, "-c", command, *map(str, options), "--concurrency", "4"])

        assert start(tmp_path / "whole.jsonl").wait() == 0
        part = tmp_path / "part.jsonl"
        for more in (20, 70, 60):
            court.may_answer = more
            process = start(part)
            wait_until(lambda: court.waiting == 4 or process.poll() is not None)  # noqa: B023 (called at once)
            assert process.poll() is None
            process.kill()
            process.wait()
            court.may_answer = 10**6
            wait_until(lambda: not court.waiting)  # those of the killed process are answered too, and nobody hears it
        assert part.read_bytes().count(b"\n") == 150
        assert start(part).wait() == 0
    assert part.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
