"""What of a file is pixels: damaged or huge metadata changes nothing, and no file keeps a decoder busy."""

from __future__ import annotations

import io
import struct
import time
import zlib

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from visrl.image_files import MAX_SCANNED_PIXELS, MAX_SCANS
from visrl.images import ImageError, image_size, open_image

SIZE = (64, 48)


def saved(format: str, mode: str = "RGB", **options) -> bytes:
    """A picture whose upper left quarter is blue, the rest red."""
    image = Image.new("RGB", SIZE, (200, 30, 30))
    image.paste((20, 20, 220), (0, 0, 32, 24))
    stream = io.BytesIO()
    image.convert(mode).save(stream, format, **options)
    return stream.getvalue()


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def chunk(kind: bytes, body: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(kind + body) if check is None else check
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png_with(*chunks: bytes, mode: str = "RGB") -> bytes:
    """A PNG with chunks after its header."""
    data = saved("PNG", mode)
    return data[:33] + b"".join(chunks) + data[33:]


def segment(marker: int, body: bytes, length: int | None = None) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2 if length is None else length) + body


def jpeg_with(*segments: bytes, **options) -> bytes:
    data = saved("JPEG", quality=95, **options)
    return data[:2] + b"".join(segments) + data[2:]


# --- Metadata -------------------------------------------------------------------------------------------------------

MEGABYTES = zlib.compress(bytes(3_000_000))
PNG_METADATA = {
    "3 MB of zTXt": [chunk(b"zTXt", b"Comment\0\0" + MEGABYTES)],
    "3 MB of iTXt": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MEGABYTES)],
    "70 MB of texts": [chunk(b"zTXt", b"Comment\0\0" + MEGABYTES)] * 24,
    "3 MB of tEXt": [chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000)],
    "3 MB of iCCP": [chunk(b"iCCP", b"profile\0\0" + MEGABYTES)],
    "damaged iCCP": [chunk(b"iCCP", b"profile\0\0no zlib")],
    "iCCP of another method": [chunk(b"iCCP", b"profile\0\7" + MEGABYTES)],
    "empty chunks": [chunk(kind, b"") for kind in (b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"pHYs", b"gAMA", b"tRNS")],
    "damaged eXIf": [chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")],
    "eXIf of nothing": [chunk(b"eXIf", b"Exif\0\0")],
    "eXIf with a bad CRC": [chunk(b"eXIf", exif_of(6)[6:], check=1)],
    "text with a bad CRC": [chunk(b"tEXt", b"Comment\0hello", check=1)],
    "sRGB and pHYs with bad CRCs": [chunk(b"sRGB", b"\0", check=2), chunk(b"pHYs", bytes(9), check=3)],
    "transparency with a bad CRC": [chunk(b"tRNS", bytes(6), check=1)],
    "transparency of another length": [chunk(b"tRNS", b"\0")],
    "an unknown private chunk": [chunk(b"vsRl", b"?" * 50, check=9)],
    "damaged animation control": [chunk(b"acTL", b"\0"), chunk(b"fcTL", b"\0\1")],
}  # fmt: skip


@pytest.mark.parametrize("kind", PNG_METADATA)
def test_no_chunk_beside_the_pixels_keeps_a_png_from_being_read(kind):
    data = png_with(*PNG_METADATA[kind])
    image = open_image(data)
    assert image.tobytes() == pixels(saved("PNG"))
    assert image_size(data) == SIZE


def test_damage_after_a_pngs_pixels_changes_nothing():
    whole = saved("PNG")
    assert whole[-12:] == chunk(b"IEND", b"")
    for tail in (
        b"",
        b"\0\0",
        b"garbage of a full chunk's length",
        chunk(b"tEXt", b"x", check=0),
    ):
        assert open_image(whole[:-12] + tail).tobytes() == pixels(whole)


