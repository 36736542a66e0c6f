"""Compare the speed of this checkout with that of another revision.

The two revisions run their own benchmark scripts alternately in separate processes, for several
rounds. The output shows the medians, their ratio (above 1 means that this checkout is faster or
uses less memory), and the range of the ratios of single rounds.

usage: python benchmarks/revisions.py REVISION [--rounds 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "generate": ["generate.py", "--side", "lwm"],
    "attention, 2,048 tokens": ["attention.py", "--case", "blockwise", "2048", "1"],
    "attention, 8,192 tokens": ["attention.py", "--case", "blockwise", "8192", "1"],
    "train, 2 x 2,048 tokens": ["train.py", "--side", "lwm", "--batch", "2", "--length", "2048"],
    "train, 1 x 8,192 tokens": ["train.py", "--side", "lwm", "--batch", "1", "--length", "8192"],
}
THROUGHPUT = ("prefill", "decode")
"""Figures that begin with these words are better when larger; times and memory, when smaller."""


def measure(tree: Path, case: str) -> dict[str, float]:
    """Run one benchmark of a source tree and return its figures."""
    script, *arguments = CASES[case]
    command = [sys.executable, str(tree / "benchmarks" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(trees: list[Path], case: str, rounds: int) -> None:
    """Compare two source trees on one benchmark, and print a line for each of its figures."""
    pairs = []
    for number in range(rounds):
        # The order alternates, so that a machine that heats up favors neither side.
        order = trees if number % 2 == 0 else trees[::-1]
        figures = {tree: measure(tree, case) for tree in order}
        pairs.append([figures[tree] for tree in trees])
        print(f"round {number + 1} {case}: {pairs[-1]}", file=sys.stderr, flush=True)
    for name in pairs[0][0]:
        new, old = (statistics.median(pair[side][name] for pair in pairs) for side in (0, 1))
        power = 1 if name.startswith(THROUGHPUT) else -1
        ratios = [(pair[0][name] / pair[1][name]) ** power for pair in pairs]
        print(
            f"{case}, {name}".ljust(48) + f"{new:>10.3f}{old:>10.3f}{(new / old) ** power:>7.2f}"
            f"   {min(ratios):.2f} to {max(ratios):.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run([*git, "add", "--quiet", "--detach", other, arguments.revision], check=True)
        try:
            print(f"{'':48}{'this':>10}{'other':>10}{'ratio':>7}   rounds")
            for case in arguments.cases:
                compare([ROOT, other], case, arguments.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", other], check=True)


if __name__ == "__main__":
    main()
