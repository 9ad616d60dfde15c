"""Known pixels through every mode: wide samples are scaled, transparency is white, colours are what they mean."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image

from visrl.images import ImageError, open_image

# Shades of 0 to 65,535 and what they are in 8 bits.
SHADES = np.array([[0, 128, 257, 20_000], [32_896, 40_000, 65_278, 65_535]], dtype=np.uint16)
GREYS = [[0, 0, 1, 78], [128, 156, 254, 255]]
BLACK_AND_WHITE = [[0, 65_535]]


def greys(data: bytes) -> list[list[int]]:
    pixels = np.asarray(open_image(data)).astype(int)
    assert (pixels == pixels[..., :1]).all(), "grey has three equal channels"
    return pixels[..., 0].tolist()


def tiff(samples: np.ndarray, order: str = "<", photometric: int = 1, bits: int | None = None) -> bytes:
    """A TIFF of one strip, its samples as they are."""
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    body = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    rows, columns = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    shorts = {256: columns, 257: rows, 258: bits, 259: 1, 262: photometric, 277: 1, 278: rows, 339: kind}
    longs = {273: 8, 279: len(body)}
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 3 if tag in shorts else 4, 1)
        + (struct.pack(f"{order}HH", shorts[tag], 0) if tag in shorts else struct.pack(f"{order}I", longs[tag]))
        for tag in sorted({**shorts, **longs})
    )
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(shorts) + len(longs)) + entries + bytes(4)


def png(depth: int, colour: int, rows: list[bytes], width: int, transparent: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 200, 0])) if colour == 3 else b""
    mark = chunk(b"tRNS", transparent) if transparent else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + mark + pixels + chunk(b"IEND", b"")


def pnm(kind: bytes, top: int, samples: np.ndarray) -> bytes:
    head = b"%s\n%d %d\n%d\n" % (kind, samples.shape[1], samples.shape[0], top)
    return head + (samples.astype(">u2").tobytes() if top > 255 else samples.astype(np.uint8).tobytes())


SIXTEEN_BITS = {
    "PNG": png(16, 0, [row.astype(">u2").tobytes() for row in SHADES], 4),
    "PGM": pnm(b"P5", 65_535, SHADES),
    "PGM of 10 bits": pnm(b"P5", 1023, (SHADES / 65_535 * 1023).round()),
    "plain PGM": b"P2 4 2 65535\n" + " ".join(map(str, SHADES.ravel().tolist())).encode(),
    "TIFF": tiff(SHADES),
    "big-endian TIFF": tiff(SHADES, ">"),
    "TIFF whose white is 0": tiff(65_535 - SHADES, photometric=0),
    "signed TIFF of 32 bits": tiff(SHADES.astype(np.int32)),
    "unsigned TIFF of 32 bits": tiff(SHADES.astype(np.uint32)),
    "full range of 32 bits": tiff(SHADES.astype(np.uint32) * 65_537),
    "floats of 0 to 1": tiff((SHADES / 65_535).astype(np.float32)),
    "floats of 0 to 1, big-endian": tiff((SHADES / 65_535).astype(np.float32), ">"),
    "floats of 0 to 255": tiff((SHADES / 257).astype(np.float32)),
    "floats of 0 to 65,535": tiff(SHADES.astype(np.float32)),
    "floats whose white is 0": tiff((1 - SHADES / 65_535).astype(np.float32), photometric=0),
    "PFM": b"Pf\n4 2\n-1.0\n" + (SHADES[::-1] / 65_535).astype("<f4").tobytes(),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_wide_grey_is_scaled_and_not_cut_off(kind):
    assert np.abs(np.array(greys(SIXTEEN_BITS[kind])) - GREYS).max() <= (1 if "10 bits" in kind else 0)


def test_a_dark_picture_of_sixteen_bits_stays_dark():
    """The depth that a file declares decides, not its largest sample."""
    dark = SHADES // 300
    assert max(map(max, greys(png(16, 0, [row.astype(">u2").tobytes() for row in dark], 4)))) == 1
    assert max(map(max, greys(pnm(b"P5", 65_535, dark)))) == 1
    assert max(map(max, greys(tiff(dark, ">")))) == 1


def test_twelve_bits_in_a_tiff_run_to_4095():
    packed = np.frombuffer(bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF]), np.uint8).reshape(1, 6)  # 0, 2048, 4095, 4095
    data = bytearray(tiff(packed, bits=12))
    at = data.index(struct.pack("<HHIH", 256, 3, 1, 6))
    data[at + 8 : at + 10] = struct.pack("<H", 4)
    assert greys(bytes(data)) == [[0, 128, 255, 255]]


def test_32_bits_of_small_values_are_the_values():
    assert greys(tiff(np.array([[0, 7, 255]], np.int32))) == [[0, 7, 255]]
    assert greys(tiff(np.array([[0.0, 7.0, 255.0]], np.float32))) == [[0, 7, 255]]
    assert greys(tiff(np.array([[-0.05, 0.5, 1.05]], np.float32))) == [[0, 128, 255]], "what overshoots is clipped"
    assert greys(tiff(np.zeros((1, 2), np.float32))) == [[0, 0]]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.array([[-500, 900]], np.int32), "from -500 to 900"),
        (np.array([[-1.0, 1.0]], np.float32), "from -1 to 1"),
        (np.array([[-1000.0, 1000.0]], np.float32), "from -1000 to 1000"),
        (np.array([[-30.0, 200.0]], np.float32), "from -30 to 200"),
        (np.array([[0.0, 1e9]], np.float32), r"from 0 to 1e\+09"),
        (np.array([[0.0, np.nan]], np.float32), "from nan"),
        (np.array([[0.0, np.inf]], np.float32), "from 0 to inf"),
    ],
)
def test_samples_without_a_known_white_are_refused_with_their_range(samples, said):
    with pytest.raises(ImageError, match=f"holds samples {said}"):
        open_image(tiff(samples))


def test_sixteen_bit_colours_and_alpha_keep_their_upper_eight_bits():
    row = struct.pack(">6H", 0, 20_000, 65_535, 65_535, 40_000, 0)
    assert np.asarray(open_image(png(16, 2, [row], 2))).tolist() == [[[0, 78, 255], [255, 156, 0]]]
    row = struct.pack(">4H", 20_000, 65_535, 20_000, 0)
    assert greys(png(16, 4, [row], 2)) == [[78, 255]]
    row = struct.pack(">8H", 0, 20_000, 65_535, 65_535, 0, 0, 0, 0)
    assert np.asarray(open_image(png(16, 6, [row], 2))).tolist() == [[[0, 78, 255], [255, 255, 255]]]
    shades = np.array([[[0, 20_000, 65_535]]], np.uint16)
    assert open_image(pnm(b"P6", 65_535, shades.reshape(1, 3)).replace(b"3 1", b"1 1")).getpixel((0, 0)) == (0, 78, 255)


@pytest.mark.parametrize(
    ("depth", "row", "width", "transparent", "wanted"),
    [
        (16, struct.pack(">3H", 0, 20_000, 40_000), 3, struct.pack(">H", 20_000), [0, 255, 156]),
        (8, bytes([0, 78, 156]), 3, struct.pack(">H", 78), [0, 255, 156]),
        (4, bytes([0x05, 0xA0]), 3, struct.pack(">H", 5), [0, 255, 170]),
        (2, bytes([0b00011000]), 3, struct.pack(">H", 1), [0, 255, 170]),
        (1, bytes([0b10100000]), 3, struct.pack(">H", 0), [255, 255, 255]),
        (1, bytes([0b01000000]), 3, struct.pack(">H", 1), [0, 255, 0]),
        (1, bytes([0b01000000]), 3, b"", [0, 255, 0]),
    ],
)
def test_the_transparent_shade_of_a_grey_png_is_white(depth, row, width, transparent, wanted):
    assert greys(png(depth, 0, [row], width, transparent)) == [wanted]


def test_the_transparent_colour_of_png_is_white_in_8_bits_in_16_and_in_a_palette():
    for data in (
        png(8, 2, [bytes([200, 0, 0, 0, 200, 0])], 2, struct.pack(">3H", 0, 200, 0)),
        png(16, 2, [struct.pack(">6H", 51_400, 0, 0, 0, 51_400, 0)], 2, struct.pack(">3H", 0, 51_400, 0)),
        png(8, 3, [bytes([0, 1])], 2, bytes([255, 0])),
        png(1, 3, [bytes([0b01000000])], 2, bytes([255, 0])),
    ):
        assert np.asarray(open_image(data)).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    half = png(8, 3, [bytes([0, 1])], 2, bytes([255, 128]))
    assert np.asarray(open_image(half)).tolist() == [[[200, 0, 0], [127, 227, 127]]]


reads_its_own_ycbcr = pytest.mark.skipif(
    Version(PIL.__version__) < Version("13"), reason="Pillow before 13 cannot read back the YCbCr TIFF that it writes"
)


@pytest.mark.parametrize(
    ("mode", "format", "pixel", "wanted", "within"),
    [
        ("1", "PNG", 255, (255, 255, 255), 0),
        ("L", "PNG", 130, (130, 130, 130), 0),
        ("LA", "PNG", (100, 255), (100, 100, 100), 0),
        ("LA", "PNG", (100, 0), (255, 255, 255), 0),
        ("RGBA", "TIFF", (200, 100, 0, 255), (200, 100, 0), 0),
        ("CMYK", "TIFF", (0, 255, 255, 0), (255, 0, 0), 0),
        ("CMYK", "JPEG", (0, 255, 255, 0), (255, 0, 0), 6),
        pytest.param("YCbCr", "TIFF", (76, 85, 255), (254, 0, 0), 2, marks=reads_its_own_ycbcr),
        ("YCbCr", "JPEG", (76, 85, 255), (254, 0, 0), 3),
        ("LAB", "TIFF", (138, 209, 198), (255, 0, 0), 6),
        ("LAB", "TIFF", (255, 128, 128), (255, 255, 255), 2),
    ],
)  # fmt: skip
def test_every_colour_space_becomes_the_colours_it_means(mode, format, pixel, wanted, within):
    stream = io.BytesIO()
    Image.new(mode, (16, 16), pixel).save(stream, format)
    got = open_image(stream.getvalue()).getpixel((8, 8))
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= within, got
