"""Measure the peak memory and time of reading videos and images.

The cases are the videos that are named, an hour of synthetic video, and an image of 20,000 x
20,000 pixels as PNG and as JPEG. Each case runs in a separate process. The first line is for a
process that only imports the readers; subtract it to get the cost of reading a file. The first run
creates the synthetic files.

usage: python benchmarks/media.py [--work FOLDER] [--seconds 3600] [VIDEO ...]
"""

import argparse
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lwm.media.images import read_image
from lwm.media.videos import iterate_frames, read_video

SIDE = 20_000


def make_hour(path: Path, seconds: int) -> None:
    """Write H.264 at 640 x 360, with 30 frames per second and a keyframe every 250 frames."""
    rows, columns = np.mgrid[:360, :640]
    pictures = []
    for step in range(60):
        red = (columns + 4 * step) % 256
        green = (rows + 2 * step) % 256
        pixels = np.stack([red, green, (red * green) >> 8], axis=-1).astype(np.uint8)
        pictures.append(
            av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for index in range(30 * seconds):
            picture = pictures[index % len(pictures)]
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def make_png(path: Path) -> None:
    """Write a PNG row by row, so that the whole image is never in memory."""
    columns = np.arange(SIDE)
    compress = zlib.compressobj(1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    with path.open("wb") as file:
        header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header))
        for row in range(SIDE):
            pixels = np.stack(
                [columns >> 7, columns * 0 + (row >> 7), (columns ^ row) >> 6], axis=-1
            )
            filtered = b"\0" + pixels.astype(np.uint8).tobytes()
            if data := compress.compress(filtered):
                file.write(chunk(b"IDAT", data))
        file.write(chunk(b"IDAT", compress.flush()) + chunk(b"IEND", b""))


def make_jpeg(path: Path) -> None:
    rows = np.arange(SIDE, dtype=np.uint16)[:, None]
    columns = rows.T
    # As bytes, because one plane of 64-bit integers takes 3 GB.
    planes = [
        np.broadcast_to((columns >> 7).astype(np.uint8), (SIDE, SIDE)),
        np.broadcast_to((rows >> 7).astype(np.uint8), (SIDE, SIDE)),
        (rows >> 6).astype(np.uint8) ^ (columns >> 6).astype(np.uint8),
    ]
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
    image.save(path, quality=90)


def one(case: str, path: str) -> None:
    """Run one case in the measured process."""
    start = time.perf_counter()
    match case:
        case "nothing":
            shape = ()
        case "image":
            shape = read_image(path, 256).shape
        case "8 frames":
            shape = read_video(path, 256, max_frames=8).shape
        case "64 frames":
            shape = read_video(path, 256, max_frames=64).shape
        case "1 a second":
            shape = (sum(1 for _ in iterate_frames(path, 256, fps=1.0)),)
        case _:
            raise AssertionError(case)
    seconds = time.perf_counter() - start
    # `getrusage` would include the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(f"{Path(path).name:24} {case:10} {peak:8.0f} MiB {seconds:8.1f} s  {shape}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/media"))
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--one")
    parser.add_argument("videos", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, str(arguments.videos[0]))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    hour = arguments.work / f"{arguments.seconds}_seconds.mp4"
    large = [arguments.work / "20000.png", arguments.work / "20000.jpg"]
    makers = {hour: lambda path: make_hour(path, arguments.seconds)}
    makers |= {large[0]: make_png, large[1]: make_jpeg}
    for path, make in makers.items():
        if not path.exists():
            partial = path.with_name(f"partial_{path.name}")
            make(partial)
            partial.rename(path)
    cases = [("nothing", hour)]
    cases += [(case, path) for path in arguments.videos for case in ("8 frames", "64 frames")]
    cases += [(case, hour) for case in ("8 frames", "64 frames", "1 a second")]
    cases += [("image", path) for path in large]
    for case, path in cases:
        subprocess.run([sys.executable, __file__, "--one", case, str(path)], check=True)


if __name__ == "__main__":
    main()
