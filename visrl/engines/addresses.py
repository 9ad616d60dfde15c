"""Addresses of servers as users write them: slips that mean one thing are mended, others named. Asks nobody."""

from __future__ import annotations

from urllib.parse import urlsplit

from visrl.redact import bare_address

EXAMPLE = "http://127.0.0.1:8000/v1"
_ROUTES = ("/chat/completions", "/completions", "/models", "/responses")


def server_address(text: str) -> str:
    """The address of a server up to `/v1`, as a client takes it: without blanks around it, last slash and route.

    A missing `/v1` stays missing: only the server can say whether it belongs there (see `client.py`).

    Raises:
        ValueError: it is no address of a server; the message says what is wrong with it.
    """
    import httpx

    url = text.strip().strip("\"'<>")
    shown = repr(bare_address(url)[:200])
    if any(ord(character) <= 32 or ord(character) == 127 for character in url):
        raise ValueError(f"{shown} holds a blank or a control character; write it like {EXAMPLE}")
    if "://" not in url:
        raise ValueError(f"{shown} does not say http:// or https://; write it like {EXAMPLE}")
    try:
        parts, parsed = urlsplit(url), httpx.URL(url)
        port, host = parts.port, parsed.host
    except (ValueError, httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{shown} is no address ({error}); write it like {EXAMPLE}") from error
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError(f"{shown} begins with {parts.scheme}://, and servers are asked over http:// or https://")
    if not host or port == 0:
        raise ValueError(f"{shown} names no {'port' if host else 'host'}; write it like {EXAMPLE}")
    if parts.query or parts.fragment:
        raise ValueError(f"{shown} holds a ? or #, which no route can be put after; write it like {EXAMPLE}")
    url = url.rstrip("/?#")
    for route in _ROUTES:
        url = url.removesuffix(route).rstrip("/")
    return url


def with_version(url: str) -> str | None:
    """The address with the `/v1` that may have been forgotten, or None where it has one."""
    return None if urlsplit(url).path.rstrip("/").endswith("/v1") else f"{url}/v1"
