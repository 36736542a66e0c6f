"""Animated WebP, which FFmpeg does not take apart: times from its chunks, pictures by Pillow.
Knows nothing of other videos."""

import struct
from collections.abc import Iterator, Sequence

from PIL import Image

from lwm.core.errors import InputError
from lwm.media.choice import Timeline
from lwm.media.sources import File, decoder_errors
from lwm.media.still_images import MOST_BYTES, decode_cost, opaque, open_picture


def animation_times(file: File) -> Timeline | None:
    """When each picture of a WebP file appears; None for a still one."""
    times: list[float] = []
    clock = 0
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = struct.unpack("<I", head[4:])[0]
        place = file.tell()
        if head[:4] == b"ANMF":
            header = file.read(16)
            if len(header) < 16:
                break
            times.append(clock / 1000)
            # Browsers show a picture of no duration for a tenth of a second.
            clock += int.from_bytes(header[12:15], "little") or 100
        file.seek(place + size + size % 2)
    file.seek(0)
    return Timeline(times=times, end=clock / 1000) if times else None


def animation_frames(file: File, indices: Sequence[int], name: str) -> Iterator[Image.Image]:
    """The pictures of these ascending indices. Each is built upon the one before, so all up to the
    last are decoded, one at a time.

    Raises:
        InputError: the file is broken, or its pictures are beyond the bounds.
    """
    with decoder_errors(name, "an animated WebP"):
        image = open_picture(file, name)
        if decode_cost(image) > MOST_BYTES:
            raise InputError(
                f"{name} has frames of {image.width} x {image.height} pixels, which take more "
                f"than {MOST_BYTES >> 20} MiB to decode; scale it down"
            )
    for index in indices:
        with decoder_errors(name, "an animated WebP"):
            image.seek(index)
            image.load()
            picture = opaque(image)
        yield picture
