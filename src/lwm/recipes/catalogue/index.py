"""Find recipes by the names that the command line takes.

To add a recipe, write a function that returns a complete run, and name it in one of these tables.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lwm.core.errors import ConfigError
from lwm.recipes.catalogue import nano, paper, small
from lwm.recipes.settings import TrainingRun, VqganRun

RECIPES: dict[str, Callable[[], TrainingRun]] = {
    "debug": small.debug,
    "book": small.book,
    "chat": small.chat_tuning,
    "text-32k": paper.text_32k,
    "text-128k": paper.text_128k,
    "text-256k": paper.text_256k,
    "text-512k": paper.text_512k,
    "text-1m": paper.text_1m,
    "nano-lists": nano.nano_lists,
    "nano-text": nano.nano_text,
    "nano-text-2k": nano.nano_text_2k,
    "nano-text-8k": nano.nano_text_8k,
    "nano-text-32k": nano.nano_text_32k,
    "nano-images": nano.nano_images,
    "nano-videos": nano.nano_videos,
    "nano-chat": nano.nano_chat,
    "vision-debug": small.vision_debug,
    "vision-1k": paper.vision_1k,
    "vision-8k": paper.vision_8k,
    "vision-32k": paper.vision_32k,
    "vision-128k": paper.vision_128k,
    "vision-1m": paper.vision_1m,
}

VQGAN_RECIPES: dict[str, Callable[[], VqganRun]] = {
    "vqgan": small.vqgan_64,
    "vqgan-256": small.vqgan_256,
    "nano-vqgan": nano.nano_vqgan,
}


def recipe(name: str) -> TrainingRun:
    """Return the run of one of `RECIPES`; raise ConfigError at any other name."""
    if name in VQGAN_RECIPES:
        raise ConfigError(
            f"the recipe {name!r} trains a VQGAN, which has no rows of tokens; choose one of "
            f"{', '.join(RECIPES)}"
        )
    if name not in RECIPES:
        names = [*RECIPES, *VQGAN_RECIPES]
        close = " or ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5))
        remedy = f"did you mean {close}?" if close else f"choose one of {', '.join(names)}"
        raise ConfigError(f"there is no recipe {name!r}; {remedy}")
    return replace(RECIPES[name](), out=Path("runs") / name)


def vqgan_recipe(name: str) -> VqganRun:
    """Return the run of one of `VQGAN_RECIPES`."""
    return replace(VQGAN_RECIPES[name](), out=Path("runs") / name)


def summaries() -> dict[str, str]:
    """Return the first line of each recipe's docstring, by name."""
    return {
        name: (function.__doc__ or "").splitlines()[0]
        for name, function in (RECIPES | VQGAN_RECIPES).items()
    }
