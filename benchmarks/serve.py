"""Load `lwm serve` as many clients at once do, and compare its speed with llama.cpp's server.

    python benchmarks/serve.py load --model smollm2 --minutes 10
    python benchmarks/serve.py speed --model smollm2
    python benchmarks/serve.py speed --peer /path/to/llama-server

`load` asks with 64 clients, short and long prompts, and lets a third of them leave at a random
moment. Every complete answer must be the one that the server gave alone. It prints quantiles of
the time to the first token and of tokens per second, and how memory grew over the last half.
`speed` prints the rate of one stream and of eight, the speed of reading 2,048 tokens, and the time
to the first token of a document of 8,000 tokens, at first and again in another slot. With a peer,
both servers run the same file alternately, and ratios of medians are printed. The peer is the
`llama-server` that cmake builds from llama.cpp's source.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx

from lwm.checkpoints.open import KNOWN_MODELS, open_checkpoint
from lwm.data.text.documents import read_text
from lwm.generation.load import open_tokenizer

CLIENTS, LEAVING = 64, 1 / 3
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals.",
    "Write a sentence about rain.",
    "What is two and two?",
)


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server until the block ends; wait until it is ready."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            if process.poll() is not None:
                sys.exit(f"{command[0]} ended with {process.returncode}")
            time.sleep(0.2)
        yield process, address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def our_server(model: str, slots: int, port: int) -> list[str]:
    return [
        sys.executable, "-m", "lwm", "serve", model, "--slots", str(slots), "--port", str(port),
        "--queue", "256", "--name", "model",
    ]  # fmt: skip


async def stream(
    client: httpx.AsyncClient, prompt: Any, tokens: int
) -> AsyncGenerator[tuple[float, str, int], None]:
    """Yield each piece of a completion, the time at which it came, and 0; at last, the tokens."""
    body = {
        "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body, timeout=None) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text = event["choices"][0]["text"] if event["choices"] else ""
                tokens = (event.get("usage") or {}).get("completion_tokens", 0)
                if text or tokens:
                    yield time.perf_counter(), text, tokens


def quantiles(values: list[float]) -> str:
    cuts = statistics.quantiles(values, n=100)
    return f"50th percentile {cuts[49]:.2f}, 99th {cuts[98]:.2f}"


def resident(process: subprocess.Popen[bytes]) -> int:
    """Return the memory of a process, in MiB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


