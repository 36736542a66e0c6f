"""Check help that follows convention, and one sentence for arguments that cannot be parsed."""

import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Run

from lwm.cli import main
from lwm.models.forward import MLP_BLOCK

VERBS = (
    "chat", "generate text", "generate image", "generate video", "tokenize", "convert", "info",
    "data qa", "data export", "eval needle", "eval multi-needle", "eval perplexity",
    "eval suite", "eval video-needle", "eval compare", "train debug", "train vqgan",
    "data inspect debug",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_types_and_only_defaults_that_are_values(run: Run, verb: str) -> None:
    shown = run(*verb.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"usage: lwm {verb} [-h]")
    assert not re.search(r"None}|{None|default: None|default: ''|default: \)|Args:", shown.out)


def test_help_names_the_type_and_the_default_of_an_option(run: Run) -> None:
    shown = " ".join(run("chat", "--help").out.split())
    for words in ("--prompt STR", "--max-tokens INT", "(default: 512)", "{float32,bfloat16}"):
        assert words in shown
    assert "usage: lwm chat [-h] [OPTIONS] MODEL" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("chat --promt x", "lwm chat: unknown option --promt; did you mean --prompt?"),
        (
            "chat tiny --maxtokens=3",
            "lwm chat: unknown option --maxtokens; did you mean --max-tok",
        ),
        ("info tiny --zzz", "lwm info: unknown option --zzz"),
        (
            "generate text m --promt x",
            "lwm generate text: unknown option --promt; did you mean --pr",
        ),
        (
            "train book --loop.stepz 3",
            "lwm train book: unknown option --loop.stepz; did you mean --st",
        ),
        ("train book --modle.size 1b", "lwm train book: .* did you mean --model.size?"),
        ("train vqgan --stps 3", "lwm train vqgan: unknown option --stps; did you mean --steps?"),
        ("data inspect book --rwos 3", "lwm data inspect book: .*; did you mean --rows?"),
        ("train debug --data.mixture.a.pth x", ".*did you mean --data.mixture.a.path?"),
        (
            "generate text smollm2 --prompt x --max-tokens many",
            "lwm generate text: --max-tokens needs a whole number, not 'many'",
        ),
        ("chat tiny --temperature hot", "lwm chat: --temperature needs a number, not 'hot'"),
        ("eval perplexity m --data x --theta a", "lwm eval perplexity: --theta needs a number"),
        ("chat tiny --dtype half", "lwm chat: --dtype needs one of float32, bfloat16, not 'half'"),
        ("train vqgan --model.channel-multipliers 1 x", ".*-multipliers needs .INT .*'x'"),
        ("chat tiny --seed --prompt x", "lwm chat: --seed needs a value; see 'lwm chat --help'"),
        ("chat", "lwm chat: MODEL is missing; see 'lwm chat --help'"),
        ("convert", "lwm convert: SOURCE and DEST are missing"),
        ("generate text smollm2", "lwm generate text: --prompt is missing"),
        ("chat tiny other", "lwm chat: unexpected argument 'other'"),
        ("", "lwm: name one of demo, chat, .*; see 'lwm --help'"),
        ("generate", "lwm generate: name one of text, image, video"),
        ("trian book", "lwm: unknown command 'trian'; did you mean train?"),
        (
            "eval multineedle m",
            "lwm eval: unknown command 'multineedle'; did you mean multi-needle?",
        ),
        ("brew", "lwm: unknown command 'brew'; see 'lwm --help'"),
        ("train text-31k", "lwm: there is no recipe 'text-31k'; did you mean text-32k"),
        ("data inspect boook", "lwm: there is no recipe 'boook'; did you mean book"),
        ("data inspect --rows 3", "lwm data inspect: the recipe must come first"),
    ],
)
def test_arguments_that_cannot_be_parsed(run: Run, arguments: str, message: str) -> None:
    refused = run(*arguments.split())
    assert (refused.code, refused.out) == (2, "")
    assert re.fullmatch(r"lwm[a-z -]*: [^\n]+\n", refused.err)
    assert re.match(message.replace("?", r"\?"), refused.err), refused.err


def test_only_closed_event_loops_of_native_threads_are_silent(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that every other failure of a thread reaches Python's own hooks."""
    reports: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    monkeypatch.setattr(threading, "excepthook", reports.append)
    assert run("info", "--list").code == 0
    assert threading.excepthook == reports.append

    closed = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("out of memory"))
    monkeypatch.setattr(threading, "current_thread", lambda: threading._DummyThread())
    for error in (closed, other):
        sys.unraisablehook(error)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert reports == [other]


def test_a_thread_that_fails_prints_its_trace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a worker failed")

    def verb() -> None:
        worker = threading.Thread(target=fail)
        worker.start()
        worker.join()

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setitem(main.LWM.commands, "info", verb)
    assert "RuntimeError: a worker failed" in run("info").err


def test_the_guide_from_lwm_names_options_that_exist(run: Run) -> None:
    """Check the right-hand cells and the commands of docs/from-lwm.md."""
    guide = (Path(__file__).parents[2] / "docs" / "from-lwm.md").read_text(encoding="utf-8")
    cells = [cell for line in guide.splitlines() for cell in line.split(" | ")[1:]]
    commands = re.findall(r"lwm [a-z-]+ [^`\n]*", guide)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", "\n".join(cells + commands)))
    verbs = (*VERBS, "train vision-1k", "eval multi-needle")
    known = set(
        re.findall(r"--[\w.-]+", "".join(run(*verb.split(), "--help").out for verb in verbs))
    )
    assert len(named) > 60
    assert named - known == {"--data.mixture"}
    assert f"blocks of {MLP_BLOCK:,} positions" in guide
