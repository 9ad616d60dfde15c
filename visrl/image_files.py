"""What of an image's file is pixels. Metadata is taken off before a decoder sees the file, and work is bounded.

A text, profile, thumbnail or comment, whole or damaged, must not decide whether the pixels are read, nor must a file
make a decoder work without end: progressive JPEGs of thousands of empty scans, millions of tiny chunks, frames and
strips. The only thing kept from the metadata is the orientation, where it can be read. Damage to what the pixels need
is left in place, for the decoder to find. Nothing here decodes pixels, and no setting of Pillow is changed.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import BinaryIO, NamedTuple

from visrl.errors import UserError

MAX_PARTS = 100_000  # chunks, segments or blocks of one file: a real image has some thousand at most
MAX_STRIPS = 200_000  # strips or tiles of a TIFF
# JPEGs of cameras and editors have up to 20 scans. An empty scan costs a decoder 0.3 ns a pixel: a second in all.
MAX_SCANS = 200
MAX_SCANNED_PIXELS = 4_000_000_000

_ORIENTATION = 0x0112  # the EXIF tag, and TIFF's
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:=["']|>)([1-8])""")
_MAX_INFLATED = 1 << 20  # of metadata that may hold an orientation


class ImageError(UserError, ValueError):
    """An image that cannot be used; the message names it and says why."""


class CleanImageFile(NamedTuple):
    """A file for the decoder, without its metadata, and the EXIF orientation (1 to 8) that the metadata told."""

    stream: BinaryIO
    orientation: int


def without_metadata(file: BinaryIO, name: str, max_pixels: int, header_only: bool = False) -> CleanImageFile:
    """The image in `file` (at its beginning) with nothing in it but what its pixels need.

    With `header_only` the result may end after the header: enough for a size and an orientation. Formats that hold
    nothing to take off (BMP, PPM, JPEG 2000) are given back as they are.

    Raises:
        ImageError: more scans, chunks, strips or pixels than a decoder is asked to bear, or a header that is cut short;
            the message opens with `name`.
    """
    start = file.read(16)
    file.seek(0)
    try:
        if start.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(file, name, header_only)
        if start.startswith(b"\xff\xd8"):
            return _jpeg(file, name, header_only)
        if start.startswith((b"GIF87a", b"GIF89a")):
            return _gif(file, name)
        if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            return _webp(file, name, max_pixels)
        if start.startswith((b"II", b"MM")):
            return _tiff(file.read(), name, max_pixels)
    except (struct.error, IndexError) as error:  # the file ends where a length or a table should be
        raise ImageError(f"{name} cannot be read as a picture: it is cut short or damaged in its header") from error
    return CleanImageFile(file, 1)


# --- PNG ------------------------------------------------------------------------------------------------------------

_SAMPLES_OF_TRNS = {0: 2, 2: 6}  # colour type → bytes of its transparent colour


