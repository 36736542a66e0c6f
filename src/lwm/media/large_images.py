"""Ways round a whole bitmap for pictures that would take too much memory: strips of a PNG, and
JPEGs that libjpeg reduces while decoding. Knows no bounds and no resizing.

Strips of a PNG are exact. Its rows are filtered against the row above, a job for C: a strip is
handed to Pillow as a small PNG of its own, which begins with the last row of the strip before.
"""

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, JpegImagePlugin, PngImagePlugin

from lwm.media.sources import File

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INFLATE = 1 << 20  # bytes taken out of the compressed stream at a time

# (bit depth, colour type) of the file: bytes a pixel, and the colour type with 8 bits a channel
# that has as many. Filters work on bytes, so 16-bit grey passes as grey with alpha.
_KINDS = {(8, 2): (3, 2), (8, 4): (2, 4), (8, 6): (4, 6), (16, 0): (2, 4)}


def has_strips(image: Image.Image, file: File) -> bool:
    """Whether `strips` can read the opened picture. What it cannot are interlaced ones, which
    have no strips, colour of 16 bits and 16-bit grey with a transparent level; those that take
    one byte a pixel do not need it."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or image.info.get("interlace"):
        return False
    kind = _kind(file)
    return kind in _KINDS and not (kind == (16, 0) and "transparency" in image.info)


def strips(image: Image.Image, file: File, pixels: int) -> Iterator[Image.Image]:
    """The rows of the opened PNG from top to bottom, about `pixels` at a time.

    Raises:
        ValueError, zlib.error: the file is broken or ends early.
    """
    kind = _kind(file)
    wide = kind == (16, 0)
    each, colour = _KINDS[kind]
    width, height = image.size
    row = 1 + width * each
    rows = max(1, pixels // width)
    above = bytes(row)
    stream = _Inflated(file)
    for top in range(0, height, rows):
        count = min(rows, height - top)
        small = _png(width, count + 1, colour, above + stream.take(count * row))
        decoded = PngImagePlugin.PngImageFile(small)
        above = b"\0" + decoded.crop((0, count, width, count + 1)).tobytes()
        strip = decoded.crop((0, 1, width, count + 1))
        if wide:
            strip = strip.getchannel(0)  # the high byte
        elif "transparency" in image.info:
            strip.info["transparency"] = image.info["transparency"]
        yield strip


def reduce(image: JpegImagePlugin.JpegImageFile, size: int) -> None:
    """Has libjpeg decode at a half, a quarter or an eighth of the sides, as far as the short one
    stays at `size` at least."""
    short = min(image.size)
    image.draft(None, (image.width * size // short, image.height * size // short))


def coefficient_bytes(image: JpegImagePlugin.JpegImageFile) -> int:
    """What libjpeg keeps of an opened JPEG beside the rows it is at: nothing where one scan holds
    everything, all coefficients where several do (a progressive one)."""
    file = image.fp
    assert file is not None
    place = file.tell()
    file.seek(2)
    coded, several = 0, bool(image.info.get("progressive"))
    while len(head := file.read(2)) == 2:
        if head[0] != 0xFF or head[1] in (0x00, 0xFF):
            file.seek(-1, 1)  # padding
            continue
        body = file.read(struct.unpack(">H", file.read(2))[0] - 2)
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):
            _, height, width, layers = struct.unpack(">BHHB", body[:6])
            coded = width * height * 2 * layers
            several |= head[1] in (0xC2, 0xCA)
        elif head[1] == 0xDA:
            several |= body[0] < image.layers
            break
    file.seek(place)
    return coded if several else 0


def _kind(file: File) -> tuple[int, int]:
    file.seek(24)
    depth, colour = file.read(2)
    return depth, colour


def _png(width: int, height: int, colour: int, rows: bytes) -> io.BytesIO:
    """A PNG of filtered rows, stored without compression."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    file = io.BytesIO()
    file.write(_SIGNATURE)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")):
        file.write(struct.pack(">I", len(data)) + name + data)
        file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))
    file.seek(0)
    return file


class _Inflated:
    """The decompressed data of a PNG, never more of it than asked for."""

    def __init__(self, file: File) -> None:
        self._chunks = _data_chunks(file)
        self._inflate = zlib.decompressobj()
        self._waiting = b""

    def take(self, count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            data = self._waiting or next(self._chunks, b"")
            # Without input left it still gives out what it holds back.
            part = self._inflate.decompress(data, count)
            self._waiting = self._inflate.unconsumed_tail
            if not part and (self._inflate.eof or not data):
                raise ValueError("the picture ends early")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _data_chunks(file: File) -> Iterator[bytes]:
    place = len(_SIGNATURE)
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length = struct.unpack(">I", head[:4])[0]
        place += 12 + length
        if head[4:] != b"IDAT":
            continue
        while length and (data := file.read(min(length, _INFLATE))):
            length -= len(data)
            yield data
