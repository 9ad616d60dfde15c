"""What OpenAI-compatible servers send, taken apart without trust: no field is of the type it should be until looked at.

Whole replies and pieces of streams are read by the same functions, behind the client and behind our own server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from visrl.engines.base import Completion
from visrl.replies import whole_text

MOST_UNLIKELY = -1e4  # nats; vLLM says -9999 where a probability is 0


def read_reply(reply: Any, most_characters: int) -> Completion:
    """The completion in a reply, taken apart without trust in any field.

    What a reasoning model thought (`reasoning_content`, parts that are no text) is no part of it. A refusal in the
    model's own words is its text. A reply without a word is "". What a filter or a fault of the server cut is no reply.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(reply, dict):
        raise ValueError(f"a reply must be a JSON object, not {type(reply).__name__}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        fault = reply.get("error")
        raise ValueError(f"an error in place of choices: {read_error(fault)}" if fault else "it has no choices")
    choice = _first(choices)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("the first choice holds no message")
    reason = choice.get("finish_reason")
    _refuse_broken(reason, choice.get("error"))
    text = text_of_content(message.get("content"))
    if text is None and isinstance(message.get("refusal"), str):
        text = whole_text(message["refusal"])
    if text is None and message.get("content") is None and reason is not None:
        text = ""  # the protocol's way to say that the model ended without a word (a reasoning model cut short)
    if text is None:
        raise ValueError("the first choice holds no text")
    if len(text) > most_characters:
        raise ValueError(f"a reply of {len(text):,} characters, far beyond the tokens asked for")
    tokens, prompt_tokens = read_usage(reply.get("usage"))
    ids, logps = read_tokens(choice)
    return Completion(
        text, tokens, read_finish_reason(reason), prompt_tokens=prompt_tokens, ids=ids, logps=logps,
        prompt_ids=read_ids(reply.get("prompt_token_ids"), "prompt_token_ids"),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one piece of a stream adds: text, why the reply ended (None: it has not), and counts of tokens, reply first.

    `of_choice` is false for what tells of no choice, such as the last piece of counts.
    """

    text: str
    reason: Literal["stop", "length"] | None = None
    counts: tuple[int, int] | None = None
    of_choice: bool = True


def read_chunk(chunk: Any) -> StreamChunk:
    """What a chunk of a stream adds to the first choice.

    Raises:
        ValueError: it is an error in place of a chunk, or none.
    """
    if not isinstance(chunk, dict):
        raise ValueError(f"a chunk must be a JSON object, not {type(chunk).__name__}")
    if chunk.get("error"):
        raise ValueError(f"an error in place of a chunk: {read_error(chunk['error'])}")
    counts = read_usage(chunk["usage"]) if isinstance(chunk.get("usage"), dict) else None
    choices = chunk.get("choices")
    if choices is None or choices == []:
        return StreamChunk("", counts=counts, of_choice=False)
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise ValueError("a chunk's choices are no list of objects")
    choice = _first(choices)
    if choice.get("index") not in (None, 0):
        return StreamChunk("", counts=counts, of_choice=False)
    delta = choice.get("delta", choice.get("message"))
    if delta is not None and not isinstance(delta, dict):
        raise ValueError("a chunk's delta is no object")
    content = (delta or {}).get("content")
    text = text_of_content(content)
    if text is None and content is not None:
        raise ValueError("a chunk's content is no text")
    if text is None and isinstance((delta or {}).get("refusal"), str):
        text = whole_text((delta or {})["refusal"])
    reason = choice.get("finish_reason")
    _refuse_broken(reason, choice.get("error"))
    return StreamChunk(text or "", None if reason is None else read_finish_reason(reason), counts)


def read_tokens(choice: dict[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The sampled tokens of a choice and their log-probabilities, where the server tells them (vLLM's `token_ids`, and
    the protocol's `logprobs`).

    Raises:
        ValueError: they are no tokens, no log-probabilities, or not one of these for each of those.
    """
    ids = read_ids(choice.get("token_ids"), "token_ids")
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    said = [token.get("logprob") if isinstance(token, dict) else None for token in content or ()]
    # NaN is not at most 0, and infinity would make a loss of no number.
    logps = tuple(float(one) for one in said if isinstance(one, int | float) and MOST_UNLIKELY <= one <= 1e-3)
    if len(logps) < len(said):
        raise ValueError("its logprobs are no log-probabilities")
    if ids and logps and len(ids) != len(logps):
        raise ValueError(f"{len(ids)} token_ids and {len(logps)} logprobs")
    return ids, logps


def read_ids(given: Any, name: str) -> tuple[int, ...]:
    """Tokens that a server names; none where it names none.

    Raises:
        ValueError: what stands there are no tokens.
    """
    if given is None:
        return ()
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < 2**31 for token in given):
        raise ValueError(f"its {name} are no tokens")
    return tuple(given)


def _first(choices: list[Any]) -> dict[str, Any]:
    """The choice that counts itself the first; where none does, the one that stands first."""
    sound = [choice for choice in choices if isinstance(choice, dict)]
    numbered = [choice for choice in sound if choice.get("index") == 0]
    return next(iter(numbered or sound), {})


def _refuse_broken(reason: Any, fault: Any) -> None:
    """Raise a ValueError where a reply ended by the server's doing: what there is of it is not what the model says."""
    if reason == "content_filter":
        raise ValueError("the server's content filter withheld the reply")
    if reason in ("error", "abort") or fault:
        raise ValueError(f"the server ended the reply with {read_error(fault or reason)!r}")


def text_of_content(content: Any) -> str | None:
    """The text of a message's content, given whole or in parts; None where there is none."""
    if isinstance(content, list):
        parts = [
            part for part in content if isinstance(part, dict) and part.get("type") in (None, "text", "output_text")
        ]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "".join(texts) if texts or not content else None
    return whole_text(content) if isinstance(content, str) else None


def read_usage(usage: Any) -> tuple[int, int]:
    """The tokens of reply and prompt that a server counted; 0 for what it does not say."""
    said = usage if isinstance(usage, dict) else {}
    counts = (said.get(name) for name in ("completion_tokens", "prompt_tokens"))
    reply, prompt = (
        count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**53 else 0
        for count in counts
    )
    return reply, prompt


def read_finish_reason(reason: Any) -> Literal["stop", "length"]:
    """Why a text ended: at its limit, or, for whatever reason a server names, by itself."""
    return "length" if reason in ("length", "max_tokens") else "stop"


def read_error(error: Any) -> str:
    """The sentence in the protocol's error object, or whatever stands in its place."""
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or error).split())[:200]