def _png(file: BinaryIO, name: str, header_only: bool) -> CleanImageFile:
    """Critical chunks as they are, transparency where it is whole; texts, profiles, times and later frames go."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    kept, orientation, header, seen_pixels = [file.read(8)], 0, b"", False
    for _ in range(MAX_PARTS):
        head = file.read(8)
        if len(head) < 8 or not head[4:].isalpha():
            break
        kind = head[4:]
        length = min(struct.unpack(">I", head[:4])[0], size)  # a claim beyond the file must not reserve memory
        if kind[:1].isupper():
            if header_only and kind == b"IDAT":
                if not seen_pixels:
                    kept.append(struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
                file.seek(length + 4, io.SEEK_CUR)
            else:
                body = file.read(length + 4)
                kept.append(head + body)
                header = body[:13] if kind == b"IHDR" else header
            seen_pixels = seen_pixels or kind == b"IDAT"
            if kind == b"IEND":
                break
        elif kind in (b"tRNS", b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
            body, check = file.read(length), file.read(4)
            is_whole = check == struct.pack(">I", zlib.crc32(kind + body))
            if kind == b"tRNS":
                if is_whole and (body := _transparency(header, body)):
                    kept.append(struct.pack(">I", len(body)) + kind + body)
                    kept.append(struct.pack(">I", zlib.crc32(kind + body)))
            elif is_whole and not orientation:
                orientation = _png_orientation(kind, body)
        else:
            file.seek(length + 4, io.SEEK_CUR)
    else:
        raise ImageError(f"{name} is a PNG of more than {MAX_PARTS:,} chunks")
    if kept[-1][4:8] != b"IEND":
        kept.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return CleanImageFile(io.BytesIO(b"".join(kept)), orientation or 1)


def _transparency(header: bytes, body: bytes) -> bytes:
    """A tRNS chunk that fits the pixels, or nothing: its colour is compared with samples as Pillow scales them."""
    if len(header) < 10:
        return b""
    depth, colour = header[8], header[9]
    if colour == 3:
        return body[:256]
    if len(body) != _SAMPLES_OF_TRNS.get(colour):
        return b""
    samples = struct.unpack(f">{len(body) // 2}H", body)
    if colour == 2 and depth == 16:  # of 16 bits Pillow keeps the upper 8
        samples = tuple(sample >> 8 for sample in samples)
    elif colour == 0 and depth in (2, 4):
        samples = tuple((sample & ((1 << depth) - 1)) * 255 // ((1 << depth) - 1) for sample in samples)
    return struct.pack(f">{len(samples)}H", *samples)


def _png_orientation(kind: bytes, body: bytes) -> int:
    """The orientation in an eXIf chunk, ImageMagick's raw profile or XMP text; 0 where there is none."""
    if kind == b"eXIf":
        return _exif_orientation(body)
    keyword, _, rest = body.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp"):
        return 0
    if kind == b"iTXt":
        is_packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    else:
        is_packed, rest = kind == b"zTXt", rest[1:] if kind == b"zTXt" else rest
    if is_packed:
        try:
            rest = zlib.decompressobj().decompress(rest, _MAX_INFLATED)
        except zlib.error:
            return 0
    if keyword.startswith(b"Raw"):  # "\nexif\n  LENGTH\n" and then hexadecimal digits
        digits = b"".join(rest.split(b"\n")[3:])
        if re.fullmatch(rb"(?:[0-9a-fA-F]{2})+", digits) is None:
            return 0
        return _exif_orientation(bytes.fromhex(digits.decode("ascii")))
    return _xmp_orientation(rest)


# --- JPEG -----------------------------------------------------------------------------------------------------------

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a segment: TEM and restarts
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14, _COMMENT = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers: they hold the size


def _jpeg(file: BinaryIO, name: str, header_only: bool) -> CleanImageFile:
    """Tables, frame and scans. Of the application segments those that say how colours are coded stay: JFIF and Adobe.

    Markers are found as libjpeg finds them, past any bytes between segments, so that a wrong length loses a segment
    and not the image.
    """
    data = file.read(1 << 16) if header_only else file.read()
    while header_only and not _has_scan(data):
        more = file.read(len(data))
        data += more
        if not more:
            break
    kept, orientation, pixels, place = [data[:2]], 0, 0, 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, place)
        if found is None or found[1][0] in (_EOI, _SOS):
            rest = b"" if found is None else data[found.start() :]
            break
        kind, place = found[1][0], found.end()
        if kind in _ALONE or kind == _SOI:
            continue
        length = struct.unpack_from(">H", data, place)[0]
        body = data[place + 2 : place + length]
        place += max(length, 2)
        if kind in _FRAMES and len(body) >= 5:
            pixels = body[1] * 256 + body[2]
            pixels *= body[3] * 256 + body[4]
        if kind == _APP1 and not orientation:
            if body.startswith(b"Exif\0\0"):
                orientation = _exif_orientation(body)
            elif body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                orientation = _xmp_orientation(body)
        if not _is_application_data(kind, body):
            kept.append(b"\xff" + found[1] + data[place - max(length, 2) : place])
    else:
        raise ImageError(f"{name} is a JPEG of more than {MAX_PARTS:,} segments")
    if not header_only:
        _check_scans(rest, pixels, name)
    return CleanImageFile(io.BytesIO(b"".join([*kept, rest])), orientation or 1)


