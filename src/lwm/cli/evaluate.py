"""Measure a model: the verbs of `lwm eval`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from annotated_types import Ge

from lwm.cli.flags import ModelName, SharedLoad, SharedLoadFlags
from lwm.cli.parsing import Text
from lwm.core.config import Checked
from lwm.core.distributed import first_process
from lwm.core.files import readable
from lwm.core.progress import say

if TYPE_CHECKING:
    from lwm.evaluation.perplexity import Curve
    from lwm.evaluation.task import Task
    from lwm.generation.model import Model

SuiteName = Literal["ruler", "babilong", "infinitebench"]
_TEXT_ROOM, _VIDEO_ROOM = 1024, 512  # tokens of question and template, where --theta is set


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(Checked):
    """Set how answers are generated and judged."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of the first round or example; the others count up from it."""
    score: Literal["generation", "logits"] = "generation"
    """Judge the generated answer, or whether each token of the right answer is the likeliest."""
    batch_tokens: int = 0
    """Prompt tokens of a batch; by default one prompt at a time, which reuses a shared prefix."""
    theta: float | None = None
    """RoPE theta; the context is then as long as the longest case. Defaults to the model's."""
    out: Path | None = None
    """Directory for results, plots and report; defaults to runs/eval/NAME-MODEL. An interrupted
    run continues."""


@dataclass(frozen=True, kw_only=True)
class TextFlags(EvaluationFlags):
    """Set the text that things are hidden in, and how prompts are written."""

    haystack: str = "book"
    """Text to hide things in: book (the King James Bible), a txt, md, html, pdf, docx or epub
    file, JSON lines or Parquet with a field text."""
    template: str = "auto"
    """Chat template: auto (the model's), original, chatml, or none."""


@dataclass(frozen=True, kw_only=True)
class NeedleFlags(TextFlags):
    """Set where needles are hidden and how the answers are judged."""

    lengths: str = "1024:8192:4"
    """Context lengths in tokens: 1024,8192 or min:max:count."""
    depths: str = "0:100:5"
    """Positions of a needle in percent of the text: 0,50,100 or min:max:count."""
    depth_spacing: Literal["linear", "sigmoid"] = "linear"
    """Whether a range of depths is even, or denser at both ends."""
    rounds: int = 1
    """Questions for each length and depth; for each length with several needles."""
    max_tokens: int = 64
    """Longest answer."""


@dataclass(frozen=True, kw_only=True)
class SuiteFlags(TextFlags):
    """Set which examples are made and how the answers are judged."""

    lengths: str = "4096,8192"
    """Lengths of prompt and answer together, in tokens: 1024,4096 or min:max:count."""
    tasks: str | None = None
    """Tasks separated by commas, such as niah_single_1,vt; defaults to all of the suite."""
    samples: int = 10
    """Examples of each task and length; RULER publishes scores of 500."""
    squad: Path | None = None
    """For RULER's qa_1: a file of questions in SQuAD's format."""
    hotpot: Path | None = None
    """For RULER's qa_2: a file of questions in HotpotQA's or SQuAD's format."""
    threshold: float = 85.6
    """Average over tasks, in percent, from which a length counts as effective."""


@dataclass(frozen=True, kw_only=True)
class VideoNeedleFlags(EvaluationFlags):
    """Set where cards are hidden and how the answers are judged."""

    video: Path | None = None
    """Video to hide cards in; defaults to a synthetic one."""
    fps: float = 1.0
    """Frames to take per second of --video."""
    frames: str = "8:64:4"
    """Numbers of frames to show, including the card: 8,64 or min:max:count."""
    depths: str = "0:100:5"
    """Positions of the card in percent of the video: 0,50,100 or min:max:count."""
    depth_spacing: Literal["linear", "sigmoid"] = "linear"
    """Whether a range of depths is even, or denser at both ends."""
    rounds: Annotated[int, Ge(1)] = 4
    """Cards for each number of frames and depth; the four kinds of questions alternate."""
    max_tokens: int = 16
    """Longest answer."""


Needle = Annotated[NeedleFlags, tyro.conf.OmitArgPrefixes]


