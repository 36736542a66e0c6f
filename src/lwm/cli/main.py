"""`lwm`: gathers the verbs, and turns a user's mistake into one sentence and exit code 2."""

import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from tyro.extras import SubcommandApp

from lwm.cli.chat import chat
from lwm.cli.convert import convert
from lwm.cli.data import inspect, inspect_help, questions
from lwm.cli.data_export import export
from lwm.cli.demo import demo
from lwm.cli.eval_compare import compare
from lwm.cli.eval_needle import multi_needle, needle
from lwm.cli.eval_perplexity import perplexity
from lwm.cli.eval_suite import suite
from lwm.cli.eval_video_needle import video_needle
from lwm.cli.generate import generate_image, generate_text, generate_video
from lwm.cli.info import info
from lwm.cli.tokenize import tokenize
from lwm.cli.train import train, train_help
from lwm.core.errors import LwmError


def _keep_compiled_code() -> None:
    """Lets a later run start from the code that an earlier one compiled."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "lwm" / "compiled"))


def _let_the_main_thread_speak() -> None:
    """What fails in another thread, a checkpoint's writer above all, reaches the main thread as an
    error; the trace of its own would only stand round the sentence that tells it."""
    told = sys.unraisablehook
    threading.excepthook = lambda _: None

    def tell(error: Any) -> None:  # native threads come here
        if threading.current_thread() is threading.main_thread():
            told(error)

    sys.unraisablehook = tell


def application() -> SubcommandApp:
    generate = SubcommandApp()
    generate.command(name="text")(generate_text)
    generate.command(name="image")(generate_image)
    generate.command(name="video")(generate_video)
    data = SubcommandApp()
    data.command(name="inspect", help="Show rows of a recipe's data.")(inspect_help)
    data.command(name="qa")(questions)
    data.command(export)
    evaluate = SubcommandApp()
    evaluate.command(needle)
    evaluate.command(multi_needle)
    evaluate.command(perplexity)
    evaluate.command(suite)
    evaluate.command(video_needle)
    evaluate.command(compare)
    app = SubcommandApp()
    app.command(demo)
    app.command(chat)
    app.command(generate, name="generate", help="Generate from a prompt.")
    app.command(name="train", help="Train by a recipe; --list shows them.")(train_help)
    app.command(tokenize)
    app.command(data, name="data", help="Look at training data and make some.")
    app.command(evaluate, name="eval", help="Measure a model; draw what was found.")
    app.command(convert)
    app.command(info)
    return app


def main() -> None:
    """Entry point of the `lwm` command."""
    _keep_compiled_code()
    _let_the_main_thread_speak()
    try:
        match sys.argv[1:]:  # settings of these depend on the recipe
            case ["train", *arguments]:
                return train(arguments)
            case ["data", "inspect", *arguments]:
                return inspect(arguments)
        application().cli(prog="lwm", description="The Large World Model, whole and reproducible.")
    except LwmError as error:
        print(f"lwm: {error}", file=sys.stderr)
        warnings.simplefilter("ignore")  # work that the error cut short is no news
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path that cannot be reached, a disk that is full
        print(
            f"lwm: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