def test_damage_to_a_pngs_pixels_is_still_an_error():
    whole = saved("PNG")
    start = whole.index(b"IDAT")
    (length,) = struct.unpack(">I", whole[start - 4 : start])
    for damaged in (
        whole[: start + 4 + length // 2],
        whole[: start + 10] + b"\0\0\0\0" + whole[start + 14 :],
        whole[:29] + b"\0\0\0\0" + whole[33:],
    ):
        with pytest.raises(ImageError, match="cannot be read as a picture"):
            open_image(damaged)


JPEG_METADATA = {
    "damaged EXIF": [segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")],
    "EXIF cut short": [segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\1")],
    "orientation of another type": [segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\5\0\1\0\0\0\xff\xff\xff\xff")],
    "orientation 77": [segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x4d\0\0\0")],
    "ICC of which a part is missing": [segment(0xE2, b"ICC_PROFILE\0\3\7half a profile")],
    "a multi-picture index of nothing": [segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")],
    "Photoshop's block cut short": [segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\xff\xff\xff\xff")],
    "JFIF cut short": [segment(0xE0, b"JFIF\0\1")],
    "Adobe cut short": [segment(0xEE, b"Adobe\0")],
    "a comment of 60,000 bytes": [segment(0xFE, b"\xff\xda" * 30_000)],
    "a segment of no length": [segment(0xE5, b"", length=0)],
    "a length too short": [segment(0xE1, b"Exif\0\0 more than it says", length=8)],
    "filling between segments": [b"\xff\xff\xff", segment(0xE7, b"x")],
}


@pytest.mark.parametrize("kind", JPEG_METADATA)
def test_no_application_segment_keeps_a_jpeg_from_being_read(kind):
    data = jpeg_with(*JPEG_METADATA[kind])
    assert open_image(data).tobytes() == pixels(saved("JPEG", quality=95))
    assert image_size(data) == SIZE


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_how_a_jpeg_codes_its_colours_is_kept(mode):
    data = saved("JPEG", mode, quality=95)
    assert open_image(data).tobytes() == pixels(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_is_read_without_the_tags_that_are_no_pixels(order):
    """A directory with a name that lies beyond the file, a resolution of 0/0 and a profile of no length."""
    tags = [
        (256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (270, 2, 999_999, 999_999),
        (273, 4, 1, 8), (274, 3, 1, 3), (277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, 4), (282, 5, 1, 12),
        (34665, 4, 1, 0xFFFFFFFF), (34675, 7, 0xFFFFFFFF, 0xFFFFFFFF),
    ]  # fmt: skip
    body = bytes([10, 20, 30, 40]) + bytes(12)
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}", *value)
        for tag, kind, count, number in tags
        for value in [(number, 0) if kind == 3 else (number,)]
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 8)  # the next page is no page
    image = open_image(head + body + directory)
    assert [image.getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [40, 30, 20, 10], "turned upside down"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_readable_orientation_turns_every_format_as_pillow_does(format, orientation):
    data = saved(format, exif=exif_of(orientation))
    assert open_image(data).tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").tobytes()
    assert image_size(data) == open_image(data).size


def test_the_orientation_of_xmp_and_of_imagemagicks_profiles_is_read():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    raw = b"\nexif\n%8d\n" % len(exif_of(6)) + exif_of(6).hex().encode() + b"\n"
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    for data in (
        saved("PNG", pnginfo=texts),
        jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))),
        png_with(chunk(b"tEXt", b"Raw profile type APP1\0" + raw)),
        saved("WEBP", xmp=xmp, lossless=True),
    ):
        assert open_image(data).size == image_size(data) == (48, 64)


# --- Bounds ---------------------------------------------------------------------------------------------------------


def scans_of_nothing(count: int, side: int = 800) -> bytes:
    """A grey progressive JPEG of one scan of equal blocks and `count` scans of one coefficient, 0 everywhere."""
    blocks = (side // 8) ** 2
    ends = "".join(f"0{min(blocks - at, 32767) - 16384:014b}" for at in range(0, blocks - 16383, 32767))
    ends += "10" * (blocks - sum(min(blocks - at, 32767) for at in range(0, blocks - 16383, 32767)))

    def coded(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    scans = [segment(0xDA, bytes([1, 1, 0, 1 + at % 63, 1 + at % 63, 0])) + coded(ends) for at in range(count)]
    return b"".join([
        b"\xff\xd8", segment(0xDB, bytes([0] + [1] * 64)),
        segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])),
        segment(0xC4, bytes([0, 1] + [0] * 15 + [0])), segment(0xC4, bytes([0x10, 1, 1] + [0] * 14 + [0xE0, 0])),
        segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + coded("0" * blocks), *scans, b"\xff\xd9",
    ])  # fmt: skip


def test_a_jpeg_of_thousands_of_empty_scans_is_refused_before_it_is_decoded():
    assert open_image(scans_of_nothing(MAX_SCANS - 1)).getpixel((5, 5)) == (128, 128, 128)
    for count, side in ((MAX_SCANS, 800), (40_000, 160)):
        began = time.perf_counter()
        with pytest.raises(ImageError, match="JPEG of more than 200 scans"):
            open_image(scans_of_nothing(count, side))
        assert time.perf_counter() - began < 2
    few = MAX_SCANNED_PIXELS // 9600**2
    assert few < MAX_SCANS
    with pytest.raises(ImageError, match=f"JPEG of more than {few} scans"):
        open_image(scans_of_nothing(few, side=9600))


def test_progressive_pictures_of_editors_are_read():
    data = saved("JPEG", quality=95, progressive=True)
    assert 5 < data.count(b"\xff\xda") < 30
    assert open_image(data).tobytes() == pixels(data)


def gif_of_comments(blocks: int) -> bytes:
    data = saved("GIF")
    start = 13 + (3 << (data[10] & 7) + 1)
    return data[:start] + b"\0\x21\xfe" + b"\x01x" * blocks + b"\0" + data[start:]


def test_chunks_segments_and_blocks_without_end_are_refused():
    few = 1_000_000
    for data in (
        png_with(chunk(b"tEXt", b"") * few),
        saved("PNG")[:33] + chunk(b"IDAT", b"") * few,
        jpeg_with(segment(0xFE, b"") * few),
        saved("JPEG")[:-2] + segment(0xFE, b"") * few,
        gif_of_comments(few),
    ):
        began = time.perf_counter()
        with pytest.raises(ImageError, match=r"of more than 100,000 (chunks|segments|blocks)"):
            open_image(data)
        assert time.perf_counter() - began < 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_the_first_is_read_alone(format):
    frames = [Image.new("RGB", SIZE, (shade, 0, 0)) for shade in range(200, 0, -2)]
    stream = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(stream, format, save_all=True, append_images=frames[1:], **options)
    data = stream.getvalue()
    began = time.perf_counter()
    assert open_image(data).getpixel((9, 9)) == (200, 0, 0)
    assert time.perf_counter() - began < 0.5


def test_a_comment_before_a_gifs_first_frame_is_passed_over():
    assert open_image(gif_of_comments(5_000)).tobytes() == pixels(saved("GIF"))


def test_a_webps_canvas_is_looked_at_before_the_decoder_reserves_it():
    wide = b"VP8X" + struct.pack("<I", 10) + bytes([0, 0, 0, 0]) + (16383 - 1).to_bytes(3, "little") * 2
    for body in (wide, b"VP8L" + struct.pack("<I", 5) + b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little")):
        data = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
        with pytest.raises(ImageError, match="has 16383 × 16383 pixels"):
            open_image(data)


def test_a_tiff_of_too_many_strips_or_too_large_tiles_is_refused():
    def tiff(*tags: tuple[int, int, int, int]) -> bytes:
        entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)

    with pytest.raises(ImageError, match="500,000 strips or tiles"):
        open_image(tiff((256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 500_000, 8)))
    with pytest.raises(ImageError, match="has 60000 × 60000 pixels"):
        open_image(tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000)))
    with pytest.raises(ImageError, match="has 100000 × 100000 pixels"):
        open_image(tiff((256, 4, 1, 9), (257, 4, 1, 9), (322, 4, 1, 100_000), (323, 4, 1, 100_000)))


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(200_000_001)  # sparse: it takes no room
    with pytest.raises(ImageError, match="has 200,000,001 bytes, more than 200,000,000"):
        open_image(str(path))
    with pytest.raises(ImageError, match="more than 200,000,000"):
        image_size(str(path))