def _is_application_data(kind: int, body: bytes) -> bool:
    if kind == _APP0:
        return not (body.startswith(b"JFIF\0") and len(body) >= 14)
    if kind == _APP14:
        return not (body.startswith(b"Adobe") and len(body) >= 12)
    return _APP0 < kind <= 0xEF or kind == _COMMENT


def _has_scan(data: bytes) -> bool:
    """Whether the segments from the beginning reach a scan; so much of a file is its header."""
    place = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, place)
        if found is None:
            return False
        if found[1][0] in (_EOI, _SOS):
            return True
        place = found.end()
        if found[1][0] not in _ALONE and found[1][0] != _SOI:
            if len(data) < place + 2:
                return False
            place += max(struct.unpack_from(">H", data, place)[0], 2)
    return True


def _check_scans(data: bytes, pixels: int, name: str) -> None:
    """Count the scans in what follows a JPEG's header. Each is a pass over all coefficients, however little it holds.

    Raises:
        ImageError: more of them than `MAX_SCANS`, or than `MAX_SCANNED_PIXELS` allow for `pixels`.
    """
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1))
    scans = parts = place = 0
    while (found := _MARKER.search(data, place)) is not None and found[1][0] != _EOI:
        kind, place = found[1][0], found.end()
        if kind in _ALONE:
            continue
        if len(data) >= place + 2:
            place += max(struct.unpack_from(">H", data, place)[0], 2)
        scans, parts = scans + (kind == _SOS), parts + 1
        if scans > most:
            raise ImageError(f"{name} is a JPEG of more than {most:,} scans: save it anew, as baseline")
        if parts > MAX_PARTS:
            raise ImageError(f"{name} is a JPEG of more than {MAX_PARTS:,} segments")


# --- GIF and WebP ---------------------------------------------------------------------------------------------------


def _gif(file: BinaryIO, name: str) -> CleanImageFile:
    """The screen, the last control block before the first frame, and that frame; comments and extensions go."""
    data = file.read()
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept, control = data[:place], b""
    blocks = 0
    while data[place] not in (0x2C, 0x3B):  # the first frame, or the end
        blocks += 1
        start, place = place, place + 1
        if data[start] != 0x21:
            continue  # a stray byte between blocks
        place += 1
        while size := data[place]:
            place += 1 + size
            blocks += 1
            if blocks > MAX_PARTS:
                break
        if blocks > MAX_PARTS:
            raise ImageError(f"{name} is a GIF of more than {MAX_PARTS:,} blocks before its first frame")
        place += 1
        if data[start + 1] == 0xF9 and data[start + 2] >= 4:
            control = data[start:place]
    return CleanImageFile(io.BytesIO(kept + control + data[place:]), 1)


def _webp(file: BinaryIO, name: str, max_pixels: int) -> CleanImageFile:
    """The canvas and the first frame with its transparency. The decoder reserves the canvas before it is asked for a
    size, so the size is looked at here."""
    data = file.read()
    kept: list[bytes] = []
    orientation, place, size = 0, 12, (0, 0)
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            break
        kind, length = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        body = data[place + 8 : place + 8 + length]
        if kind == b"VP8X":
            size = (1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
            kept.append(data[place : place + 8] + bytes([body[0] & 0x12]) + body[1:])  # alpha and animation alone
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[place : place + 8 + length + length % 2])
            if not any(size):
                size = _webp_size(kind, body)
        elif kind == b"EXIF" and not orientation:
            orientation = _exif_orientation(body)
        elif kind == b"XMP " and not orientation:
            orientation = _xmp_orientation(body)
        if kind == b"ANMF" or (kind in (b"VP8 ", b"VP8L") and place + 8 + length > len(data)):
            # Later frames are never shown. (Metadata comes after them, and so an animation is not turned.)
            break
        place += 8 + length + length % 2
    else:
        raise ImageError(f"{name} is a WebP of more than {MAX_PARTS:,} chunks")
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"{name} has {size[0]} × {size[1]} pixels, more than {max_pixels:,}")
    whole = b"".join(kept)
    # A file cut short keeps the length that it claims, so that the decoder sees the cut.
    missing = max(struct.unpack_from("<I", data, 4)[0] + 8 - len(data), 0)
    head = b"RIFF" + struct.pack("<I", min(4 + len(whole) + missing, 0xFFFFFFFE)) + b"WEBP"
    return CleanImageFile(io.BytesIO(head + whole), orientation or 1)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


