"""`lwm eval perplexity`: how well a model foresees a text, by position and context length."""

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lwm.cli.flags import ModelName, SharedLoad, SharedLoadFlags
from lwm.core.distributed import first_process
from lwm.core.progress import say

if TYPE_CHECKING:
    from lwm.evaluation.perplexity import PerplexityConfig
    from lwm.evaluation.report.curves import Curve


def perplexity(
    model: ModelName,
    /,
    data: str,
    lengths: str = "1024",
    theta: tyro.conf.UseAppendAction[tuple[float, ...]] = (),
    rows: int = 4,
    batch_tokens: int = 8192,
    out: Path | None = None,
    load: SharedLoad = SharedLoadFlags(),
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
        out: Directory for results, picture and report; runs/eval/perplexity-MODEL unless given.
    """
    from lwm.cli.ranges import parse_lengths
    from lwm.evaluation.perplexity import PerplexityConfig

    config = PerplexityConfig(
        lengths=parse_lengths(lengths), thetas=theta, rows=rows, batch_tokens=batch_tokens
    )
    directory = out or Path("runs", "eval", f"perplexity-{Path(model).name}")
    with load.joined():
        _measure(model, data, config, directory, load)


def _measure(
    model: str, data: str, config: "PerplexityConfig", directory: Path, load: SharedLoadFlags
) -> None:
    from lwm.checkpoints.open import open_checkpoint
    from lwm.evaluation.perplexity import KEYS, measure, read_rows, require_lengths, settings_of
    from lwm.evaluation.report.curves import by_theta, picture, table
    from lwm.evaluation.report.page import write_report
    from lwm.evaluation.results import Results

    own = open_checkpoint(model, config=load.config).config
    require_lengths(config, own.max_sequence_length, model)
    loaded = load.load(model)
    text = read_rows(data, loaded.tokenizer, max(config.lengths), config.rows)
    settings = settings_of(loaded, data, text, config)
    results = Results(directory, settings, KEYS)

    def tell(curve: "Curve") -> None:
        if first_process():
            say(f"theta {curve.theta:g}, {curve.length:,} tokens: perplexity {curve.whole:.4g}")

    found = measure(loaded, text, config, results, tell)
    if first_process():
        title = f"{Path(loaded.source).name}: {config.rows} rows of {Path(data).name}"
        series = by_theta(found, own.rope_theta)
        shown = table(series)
        report = write_report(
            directory, settings, results.rows, table=shown,
            pictures={"perplexity": picture(series, title)},
        )  # fmt: skip
        print(shown)
        print(report)