async def load(address: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask with many clients for some time, and print what they saw."""
    book = read_text("book")
    prompts = [f"{question}\n" for question in QUESTIONS]
    prompts += [f"{book[start : start + 3000]}\nIn short:" for start in range(0, 40_000, 10_000)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits) as client:
        alone = []
        for prompt in prompts:
            alone.append("".join([piece async for _, piece, _ in stream(client, prompt, 48)]))
        end = time.perf_counter() + seconds
        first, rates, wrong, complete, left = [], [], 0, 0, 0

        async def ask(number: int) -> None:
            nonlocal wrong, complete, left
            choose = random.Random(number)
            while time.perf_counter() < end:
                which = choose.randrange(len(prompts))
                leaves = choose.random() < LEAVING
                patience = choose.expovariate(1 / 10) if leaves else None
                started, times, text, tokens = time.perf_counter(), [], "", 0
                try:
                    async with asyncio.timeout(patience):
                        async for moment, piece, count in stream(client, prompts[which], 48):
                            times.append(moment)
                            text += piece
                            tokens += count
                except TimeoutError:
                    left += 1
                    continue
                complete += 1
                wrong += text != alone[which]
                first.extend(moment - started for moment in times[:1])  # one may be empty
                if tokens > 1:
                    rates.append((tokens - 1) / (times[-1] - times[0]))

        memory = []

        async def watch() -> None:
            while True:
                memory.append(resident(process))
                await asyncio.sleep(2)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
        watching.cancel()
        metrics = (await client.get("/metrics")).text
    last = memory[len(memory) // 2 :]
    quarter = max(1, len(last) // 2)
    growth = statistics.mean(last[quarter:]) / statistics.mean(last[:quarter]) - 1
    slots = [line for line in metrics.splitlines() if line.startswith("lwm_slots_in_use ")]
    print(f"{complete} answers, {wrong} wrong, {left} clients left; {slots[0]}")
    print(f"seconds to the first token: {quantiles(first)}")
    print(f"tokens per second of a stream: {quantiles(rates)}")
    print(
        f"memory: {last[0]} to {last[-1]} MiB in the last half, {growth:+.1%} between its halves"
    )


async def rate(client: httpx.AsyncClient, streams: int, tokens: int = 96) -> float:
    """Return the tokens per second of so many streams together, after their prompts."""

    async def one(number: int) -> tuple[int, float, float]:
        prompt = f"A story about the number {number + random.randrange(10**6)}:"
        events = [(moment, count) async for moment, _, count in stream(client, prompt, tokens)]
        return events[-1][1], events[0][0], events[-1][0]

    parts = await asyncio.gather(*(one(number) for number in range(streams)))
    made = sum(count - 1 for count, _, _ in parts)  # the first comes with the prompt
    return made / (max(p[2] for p in parts) - min(p[1] for p in parts))


async def first_token(client: httpx.AsyncClient, prompt: Any) -> float:
    """Return the seconds to the first token."""
    started = time.perf_counter()
    async for moment, _, _ in stream(client, prompt, 2):
        return moment - started
    raise AssertionError("no token came")


async def speed(address: str, ids: list[int]) -> dict[str, float]:
    """Measure one server."""
    async with httpx.AsyncClient(base_url=address) as client:
        start = random.randrange(1, 100_000)
        return {
            "one stream, tokens/s": await rate(client, 1),
            "eight streams, tokens/s": await rate(client, 8),
            "prefill of 2,048, tokens/s": 2048
            / await first_token(client, ids[start : start + 2048]),
        }


async def shared_document(address: str, ids: list[int]) -> None:
    """Ask twice about one document, while the slot of the first request is still in use."""
    async with httpx.AsyncClient(base_url=address) as client:
        await first_token(client, ids[20_000:28_000])  # compiles
        document = ids[:7_900]
        started = time.perf_counter()
        holding = stream(client, [*document, 11], 200)
        await anext(holding)
        first = time.perf_counter() - started
        second = await first_token(client, [*document, 12])
        await holding.aclose()
    print(f"first token of 8,000: {first:.2f} s, again {second:.3f} s: {first / second:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a server.")
    parser.add_argument("what", choices=["load", "speed"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="llama-server's executable")
    arguments = parser.parse_args()
    ours = our_server(arguments.model, arguments.slots, 8765)
    if arguments.what == "load":
        with serving(ours, 8765) as (process, address):
            asyncio.run(load(address, process, arguments.minutes * 60))
        return
    tokenizer = open_tokenizer(open_checkpoint(arguments.model), None)
    assert tokenizer is not None
    ids = tokenizer.encode(read_text("book"))
    servers = {"lwm": ours}
    if arguments.peer:
        path = KNOWN_MODELS[arguments.model].installed()
        servers["llama-server"] = [
            arguments.peer, "--model", str(path), "--parallel", str(arguments.slots),
            "--ctx-size", str(arguments.slots * 8192), "--port", "8765", "--alias", "model",
        ]  # fmt: skip
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in servers}
    for _ in range(arguments.rounds):
        for name, command in servers.items():
            with serving(command, 8765) as (_, address):
                asyncio.run(speed(address, ids))  # compiles
                for what, value in asyncio.run(speed(address, ids)).items():
                    figures[name].setdefault(what, []).append(value)
                if name == "lwm":
                    asyncio.run(shared_document(address, ids))
    for what in figures["lwm"]:
        medians = {name: statistics.median(values[what]) for name, values in figures.items()}
        ratio = medians["lwm"] / medians[next(reversed(medians))]
        compared = f", {ratio:.2f} times" if arguments.peer else ""
        print(f"{what}: " + ", ".join(f"{n} {v:.1f}" for n, v in medians.items()) + compared)


if __name__ == "__main__":
    main()