# --- TIFF -----------------------------------------------------------------------------------------------------------

# The tags that pixels need. Names, dates, resolutions, profiles, thumbnails and what cameras add are not among them.
_TIFF_TAGS = frozenset({
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 321, 322, 323, 324, 325, 332, 334,
    338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 32995, 32996, 34925,
})  # fmt: skip
_STRIPS, _TILE_SIZES, _SIZES = (273, 279, 324, 325), (322, 323), (256, 257)


def _tiff(data: bytes, name: str, max_pixels: int) -> CleanImageFile:
    """The first directory with the tags that pixels need, in its place; further directories (pages) go."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in (data[2], data[3])
    count_code, entry_code, word = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    start = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", data, 8 if is_big else 4)[0]
    count = struct.unpack_from(f"{order}{count_code}", data, start)[0]
    first, entry_size = start + struct.calcsize(f"{order}{count_code}"), 4 + 2 * word
    if count > MAX_PARTS:
        raise ImageError(f"{name} is a TIFF of more than {MAX_PARTS:,} tags")
    kept: list[bytes] = []
    orientation, values = 1, dict.fromkeys((*_SIZES, *_TILE_SIZES), 0)
    for place in range(first, first + count * entry_size, entry_size):
        tag, kind, items = struct.unpack_from(f"{order}{entry_code}", data, place)
        value = struct.unpack_from(order + {3: "H", 16: "Q"}.get(kind, "I"), data, place + 4 + word)[0]
        if tag in values:
            values[tag] = max(values[tag], value)
        if tag == _ORIENTATION and kind == 3 and 1 <= value <= 8:
            orientation = value
        if tag in _STRIPS and items > MAX_STRIPS:
            raise ImageError(f"{name} is a TIFF of {items:,} strips or tiles, more than {MAX_STRIPS:,}")
        if tag in _TIFF_TAGS:
            kept.append(data[place : place + entry_size])
    for tags in (_SIZES, _TILE_SIZES):
        width, height = (values[tag] for tag in tags)
        if width * height > max_pixels:
            raise ImageError(f"{name} has {width} × {height} pixels, more than {max_pixels:,}")
    table = struct.pack(f"{order}{count_code}", len(kept)) + b"".join(kept) + bytes(word)
    changed = bytearray(data)
    changed[start : start + len(table)] = table
    return CleanImageFile(io.BytesIO(changed), orientation)


# --- Orientation ----------------------------------------------------------------------------------------------------


def _exif_orientation(data: bytes) -> int:
    """The orientation tag of an EXIF block (which is a small TIFF), 0 where there is none or the block is damaged."""
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2].upper())
    if order is None:
        return 0
    try:
        start = struct.unpack_from(f"{order}I", data, 4)[0]
        for index in range(struct.unpack_from(f"{order}H", data, start)[0]):
            tag, kind, items, value = struct.unpack_from(f"{order}HHIH", data, start + 2 + index * 12)
            if tag == _ORIENTATION:
                return value if kind == 3 and items == 1 and 1 <= value <= 8 else 0
    except struct.error:  # the block ends before its directory does
        pass
    return 0


def _xmp_orientation(data: bytes) -> int:
    found = _XMP_ORIENTATION.search(data)
    return int(found[1]) if found else 0
