"""Opening pictures: orientation, transparency, bounds, and damage that must end in one clear error."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path

import pytest
from PIL import Image

from visrl.box import Box
from visrl.conversation import crop_view, open_view
from visrl.images import ImageError, crop, image_path, image_size, open_image
from visrl.records import Picture


def picture_bytes(size=(64, 48), mode="RGB", format="PNG", colour=(200, 30, 30), orientation=None) -> bytes:
    image = Image.new("RGB", size, colour)
    image.paste((20, 20, 220), (0, 0, size[0] // 2, size[1] // 2))  # the upper left quarter is blue
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    image.convert(mode).save(stream, format, exif=exif.tobytes(), **({"quality": 95} if format == "JPEG" else {}))
    return stream.getvalue()


def blue_corner(image: Image.Image) -> tuple[bool, bool]:
    """Whether the blue quarter is at the left, and at the top."""
    quarters = {
        (x, y): image.getpixel((image.width * (1 if x else 3) // 4, image.height * (1 if y else 3) // 4))
        for x in (True, False)
        for y in (True, False)
    }
    return max(quarters, key=lambda place: quarters[place][2] - quarters[place][0])


def test_without_annotation_the_exif_tag_turns_the_picture():
    data = picture_bytes(format="JPEG", orientation=6)
    image = open_image(data)
    assert image.size == (48, 64) == image_size(data)
    assert blue_corner(image) == (False, True)


@pytest.mark.parametrize(("size", "corner"), [((64, 48), (True, True)), ((48, 64), (False, True))])
def test_the_annotated_size_decides_the_orientation(size, corner):
    image = open_image(picture_bytes(format="JPEG", orientation=6), size=size)
    assert image.size == size
    assert blue_corner(image) == corner


def test_a_scaled_copy_of_the_annotated_picture_is_taken_and_another_shape_refused():
    data = picture_bytes(format="JPEG")
    assert open_image(data, size=(640, 480)).size == (64, 48)
    with pytest.raises(ImageError, match="64 × 48 but annotated as 48 × 64"):
        open_image(data, size=(48, 64))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_exif_orientation_agrees_with_pillow(orientation):
    from PIL import ImageOps

    data = picture_bytes(format="PNG", orientation=orientation)
    meant = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert open_image(data).tobytes() == meant.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.new("L", (40, 30), 128)
    image = image.point(lambda value: value * 257, "I").convert("I;16") if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    opened = open_image(str(path))
    assert opened.mode == "RGB"
    if mode in ("L", "LA", "RGBA", "I;16"):
        assert all(abs(value - 128) <= 1 for value in opened.getpixel((5, 5)))


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_shown_on_white(mode, tmp_path):
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    if mode == "P":
        palette = Image.new("P", (40, 30), 0)
        palette.putpalette([10, 20, 30] * 256)
        palette.save(tmp_path / "a.png", transparency=0)
    else:
        image.save(tmp_path / "a.png")
    assert open_image("a.png", tmp_path).getpixel((3, 3)) == (255, 255, 255)


def test_paths_bytes_and_data_urls_give_the_same_picture(tmp_path):
    data = picture_bytes()
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    pictures = [open_image(str(tmp_path / "a.png")), open_image("a.png", tmp_path), open_image(data), open_image(url)]
    assert len({picture.tobytes() for picture in pictures}) == 1


def test_the_root_may_be_the_folder_of_one_data_set(tmp_path):
    (tmp_path / "1.png").write_bytes(picture_bytes())
    assert image_path("cot/gqa/1.png", tmp_path) == tmp_path / "1.png"
    assert image_path("cot/gqa/2.png", tmp_path) is None
    assert image_path("x" * 5000, tmp_path) is None
    assert image_path("a\0b", tmp_path) is None


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("nowhere.png", "no picture at nowhere.png"),
        ("https://example.org/a.png", "not fetched"),
        ("data:text/html;base64,AAAA", "no data URL of a picture"),
        ("data:image/png;base64,%%%", "not base64"),
        ("scene:nowhere/1", "names no drawn scene"),
        (b"", "cannot be read as a picture: none of JPEG"),
        (b"no picture at all", "cannot be read as a picture: none of JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(ref, message):
    with pytest.raises(ImageError, match=message):
        open_image(ref)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_with_its_name(format, tmp_path):
    noise = Image.effect_noise((200, 150), 60).convert("RGB")
    path = tmp_path / f"cut.{format.lower()}"
    noise.save(path, format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ImageError, match=r"cut\."):
        open_image(str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_they_are_decoded():
    def chunk(name: bytes, body: bytes) -> bytes:
        import struct
        import zlib

        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    import struct

    for side in (10_100, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        with pytest.raises(ImageError, match=r"more than [\d,]+( pixels)?$"):
            open_image(bomb)


def test_a_picture_is_cropped_by_its_box_and_opened_the_annotated_way_up(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture_bytes(size=(80, 60), format="JPEG", orientation=6))
    picture = Picture("a.jpg", Box(0.0, 0.0, 0.5, 0.5), (80, 60))
    detail = crop_view(open_view(picture, tmp_path), picture).image
    assert detail.size == (40, 30)
    assert detail.getpixel((10, 10))[2] > 180
    assert crop(Image.new("RGB", (100, 100)), Box(0.5, 0.5, 0.51, 0.51)).size == (29, 29)  # 28, rounded outward


def mutate(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place : place + rng.randrange(1, 40)]
        elif kind == 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 12))
        else:
            del changed[place:]
        if not changed:
            return b""
    return bytes(changed)


def fuzz_pictures(count: int) -> int:
    """Open `count` mutated pictures; how many were refused. Anything but a picture or an ImageError is a failure."""
    rng = random.Random(4)
    seeds = [
        picture_bytes(mode=mode, format=format, orientation=6)
        for mode, format in (
            ("RGB", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP"), ("P", "GIF"),
            ("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "PPM"),
        )
    ]  # fmt: skip
    refused = 0
    for _ in range(count):
        data = mutate(rng.choice(seeds), rng)
        try:
            assert open_image(data).mode == "RGB"
        except ImageError:
            refused += 1
    return refused


@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_mutated_pictures_are_pictures_or_clear_errors():
    assert 0 < fuzz_pictures(10_000) < 10_000


def test_relative_paths_are_looked_for_here_without_a_root(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture_bytes())
    monkeypatch.chdir(tmp_path)
    assert image_path("a.png") == Path("a.png")
    assert open_image("a.png").size == (64, 48)
