"""Compare a training step with Hugging Face transformers: the original's `debug` size, AdamW.

The two sides run alternately in separate processes, for several rounds. The time of a side is that
of its fastest step after the first; ratios are of medians over rounds. Memory is the peak of the
whole process. The last rows measure only `lwm`, to show how its memory use grows with length.

usage: python benchmarks/train.py [--rounds 3] [--peer hf_train_step.py] [--long 32768]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

STEPS = 4


def ours(batch: int, length: int) -> float:
    import numpy as np

    from lwm.core.mesh import make_mesh
    from lwm.models.sizes import size
    from lwm.training.batches import BatchLayout
    from lwm.training.optimizer import OptimizerConfig
    from lwm.training.text import TextTraining

    mesh = make_mesh("1,1,1,1")
    training = TextTraining(
        mesh=mesh,
        layout=BatchLayout(mesh, batch, 1, length),
        config=replace(size("debug"), max_sequence_length=length),
        optimizer=OptimizerConfig(learning_rate=8e-5),
        steps=STEPS,
    )
    state, step = training.first_state(), training.compiled_step()
    tokens = np.random.default_rng(0).integers(0, 32000, (batch, length + 1), dtype=np.int32)
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((batch, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segments": np.zeros((batch, length), np.int32),
    }
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = step(state, None, training.place(rows))
        metrics["loss"].block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def transformers(batch: int, length: int) -> float:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=length,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-5)
    tokens = torch.randint(0, 32000, (batch, length))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


SIDES = {"lwm": ours, "transformers": transformers}


def measure(side: str, batch: int, length: int, peer: str | None) -> dict[str, float]:
    """Measure the seconds per step and the peak memory in GB, in a new process."""
    if side == "transformers" and peer:
        command = [sys.executable, peer, str(batch), str(length), "--steps", str(STEPS)]
    else:
        command = [sys.executable, __file__, "--side", side]
        command += ["--batch", str(batch), "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="run only this side, and print JSON")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="script that replaces the transformers side")
    parser.add_argument(
        "--long", type=int, default=32768, help="length at which to measure only lwm; 0 for none"
    )
    arguments = parser.parse_args()
    if arguments.side:
        seconds = SIDES[arguments.side](arguments.batch, arguments.length)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"step_seconds": round(seconds, 3), "peak_gb": round(peak, 2)}))
        return
    peer = str(arguments.peer) if arguments.peer else None
    print(f"{'':14}{'lwm':>18}{'transformers':>18}{'times as fast':>15}{'memory':>8}")
    memory = {}
    for batch, length in ((2, 2048), (1, 8192)):
        measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(arguments.rounds):
            for side, rounds in measured.items():
                rounds.append(measure(side, batch, length, peer))
                print(
                    f"round {number + 1} {batch} x {length} {side}: {rounds[-1]}", file=sys.stderr
                )
        middle = {
            side: {name: statistics.median(f[name] for f in rounds) for name in rounds[0]}
            for side, rounds in measured.items()
        }
        mine, theirs = middle["lwm"], middle["transformers"]
        memory[length] = mine["peak_gb"]
        print(
            f"{f'{batch} x {length:,}':14}"
            f"{mine['step_seconds']:>8.2f} s {mine['peak_gb']:>5.2f} GB"
            f"{theirs['step_seconds']:>8.2f} s {theirs['peak_gb']:>5.2f} GB"
            f"{theirs['step_seconds'] / mine['step_seconds']:>15.2f}"
            f"{mine['peak_gb'] / theirs['peak_gb']:>8.2f}"
        )
    if arguments.long:
        alone = measure("lwm", 1, arguments.long, None)
        print(
            f"{f'1 x {arguments.long:,}':14}"
            f"{alone['step_seconds']:>8.2f} s {alone['peak_gb']:>5.2f} GB"
        )
        print(f"memory of {arguments.long:,} over 8,192: {alone['peak_gb'] / memory[8192]:.2f}")


if __name__ == "__main__":
    main()
