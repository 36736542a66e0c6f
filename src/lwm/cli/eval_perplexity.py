"""`lwm eval perplexity`: how well a model foresees a text, by position and context length."""

from pathlib import Path

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName
from lwm.core.progress import say


def perplexity(
    model: ModelName,
    /,
    data: str,
    lengths: str = "1024",
    theta: tyro.conf.UseAppendAction[tuple[float, ...]] = (),
    rows: int = 4,
    batch_tokens: int = 8192,
    out: Path | None = None,
    load: Load = LoadFlags(),
) -> None:
    """Perplexity of a text by position, at several context lengths and RoPE thetas.

    Rows of every length end at the same places of the text, so the last line of the table compares
    them on the same tokens. Interrupted and called again, it goes on where it was.

    Args:
        data: Text the model was not trained on: a txt, md, html or pdf file, 'book' for the King
            James Bible, 'book:Ruth' for one of its books, JSON lines or Parquet with a field
            'text', a glob.
        lengths: Tokens of the context, as in 1024,4096 or 1024:8192:4, which is min:max:count.
        theta: Measure with this RoPE theta, too; may be given several times. Lengths beyond the
            model's context are read with these alone.
        rows: Pieces of the text at each length.
        batch_tokens: Tokens that are read at once, at least one row.
        out: Directory for results.jsonl, perplexity.png and perplexity.svg;
            runs/eval/perplexity-MODEL unless given.
    """
    from lwm.checkpoints.resolve import open_checkpoint
    from lwm.evaluation.perplexity import (
        KEYS,
        Curve,
        PerplexityConfig,
        draw,
        measure,
        read_rows,
        require_lengths,
        settings_of,
        table,
    )
    from lwm.evaluation.ranges import parse_lengths
    from lwm.evaluation.results import Results

    config = PerplexityConfig(
        lengths=parse_lengths(lengths), thetas=theta, rows=rows, batch_tokens=batch_tokens
    )
    directory = out or Path("runs", "eval", f"perplexity-{Path(model).name}")
    own = open_checkpoint(model, config=load.config).config
    require_lengths(config, own.max_sequence_length, model)
    loaded = load.load(model)
    text = read_rows(data, loaded.tokenizer, max(config.lengths), rows)
    results = Results(directory, settings_of(loaded, data, text, config), KEYS)

    def tell(curve: Curve) -> None:
        say(f"theta {curve.theta:g}, {curve.length:,} tokens: perplexity {curve.whole:.4g}")

    found = measure(loaded, text, config, results, tell)
    print("\n".join(table(found, own.rope_theta)))
    title = (
        f"{Path(loaded.source).name}: {rows} {'row' if rows == 1 else 'rows'} of {Path(data).name}"
    )
    draw(found, own.rope_theta, title, directory)
    print(directory)
