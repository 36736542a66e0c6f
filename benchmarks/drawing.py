"""Measure the speed of guided video generation and the memory of chats about videos.

A video of 8 frames is generated with guidance, which takes two rows of a batch; each code counts
once. For comparison, two rows of plain text are generated after prompts of the same length, with
equally many tokens each and one token per step; the tokens of both rows count. A guided code takes
the work of two rows, so guidance costs nothing extra if it reaches half the rate of plain text;
the printed ratio compares rows per second. Memory is the peak of a process that answers a question
about a given number of frames, and the increase per additional frame. The prompts are longer than
the model's trained context, which makes the answers meaningless but does not affect the cost.

usage: python benchmarks/drawing.py runs/reproduce/run [--rounds 5] [--chat 64 128 256 512]
"""

import argparse
import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import lwm
from lwm.engine.engine import Engine
from lwm.engine.request import Request
from lwm.engine.sampling import Sampling
from lwm.generation.frames import VIDEO, video_codes
from lwm.generation.vision_prompts import generation_prompt


def video(model: lwm.Model, frames: int, guidance: float) -> tuple[int, float]:
    """Return the number of codes of a guided video, including its first frame, and the seconds."""
    how = replace(VIDEO, guidance=guidance)
    start = time.perf_counter()
    codes = video_codes(
        model.engine_for, model.config, model.tokenizer, "the upper left of astronaut",
        frames=frames, sampling=how, first_sampling=how,
    )  # fmt: skip
    return codes.size, time.perf_counter() - start


def text(engine: Engine, prompt: list[int], tokens: int) -> tuple[int, float]:
    """Return the number of tokens in two rows of plain text, and the seconds."""
    sampling = Sampling(temperature=1.0, top_k=1000)
    requests = [
        Request(prompt=prompt, max_tokens=tokens, sampling=replace(sampling, seed=seed))
        for seed in range(2)
    ]
    engine.scheduler.forget()
    start = time.perf_counter()
    count = sum(1 for _ in engine.follow([engine.submit(request) for request in requests]))
    return count, time.perf_counter() - start


def chat(name: str, frames: int) -> None:
    """Run the chat in the measured process, and print its memory, tokens and seconds."""
    model = lwm.load(name, context=64 + frames * 80, theta=1e6)
    size = model.codec.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    part = {"type": "video", "video": pixels, "max_frames": frames}
    content = [{"type": "text", "text": "What does it show?"}, part]
    start = time.perf_counter()
    model.chat([{"role": "user", "content": content}], max_tokens=8)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024, model.timings.prompt, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--chat", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        chat(arguments.model, arguments.one)
        return
    model = lwm.load(arguments.model)
    assert model.config.vision is not None
    tokens = arguments.frames * model.config.vision.tokens_per_frame - 1
    prompt = generation_prompt(model.tokenizer, "the upper left of astronaut", "a video")
    engine = Engine(
        model.weights, model.config, slots=2, tokens=len(prompt) + tokens, drafts=False
    )
    video(model, arguments.frames, arguments.guidance)
    text(engine, prompt, tokens)
    rates: dict[str, list[float]] = {"guided video": [], "plain text, two rows": []}
    for _ in range(arguments.rounds):  # in turn, so that other work falls on both
        count, seconds = video(model, arguments.frames, arguments.guidance)
        rates["guided video"].append(count / seconds)
        count, seconds = text(engine, prompt, tokens)
        rates["plain text, two rows"].append(count / seconds)
    for name, values in rates.items():
        print(f"{name}: {np.median(values):,.0f} tokens/s")
    ratios = 2 * np.divide(rates["guided video"], rates["plain text, two rows"])
    print(f"rows a second, guided to plain: {np.median(ratios):.2f} (rounds {ratios.min():.2f} to "
          f"{ratios.max():.2f})")  # fmt: skip
    peaks: dict[int, float] = {}
    for frames in arguments.chat:
        command = [sys.executable, __file__, arguments.model, "--one", str(frames)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, prompt_tokens, seconds = map(float, output.split())
        peaks[frames] = peak
        print(f"chat over {frames} frames, {prompt_tokens:,.0f} tokens: peak {peak:,.0f} MiB, "
              f"{seconds:.1f} s")  # fmt: skip
    for less, more in itertools.pairwise(peaks):
        print(f"from {less} to {more} frames: {(peaks[more] - peaks[less]) / (more - less):.2f} "
              "MiB a frame")  # fmt: skip


if __name__ == "__main__":
    main()
