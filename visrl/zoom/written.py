"""What calls are written in: tags, JSON, Python's literals, and the numbers in them. Whatever a model wrote is read, or
is a `CallError`.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from typing import Any

from visrl.replies import whole_text

LONGEST_CALL = 10_000  # characters: more is no call of anybody's
LARGEST = 1e100  # of a number: far outside of every picture, and no product with its sides overflows


class CallError(ValueError):
    """A call whose JSON can be read, and whose meaning cannot; the message is what the protocol replies."""


def between(text: str, tag: str) -> list[str]:
    """What stands between every `<tag>` and the next `</tag>`. One walk over the text, however many tags stay open,
    where a regular expression would look for the end of each."""
    begins, ends = f"<{tag}>", f"</{tag}>"
    found, place = [], 0
    while (start := text.find(begins, place)) >= 0 and (end := text.find(ends, start + len(begins))) >= 0:
        found.append(text[start + len(begins) : end])
        place = end + len(ends)
    return found


def json_of(said: str) -> Any:
    """What a text of JSON says."""
    return _read(said, json.loads)


def literal_of(said: str) -> Any:
    """A Python literal, read and never run."""
    return _read(said.strip(), ast.literal_eval)


def json_or_literal(said: str) -> Any:
    """JSON, or the same with Python's quotes and commas."""
    try:
        return json_of(said)
    except CallError:
        return literal_of(said)


def _read(said: str, read: Callable[[str], Any]) -> Any:
    if len(said) > LONGEST_CALL:
        raise CallError(f"a call of {len(said):,} characters")
    try:
        return read(said)
    except (SyntaxError, ValueError) as error:
        raise CallError(str(error)) from error
    except (RecursionError, MemoryError, TypeError) as error:
        raise CallError("nested too deep") from error


def named(call: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise CallError("a call is an object with 'name' and 'arguments'")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise CallError("'arguments' is no object")
    return call["name"], arguments


def numbers_of(value: Any, count: int) -> tuple[float, ...]:
    """The numbers of a list that holds `count` of them and nothing else."""
    if not isinstance(value, list | tuple) or len(value) != count:
        raise CallError(f"{str(value)[:80]} is no list of {count} numbers")
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in value):
        raise CallError(f"{str(value)[:80]} is no list of {count} numbers")
    try:
        numbers = tuple(float(one) for one in value)
    except OverflowError as error:
        raise CallError("a number too large") from error
    if not all(map(math.isfinite, numbers)):
        raise CallError(f"{str(value)[:80]} is no list of {count} numbers")
    if max(map(abs, numbers)) > LARGEST:
        raise CallError("a number too large")
    return numbers


def picture_number(value: Any, name: str) -> int:
    """The number of a picture."""
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise CallError(f"{name} {str(value)[:80]!r} is no number of a picture")
    return int(value)


def label_of(arguments: dict[str, Any]) -> str | None:
    """What a call says is to be seen there."""
    label = arguments.get("label")
    return whole_text(label) if isinstance(label, str) else None
