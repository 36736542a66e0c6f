"""Read animated WebP, which FFmpeg does not: frame times from its chunks, images with Pillow."""

import struct
from collections.abc import Iterator, Sequence

from PIL import Image

from lwm.core.errors import InputError
from lwm.media.choice import Timeline
from lwm.media.files import BinaryFile, decoder_errors
from lwm.media.still_images import MAX_BYTES, bitmap_bytes, opaque, open_image


def animation_times(file: BinaryFile) -> Timeline | None:
    """Return when each frame of a WebP file appears, or None for a still image."""
    times: list[float] = []
    clock = 0  # milliseconds
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = struct.unpack("<I", head[4:])[0]
        start = file.tell()
        if head[:4] == b"ANMF":
            header = file.read(16)
            if len(header) < 16:
                break
            times.append(clock / 1000)
            # Browsers show a frame of duration 0 for a tenth of a second.
            clock += int.from_bytes(header[12:15], "little") or 100
        file.seek(start + size + size % 2)
    file.seek(0)
    return Timeline(times=times, end=clock / 1000) if times else None


def animation_frames(file: BinaryFile, indices: Sequence[int], name: str) -> Iterator[Image.Image]:
    """Yield the frames of these ascending indices.

    A frame builds upon the one before it, so every frame up to the last index is decoded.

    Raises:
        InputError: the file is broken, or its frames are too large.
    """
    with decoder_errors(name, "an animated WebP"):
        image = open_image(file, name)
        if bitmap_bytes(image) > MAX_BYTES:
            raise InputError(
                f"{name} has frames of {image.width} x {image.height} pixels, which take more "
                f"than {MAX_BYTES >> 20} MiB to decode; scale it down"
            )
    for index in indices:
        with decoder_errors(name, "an animated WebP"):
            image.seek(index)
            image.load()
            frame = opaque(image)
        yield frame