def needle(
    model: ModelName,
    /,
    together: bool = False,
    flags: Needle = NeedleFlags(),
    load: SharedLoad = SharedLoadFlags(),
) -> None:
    """Ask for a number hidden in a long text, by length and depth.

    Args:
        together: Hide numbers at all depths of one text and ask for each, so that the text is
            computed once.
    """
    _needle(model, flags, load, together=together)


def multi_needle(
    model: ModelName,
    /,
    needles: int = 4,
    retrieve: int = 2,
    flags: Needle = NeedleFlags(),
    load: SharedLoad = SharedLoadFlags(),
) -> None:
    """Ask for some of several numbers hidden in a long text, by length.

    Args:
        needles: Numbers to hide.
        retrieve: Numbers to ask for.
    """
    _needle(model, flags, load, needles=needles, retrieved=retrieve)


def _needle(
    model: str, flags: NeedleFlags, load: SharedLoadFlags, together: bool = False, **several: int
) -> None:
    from lwm.cli.ranges import parse_depths, parse_lengths
    from lwm.evaluation.tasks.haystack import SPREAD, read_haystack
    from lwm.evaluation.tasks.needle import NeedleTask

    with load.joined():
        lengths = parse_lengths(flags.lengths)
        depths = parse_depths(flags.depths, flags.depth_spacing)
        room = 0 if flags.theta is None else _TEXT_ROOM + flags.max_tokens
        loaded = load.load(model, theta=flags.theta, length=lengths[-1] + room)
        haystack = read_haystack(flags.haystack, loaded.tokenizer, SPREAD * lengths[-1])
        task = NeedleTask(
            tokenizer=loaded.tokenizer,
            haystack=haystack,
            lengths=lengths,
            depths=depths,
            rounds=flags.rounds,
            seed=flags.seed,
            template=flags.template,
            max_tokens=flags.max_tokens,
            by_logits=flags.score == "logits",
            together=together,
            **several,
        )
        task.require_context(loaded.config.generation_length)
        settings = {"lengths": lengths, "depths": depths, "text": haystack.fingerprint, **several}
        if together:
            settings["together"] = True
        _evaluate(task, model, loaded, flags, settings)


def suite(
    name: Annotated[SuiteName, tyro.conf.Positional],
    model: ModelName,
    /,
    flags: Annotated[SuiteFlags, tyro.conf.OmitArgPrefixes] = SuiteFlags(),
    load: SharedLoad = SharedLoadFlags(),
) -> None:
    """Run a suite of long-context tasks and print scores by task and length.

    Args:
        name: RULER's 13 tasks, BABILong's first five, or InfiniteBench's three of retrieval.
    """
    from lwm.cli.ranges import parse_lengths
    from lwm.evaluation.report.scores import effective_length, points_of, task_table
    from lwm.evaluation.results import file_digest
    from lwm.evaluation.tasks.haystack import read_texts
    from lwm.evaluation.tasks.ruler_qa import read_questions
    from lwm.evaluation.tasks.suites import SuiteTask, choose_tasks, make_subtasks

    with load.joined():
        lengths = parse_lengths(flags.lengths)
        named = {"qa_1": flags.squad, "qa_2": flags.hotpot}
        paths = {task: path for task, path in named.items() if path is not None}
        tasks, skipped = choose_tasks(name, flags.tasks, paths)
        files = {task: read_questions(paths[task]) for task in tasks if task in paths}
        for task, why in skipped.items() if first_process() else ():
            say(f"{task} is skipped: {why}")
        loaded = load.load(model, theta=flags.theta, length=lengths[-1])
        texts = read_texts(flags.haystack)
        task = SuiteTask(
            suite=name,
            subtasks=make_subtasks(name, tasks, loaded.tokenizer, texts, files),
            tokenizer=loaded.tokenizer,
            template=flags.template,
            lengths=lengths,
            samples=flags.samples,
            seed=flags.seed,
        )
        task.require_fit()
        settings = {
            "lengths": lengths, "tasks": tasks, "left_out": skipped, "tokenizer": load.tokenizer,
            "files": {task: file_digest(paths[task]) for task in files},
            "text": file_digest(Path(flags.haystack)),
        }  # fmt: skip

        def finish(rows: list[dict[str, Any]]) -> dict[str, Any]:
            points = points_of(rows)
            reached = effective_length(points, flags.threshold)
            bound = "at least " if reached == lengths[-1] else "" if reached else "below "
            length = f"{bound}{reached or lengths[0]:,} tokens"
            notes = [f"effective length, by an average of {flags.threshold:g}: {length}"]
            if skipped:
                notes.append("without " + ", ".join(f"{t} ({why})" for t, why in skipped.items()))
            print("\n".join([str(task_table(points)), *notes]))
            return {"notes": notes, "threshold": flags.threshold}

        _evaluate(task, model, loaded, flags, settings, finish)


