"""Perplexity by position of models whose context was extended, on text that none was trained on.

Each model reads the same rows of the recipe's held-out text, longer than some were trained for;
the table and the picture show perplexity by distance from the row's beginning. For one model on
any text, at several lengths and thetas, there is `lwm eval perplexity`.

usage: python benchmarks/context_extension.py MODEL... [--recipe book] [--length 16384] [--rows 6]
    [--out FILE.png]
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import lwm
from lwm.data.loader import Loader
from lwm.inference.scoring import Scorer
from lwm.recipes.catalogue import recipe

EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192, 12288, 16384)


def held_out_rows(model: lwm.Model, name: str, length: int, rows: int) -> np.ndarray:
    """Running held-out text, [rows, length + 1]: the last token is but a target."""
    data = replace(recipe(name).data, shuffle=False)
    loader = Loader(
        data, model.tokenizer, sequence_length=length, batch_size=1, split="evaluation"
    )
    with loader:
        batches = [next(loader) for _ in range(rows)]
    return np.concatenate(
        [np.concatenate([b["tokens"], b["targets"][:, -1:]], axis=1) for b in batches]
    )


def nll_by_position(model: lwm.Model, rows: np.ndarray, length: int) -> np.ndarray:
    """Negative log-likelihood of each target, [rows, length], far beyond the trained context if
    need be."""
    scorer = Scorer(model.weights, replace(model.config, max_sequence_length=length), None)
    return np.concatenate([-scorer.log_likelihoods(row[None]).log_likelihood for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--recipe", default="book")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    edges = [edge for edge in EDGES if edge < arguments.length] + [arguments.length]
    table = {}
    for name in arguments.models:
        model = lwm.load(name)
        rows = held_out_rows(model, arguments.recipe, arguments.length, arguments.rows)
        nll = nll_by_position(model, rows, arguments.length)
        label = f"{Path(name).name} ({model.config.max_sequence_length:,}, "
        label += f"theta {model.config.rope_theta:.0e})"
        table[label] = [
            float(np.exp(nll[:, low:high].mean())) for low, high in itertools.pairwise(edges)
        ]
    print(f"{'positions':>16}" + "".join(f"{label:>36}" for label in table))
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        values = "".join(f"{column[i]:>36.1f}" for column in table.values())
        print(f"{f'{low:,}-{high:,}':>16}{values}")
    if arguments.out:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, column in table.items():
            axes.plot(edges[1:], column, "o-", markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("position, up to")
        axes.set_ylabel("perplexity of held-out text")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
