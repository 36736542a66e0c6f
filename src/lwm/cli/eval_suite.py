"""`lwm eval suite`: how a model does on RULER, BABILong or InfiniteBench, by task and length."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lwm.cli.eval_run import answered, digest, report
from lwm.cli.flags import ModelName, SharedLoad, SharedLoadFlags
from lwm.core.distributed import first_process
from lwm.core.progress import say

SuiteName = Literal["ruler", "babilong", "infinitebench"]


@dataclass(frozen=True, kw_only=True)
class SuiteFlags:
    """Which examples are asked and how answers are judged."""

    lengths: str = "4096,8192"
    """Lengths of prompt and answer together, in tokens: 1024,4096 or min:max:count."""
    tasks: str | None = None
    """Tasks with commas between, such as niah_single_1,vt; all of the suite unless given."""
    samples: int = 10
    """Examples of each task and length; RULER is published with 500."""
    seed: int = 0
    """Of the first example; the following count on."""
    haystack: str = "book"
    """Text that things are hidden in: book (the King James Bible), a txt, md, html or pdf file,
    JSON lines or Parquet with a field text."""
    squad: Path | None = None
    """For RULER's qa_1: a file of questions in SQuAD's format."""
    hotpot: Path | None = None
    """For RULER's qa_2: a file of questions in HotpotQA's format or SQuAD's."""
    template: str = "auto"
    """How turns are written: auto (the model's own), original, chatml, or none."""
    score: Literal["generation", "logits"] = "generation"
    """Judge what the model writes, or whether each token of one ideal answer is the likeliest
    behind those before; where several orders are right, that asks too much."""
    threshold: float = 85.6
    """Average over tasks from which a length counts as effective."""
    batch_tokens: int = 0
    """Tokens of the prompts that are asked together; one prompt at a time by default."""
    theta: float | None = None
    """Another base of the rotary positions; the context is then as long as the longest length."""
    out: Path | None = None
    """Directory for results; runs/eval/NAME-MODEL unless given. A run that was interrupted goes
    on."""


def suite(
    name: Annotated[SuiteName, tyro.conf.Positional],
    model: ModelName,
    /,
    flags: Annotated[SuiteFlags, tyro.conf.OmitArgPrefixes] = SuiteFlags(),
    load: SharedLoad = SharedLoadFlags(),
) -> None:
    """Answer a suite of long-context tasks and tell scores by task and length.

    Args:
        name: RULER's 13 tasks, BABILong's first five, or InfiniteBench's three of retrieval.
    """
    with load.joined():
        _evaluate(name, model, flags, load)


def _evaluate(name: SuiteName, model: str, flags: SuiteFlags, load: SharedLoadFlags) -> None:
    from lwm.cli.ranges import parse_lengths
    from lwm.evaluation.report.scores import effective_length, points_of, task_table
    from lwm.evaluation.tasks.haystack import texts
    from lwm.evaluation.tasks.ruler_qa import read_questions
    from lwm.evaluation.tasks.suites import Suite, chosen, subtasks
    from lwm.generation.session import model_fingerprint

    lengths = parse_lengths(flags.lengths)
    given = {"qa_1": flags.squad, "qa_2": flags.hotpot}
    paths = {task: path for task, path in given.items() if path is not None}
    tasks, left_out = chosen(name, flags.tasks, paths)
    files = {task: read_questions(paths[task]) for task in tasks if task in paths}
    out = flags.out or Path("runs", "eval", f"{name}-{Path(model).name}")
    for task, why in left_out.items() if first_process() else ():
        say(f"{task} is left out: {why}")
    loaded = load.load(model, theta=flags.theta, length=lengths[-1])
    made = subtasks(name, tasks, loaded.tokenizer, texts(flags.haystack), files)
    task = Suite(
        name=name,
        subtasks=made,
        tokenizer=loaded.tokenizer,
        template=flags.template,
        lengths=lengths,
        samples=flags.samples,
        seed=flags.seed,
    )
    task.require()
    settings: dict[str, Any] = {
        "evaluation": f"suite {name}", "model": model, "theta": flags.theta, "dtype": loaded.dtype,
        "haystack": flags.haystack, "lengths": lengths, "tasks": tasks, "left_out": left_out,
        "files": {task: digest(paths[task]) for task in files}, "samples": flags.samples,
        "seed": flags.seed, "score": flags.score, "template": flags.template,
        "tokenizer": load.tokenizer, "weights": model_fingerprint(loaded),
        "text": digest(Path(flags.haystack)),
    }  # fmt: skip
    rows = answered(
        task, loaded, out, settings, score=flags.score, batch_tokens=flags.batch_tokens,
        template=flags.template,
        place=lambda row: f"{row['task']}, {row['context_length']:,} tokens",
    )  # fmt: skip
    if not first_process():
        return
    points = points_of(rows)
    effective = effective_length(points, flags.threshold)
    if effective is None:
        found = f"below {lengths[0]:,} tokens"
    else:
        found = f"{'at least ' if effective == lengths[-1] else ''}{effective:,} tokens"
    notes = [f"effective length, by an average of {flags.threshold:g}: {found}"]
    if left_out:
        notes.append(f"without {', '.join(f'{task} ({why})' for task, why in left_out.items())}")
    print("\n".join([str(task_table(points)), *notes]))
    report(task, out, settings, rows, notes=notes, threshold=flags.threshold)
