"""Measure attention: time and memory by length and packing, and the balance of zigzag shards.

Each measurement covers a forward and a backward pass. Blockwise and dense attention run
alternately, each in a separate process, so that their memory peaks are separate as well. All cases
use four heads of dimension 64, float32, and a causal mask.

usage: python benchmarks/attention.py [--rounds 3] [--lengths 2048 8192 32768]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lwm.attention.api import AttentionConfig, attention
from lwm.attention.mask import Side, needed, ranges, side
from lwm.attention.order import zigzag

HEADS, DIM = 4, 64
DENSE_LIMIT = 8192  # the square of a longer sequence takes tens of gigabytes


def measure(implementation: str, length: int, segments: int, rounds: int) -> dict[str, float]:
    """Measure the seconds of a forward and backward pass, and its memory in megabytes."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, gradient = (jax.random.normal(k, (1, length, HEADS, DIM)) for k in keys)
    tokens = side(*_packed(length, segments))
    config = AttentionConfig(implementation=implementation)  # type: ignore[arg-type]

    def both(
        query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array, tokens: Side
    ):
        run = lambda q, k, v: attention(q, k, v, tokens, tokens, config=config)  # noqa: E731
        out, backward = jax.vjp(run, query, key, value)
        return out, backward(gradient)

    arguments = (query, key, value, gradient, tokens)
    step = jax.jit(both).lower(*arguments).compile()
    analysis = step.memory_analysis()
    jax.block_until_ready(step(*arguments))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "temporary": (analysis.temp_size_in_bytes if analysis else 0) / 1e6,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def _packed(length: int, segments: int) -> tuple[jax.Array, jax.Array]:
    """Return positions and ids of equal segments in one row."""
    index = jnp.arange(length)[None]
    size = length // segments
    return index % size, index // size


def zigzag_balance(length: int, shards: int, block: int = 512) -> np.ndarray:
    """Count the pairs of blocks that each shard computes, over all steps of the ring."""
    index = np.asarray(zigzag(length, shards)).reshape(shards, -1)
    positions = jnp.asarray(index).reshape(shards, -1, block)
    blocks = ranges(Side(positions=positions, segments=jnp.zeros_like(positions)))
    pick = lambda i: jax.tree.map(lambda x: x[i][:, None], blocks)  # noqa: E731
    all_blocks = jax.tree.map(lambda x: x.reshape(-1), blocks)
    return np.array([int(needed(pick(i), all_blocks, causal=True).sum()) for i in range(shards)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=3, metavar=("IMPLEMENTATION", "LENGTH", "SEGMENTS"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    arguments = parser.parse_args()
    if arguments.case:
        kind, length, segments = arguments.case
        print(json.dumps(measure(kind, int(length), int(segments), arguments.rounds)))
        return

    def run(kind: str, length: int, segments: int = 1) -> dict[str, float]:
        command = [sys.executable, str(Path(__file__)), "--rounds", str(arguments.rounds)]
        command += ["--case", kind, str(length), str(segments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    print(f"{'':32}{'seconds':>9}{'temporary MB':>14}{'peak MB':>9}{'dense/ours':>12}")
    results = {}
    for length in arguments.lengths:
        results[length] = ours = run("blockwise", length)
        dense = run("reference", length) if length <= DENSE_LIMIT else None
        ratio = dense["seconds"] / ours["seconds"] if dense else None
        row(f"blockwise, {length:,}", ours, ratio)
        if dense:
            row(f"dense, {length:,}", dense, None)
    if 8192 in results:
        packed = run("blockwise", 8192, 16)
        row("blockwise, 16 segments of 512", packed, None)
        share = packed["seconds"] / results[8192]["seconds"]
        print(f"16 packed segments cost {share:.2f} of one causal sequence of 8,192")
    for shards in (4, 8, 16):
        blocks = zigzag_balance(32768, shards)
        print(
            f"zigzag over {shards} shards of 32,768: {blocks.min()} to {blocks.max()} blocks, "
            f"{blocks.max() / blocks.min() - 1:.1%} apart"
        )


def row(name: str, figures: dict[str, float], ratio: float | None) -> None:
    cells = f"{figures['seconds']:>9.2f}{figures['temporary']:>14.0f}{figures['peak']:>9.0f}"
    print(f"{name:32}{cells}{'' if ratio is None else f'{ratio:>12.1f}'}", flush=True)


if __name__ == "__main__":
    main()
