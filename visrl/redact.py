"""Keeping secrets out of what is written and said: the one place that knows what a secret looks like.

Secrets come in with addresses (`user:password@`), with `extra_body` (keys, headers) and with the environment; they may
come back in what a server says. They never go into rows, manifests, logs or error sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 6  # characters from which on a secret is looked for in a text: "none" is no secret, and "a" is everywhere

_USER = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_KEY = re.compile(r"\b(?:sk|hf|gsk|xai|AIza)[-_][A-Za-z0-9_-]{12,}")
_NAME = re.compile(
    r"(?:.*[-_. ]|.*[a-z0-9](?=[A-Z]))?"
    r"(?i:(?:api|access|secret|private|auth|license|subscription)?[-_]?key|apikey|token|secret|"
    r"pass|passwd|password|passphrase|authorization|auth|credentials?|cookie)"
)
_HEADERS = re.compile(r"(?i)(?:.*[-_])?headers?")
_NO_SECRETS = {"max_tokens_key"}


def hidden(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without passwords in addresses, without keys of well-known forms, and without these secrets."""
    for secret in sorted({secret for secret in secrets if len(secret) >= SHORTEST}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(f"{HIDDEN}@", text)
    return _KEY.sub(HIDDEN, _BEARER.sub(rf"\1 {HIDDEN}", text))


def bare_address(url: str) -> str:
    """An address as it may be shown, however malformed: nothing before its last `@`, and no query."""
    start, scheme, rest = url.partition("://")
    if not scheme:
        start, rest = "", url
    _, at, rest = rest.rpartition("@")
    place = re.match(r"[^?#]*[?#]?", rest)
    shown = place[0] if place else ""
    return f"{start}{scheme}{HIDDEN + at if at else ''}{shown}{HIDDEN if shown != rest else ''}"


def secrets_of(value: Any) -> set[str]:
    """The texts in a nested value that stand under a secret's name (`api_key`, `token`, any header)."""
    return {text for name, text in _texts(value, "") if _is_secret(name)}


def without_secrets(value: Any) -> Any:
    """A config's nested values with every secret hidden, for manifests and for telling two runs apart."""
    return _without(value, "")


def _without(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        below = "header" if _HEADERS.fullmatch(name) else ""
        return {key: _without(one, below or str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without(one, name) for one in value]
    if _is_secret(name) and value is not None and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, str):
        return bare_address(value) if "://" in value else value
    return value


def _texts(value: Any, name: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        below = "header" if _HEADERS.fullmatch(name) else ""
        for key, one in value.items():
            yield from _texts(one, below or str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one, name)
    elif value is not None and not isinstance(value, bool):
        yield name, str(value)


def _is_secret(name: str) -> bool:
    return name == "header" or (name not in _NO_SECRETS and _NAME.fullmatch(name) is not None)