def video_needle(
    model: ModelName,
    /,
    flags: Annotated[VideoNeedleFlags, tyro.conf.OmitArgPrefixes] = VideoNeedleFlags(),
    load: SharedLoad = SharedLoadFlags(),
) -> None:
    """Ask for a card hidden among the frames of a long video, by frames and depth."""
    from lwm.checkpoints.open import open_checkpoint
    from lwm.cli.ranges import parse_depths, parse_lengths
    from lwm.evaluation.report.plots import frame_sheet
    from lwm.evaluation.results import file_digest
    from lwm.evaluation.tasks.cards import card_of, paint
    from lwm.evaluation.tasks.video_needle import VideoNeedleTask, haystack_codes, require_context
    from lwm.generation.codec import decode_frames, encode_frames
    from lwm.generation.vision_prompts import require_vision

    with load.joined():
        counts = parse_lengths(flags.frames, "frames", least=2)  # a card and a frame of the video
        depths = parse_depths(flags.depths, flags.depth_spacing)
        vision = require_vision(open_checkpoint(model, config=load.config).config)
        room = counts[-1] * vision.tokens_per_frame + _VIDEO_ROOM + flags.max_tokens
        loaded = load.load(model, theta=flags.theta, length=None if flags.theta is None else room)
        seeds = range(flags.seed, flags.seed + flags.rounds)
        require_context(loaded.tokenizer, loaded.config, counts[-1], seeds, flags.max_tokens)
        # The cache must fit into memory before a frame is encoded.
        loaded.engine_for(min(room, loaded.config.generation_length) - 1, 1)
        codec = loaded.codec
        cards = [paint(card_of(seed), codec.config.image_size) for seed in seeds]
        task = VideoNeedleTask(
            tokenizer=loaded.tokenizer,
            config=loaded.config,
            video=haystack_codes(codec, counts[-1] - 1, flags.video, flags.fps),
            cards=encode_frames(codec, cards),
            frames=counts,
            depths=depths,
            seed=flags.seed,
            max_tokens=flags.max_tokens,
        )
        settings = {
            "frames": counts, "depths": depths, "vqgan": load.vqgan,
            "video": flags.video and str(flags.video),
            "pictures": flags.video and file_digest(flags.video),
        }  # fmt: skip

        def finish(rows: list[dict[str, Any]]) -> dict[str, Any]:
            decoded = decode_frames(codec, task.cards[:8, None])[:, 0]
            shown = {"card": cards[:8], "as the model sees it": decoded}
            sheet = frame_sheet(shown, [card_of(seed).answer for seed in seeds[:8]])
            return {"figures": {"cards": sheet}}

        _evaluate(task, model, loaded, flags, settings, finish)


# These do not define the cases, or are recorded as parsed or as a digest.
_UNRECORDED = {"out", "batch_tokens", "depth_spacing", "threshold", "squad", "hotpot"}


