"""Data URLs as their RFC has them, in data files and in requests; what is none gets a sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from urllib.parse import quote, quote_from_bytes

import pytest
from PIL import Image

from visrl.data_url import DataUrlError, read_data_url
from visrl.images import ImageError, open_image
from visrl.serve.errors import RequestError
from visrl.serve.images import Fetcher, Opener
from visrl.serve.schemas import ImageUrl, Limits

COLOUR = (10, 120, 200)


def png(size: tuple[int, int] = (9, 7)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, COLOUR).save(stream, "PNG")
    return stream.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
assert BASE64.endswith("="), "a test below takes the padding off"
READABLE = {
    "plain": f"data:image/png;base64,{BASE64}",
    "charset": f"data:image/png;charset=utf-8;base64,{BASE64}",
    "name": f"data:image/png;name=a.png;base64,{BASE64}",
    "quoted name with a comma": f'data:image/png;name="a, b; \\"c\\".png";base64,{BASE64}',
    "quoted base64 is no base64 mark": f'data:image/png;name=";base64";base64,{BASE64}',
    "many parameters": f"data:image/png;a=1;b=2;c;d=;base64,{BASE64}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
    "blank after a semicolon": f"data:image/png; charset=utf-8; base64,{BASE64}",
    "no media type": f"data:;base64,{BASE64}",
    "parameters alone": f"data:;charset=us-ascii;base64,{BASE64}",
    "bytes of no named kind": f"data:application/octet-stream;base64,{BASE64}",
    "another picture's type": f"data:image/vnd.unknown+x;base64,{BASE64}",
    "lines": "data:image/png;base64,\r\n" + "\r\n".join(BASE64[i : i + 20] for i in range(0, len(BASE64), 20)) + "\n",
    "tabs and blanks": "data:image/png;base64, " + BASE64[:11] + " \t" + BASE64[11:],
    "no padding": f"data:image/png;base64,{BASE64.rstrip('=')}",
    "percent-encoded base64": f"data:image/png;base64,{quote(BASE64, safe='')}",
    "percent-encoded bytes": f"data:image/png,{quote_from_bytes(PNG)}",
    "percent-encoded bytes without a type": "data:," + "".join(f"%{byte:02x}" for byte in PNG),
}
UNREADABLE = {
    "another kind": (f"data:text/html;base64,{BASE64}", "no data URL of a picture"),
    "no comma": (f"data:image/png;base64{BASE64}", "no data URL of a picture"),
    "a quote that does not end": (f'data:image/png;name="a;base64,{BASE64}', "no data URL of a picture"),
    "a head of a megabyte": ("data:image/png;" + "a=b;" * 250_000 + f"base64,{BASE64}", "no data URL of a picture"),
    "no digits of base64": ("data:image/png;base64,@@@@", "is not base64"),
    "a digit too many": ("data:image/png;base64,AAAAA", "5 digits are no whole number of bytes"),
    "too much padding": ("data:image/png;base64,AAA==", "its padding does not fit"),
    "padding in the middle": ("data:image/png;base64,AA==AAAA", "is not base64"),
    "not ASCII": ("data:image/png;base64,AAAÄ", "not ASCII"),
    "a lone surrogate": ("data:image/png,\ud800", "not ASCII"),
    "nothing": ("data:image/png;base64,", "cannot be read as a picture"),
    "no picture": ("data:image/png,hello", "cannot be read as a picture"),
}


def in_a_request(url: str) -> Image.Image:
    return asyncio.run(Opener(Limits(), Fetcher()).open([ImageUrl(url=url)]))[0].image


@pytest.mark.parametrize("read", [open_image, in_a_request])
@pytest.mark.parametrize("kind", READABLE)
def test_a_data_url_is_read_as_its_standard_has_it(kind, read):
    image = read(READABLE[kind])
    assert (image.size, image.getpixel((3, 3))) == ((9, 7), COLOUR)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_data_url_of_a_picture_gets_one_sentence(kind):
    url, message = UNREADABLE[kind]
    for read, error, name in (
        (open_image, ImageError, ("the data URL", "a picture")),
        (in_a_request, RequestError, ("picture 1",)),
    ):
        with pytest.raises(error, match=message) as caught:
            read(url)
        assert str(caught.value).startswith(name)
        assert len(str(caught.value)) < 300


def test_a_data_url_is_bounded_before_it_is_decoded():
    big = "data:image/png;base64," + "A" * 4_000_004
    with pytest.raises(DataUrlError, match="more than 1,000,000"):
        read_data_url(big, max_bytes=1_000_000)
    with pytest.raises(DataUrlError, match="more than 100,000"):
        read_data_url("data:image/png," + "%41" * 1_000_000, max_bytes=100_000)
    assert len(read_data_url("data:image/png," + "%41" * 100_000, max_bytes=100_000)) == 100_000


@pytest.mark.parametrize("filling", ["a=b;", '"', ';x="', "\\", ";", "=", '"a";', "%"])
def test_no_head_keeps_the_parser_busy(filling):
    began = time.perf_counter()
    with pytest.raises((DataUrlError, ImageError)):
        open_image("data:image/png;" + filling * (3_000_000 // len(filling)))
    assert time.perf_counter() - began < 1.0
