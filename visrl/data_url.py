"""Reading data URLs (RFC 2397), in data files and in requests alike. Of images it knows the media types only."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

MAX_BYTES = 200_000_000  # of what one data URL may hold
MAX_HEAD = 2_000  # characters before the comma: a media type and its parameters are a few dozen

# data:[type/subtype](;name=value)*[;base64],  where a value is a token or a quoted string, which may hold a comma.
_HEAD = re.compile(
    r"""data:\s*(?P<type>[^;,"]*)(?P<parameters>(?:;[^;,="]*(?:=\s*(?:"(?:[^"\\]|\\.)*"|[^;,"]*)\s*)?)*),""",
    re.IGNORECASE | re.DOTALL,
)
_BASE64 = re.compile(r";\s*base64\s*$", re.IGNORECASE)
_BLANKS = b" \t\r\n\f\v"


class DataUrlError(ValueError):
    """A data URL that cannot be read; the message says why and opens with a verb, for the caller to name the URL."""


def is_data_url(ref: str) -> bool:
    """Whether `ref` is a data URL, well formed or not. The scheme is written in either case."""
    return ref[:5].lower() == "data:"


def read_data_url(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes that the data URL of an image holds.

    Parameters of the media type (`charset=`, `name=`, quoted or not) are allowed and mean nothing to an image. The
    data is base64 where `;base64` says so, else percent-encoded; base64 may be percent-encoded, broken into lines and
    without its padding. A missing media type is no error: the bytes say what they are.

    Raises:
        DataUrlError: no data URL, one of something else than an image, damaged, or of more than `max_bytes`.
    """
    head = _HEAD.match(url[:MAX_HEAD])
    media_type = head["type"].strip().lower() if head else ""
    if head is None or not (media_type.startswith("image/") or media_type in ("", "application/octet-stream")):
        raise DataUrlError("is no data URL of a picture: it must open with data:image/…;base64,")
    try:
        data = url[head.end() :].encode("ascii")
    except UnicodeEncodeError as error:
        raise DataUrlError("holds characters that are not ASCII, which no data URL does") from error
    is_base64 = _BASE64.search(head["parameters"]) is not None
    most = max_bytes * (4 if is_base64 else 3)  # three characters a byte where all is percent-encoded, four in base64
    if len(data) > most:
        raise DataUrlError(f"holds more than {max_bytes:,} bytes")
    if b"%" in data:
        data = unquote_to_bytes(data)
    if is_base64:
        data = _from_base64(data)
    if len(data) > max_bytes:
        raise DataUrlError(f"holds {len(data):,} bytes, more than {max_bytes:,}")
    return data


def _from_base64(text: bytes) -> bytes:
    text = text.translate(None, _BLANKS)
    digits = text.rstrip(b"=")
    if len(digits) % 4 == 1:
        raise DataUrlError(f"is not base64: {len(digits):,} digits are no whole number of bytes")
    if len(text) - len(digits) not in (0, -len(digits) % 4):
        raise DataUrlError("is not base64: its padding does not fit its length")
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataUrlError(f"is not base64: {error}") from error