def _evaluate(
    task: "Task",
    model: str,
    loaded: "Model",
    flags: EvaluationFlags,
    settings: Mapping[str, Any],
    finish: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda rows: {},
) -> None:
    """Answer a task, log new rows, and report; `finish` gives further arguments of the report."""
    from lwm.evaluation.answering import ModelAnswerer
    from lwm.evaluation.report.page import write_report
    from lwm.evaluation.report.scores import overall, percent, points_of
    from lwm.evaluation.results import Results
    from lwm.evaluation.task import evaluate
    from lwm.generation.session import model_fingerprint

    name = f"{task.name.removeprefix('suite ')}-{Path(model).name}"
    directory = flags.out or Path("runs", "eval", name)
    settings = {
        "evaluation": task.name, "model": model, "dtype": loaded.dtype,
        **{key: value for key, value in vars(flags).items() if key not in _UNRECORDED},
        **settings, "weights": model_fingerprint(loaded),
    }  # fmt: skip
    keys = [key for unit in task.units() for key in unit]
    results = Results(directory, settings, tuple(keys[0]))
    if results.rows and first_process():
        say(f"{directory} has {len(results.rows)} rows; continuing after them")

    def log(row: dict[str, Any]) -> None:
        case = ", ".join(f"{name} {row[name]}" for name in keys[0])
        say(f"{case}: {row['score']:.0%}  {' '.join(str(row['response']).split())[:60]}")

    answerer = ModelAnswerer(loaded, flags.batch_tokens, getattr(flags, "template", "auto"))
    rows = evaluate(task, answerer, results, score=flags.score, on_row=log)
    if first_process():
        path = write_report(directory, results.settings, rows, keys=keys, **finish(rows))
        print(f"{task.name} {model}: {percent(overall(points_of(rows)))}% of {len(rows)}")
        print(path)


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
    """Measure the perplexity of a text by position, at several context lengths and RoPE thetas.

    Rows of every length end at the same tokens of the text, so the last line of the table compares
    them on the same tokens. An interrupted run continues.

    Args:
        data: Text the model was not trained on: a txt, md, html, pdf, docx or epub file, 'book'
            for the King James Bible, 'book:Ruth' for one of its books, JSON lines or Parquet with
            a field 'text', a glob.
        lengths: Context lengths in tokens: 1024,4096 or min:max:count.
        theta: Measure with this RoPE theta, too; may be repeated. Lengths beyond the model's
            context are measured with these only.
        rows: Rows of text at each length.
        batch_tokens: Tokens of a batch, which has at least one row.
        out: Directory for results, plot and report; defaults to runs/eval/perplexity-MODEL.
    """
    from lwm.checkpoints.open import open_checkpoint
    from lwm.cli.ranges import parse_lengths
    from lwm.evaluation import perplexity as measuring
    from lwm.evaluation.report.page import write_report
    from lwm.evaluation.results import Results

    config = measuring.PerplexityConfig(
        lengths=parse_lengths(lengths), thetas=theta, rows=rows, batch_tokens=batch_tokens
    )
    directory = out or Path("runs", "eval", f"perplexity-{Path(model).name}")

    def log(curve: "Curve") -> None:
        if first_process():
            say(f"theta {curve.theta:g}, {curve.length:,} tokens: perplexity {curve.mean:.4g}")

    with load.joined():
        stored = open_checkpoint(model, config=load.config).config
        measuring.require_lengths(config, stored.max_sequence_length, model)
        loaded = load.load(model)
        text = measuring.read_rows(data, loaded.tokenizer, max(config.lengths), rows)
        settings = measuring.run_settings(loaded, data, text, config)
        results = Results(directory, settings, measuring.KEYS)
        curves = measuring.measure(loaded, text, config, results, log)
        if first_process():
            title = f"{Path(loaded.source).name}: {rows} rows of {Path(data).name}"
            title = readable(title)
            series = measuring.curves_by_theta(curves, stored.rope_theta)
            table = measuring.curve_table(series)
            figures = {"perplexity": measuring.perplexity_figure(series, title)}
            path = write_report(
                directory, results.settings, results.rows, table=table, figures=figures
            )
            print(table, path, sep="\n")


def compare(
    results: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RESULTS...", help="Directories of runs, or files of rows."),
    ],
    /,
    out: Path | None = None,
    title: Text = Text("Comparison"),
) -> None:
    """Compare several runs: scores by length and overall, one column for each run.

    Files of rows of the original LWM scripts are accepted, too. All runs must be of one kind:
    needles, one suite, videos, or perplexities of the same tokens.

    Args:
        out: Directory for compare.png, compare.svg and compare.html; not written by default.
        title: Title of the plot and the page.
    """
    from lwm.evaluation.report.compare import compare_runs, write_comparison

    comparison = compare_runs(results)
    print(comparison.table)
    if out is not None:
        say("wrote " + ", ".join(map(str, write_comparison(comparison, out, title))))
