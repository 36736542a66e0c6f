"""Recipes by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lwm.core.errors import ConfigError
from lwm.recipes import pictures, small, text, vision
from lwm.recipes.picture_run import PictureRun
from lwm.recipes.run import Run, nearest

RECIPES: dict[str, Callable[[], Run | PictureRun]] = {
    "debug": small.debug,
    "book": small.book,
    "chat": small.chat,
    "vqgan": pictures.vqgan,
    "vqgan-256": pictures.vqgan_256,
    "text-32k": text.text_32k,
    "text-128k": text.text_128k,
    "text-256k": text.text_256k,
    "text-512k": text.text_512k,
    "text-1m": text.text_1m,
    "vision-debug": vision.vision_debug,
    "vision-1k": vision.vision_1k,
    "vision-8k": vision.vision_8k,
    "vision-32k": vision.vision_32k,
    "vision-128k": vision.vision_128k,
    "vision-1m": vision.vision_1m,
}


def recipe(name: str) -> Run | PictureRun:
    """The run that a name stands for.

    Raises:
        ConfigError: no recipe has this name; names the nearest.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; {nearest(name, list(RECIPES))}")
    return replace(RECIPES[name](), out=Path("runs") / name)


def token_recipe(name: str) -> Run:
    """The run of a recipe that trains on tokens, text or codes.

    Raises:
        ConfigError: no recipe has this name, or it trains on pictures.
    """
    found = recipe(name)
    if not isinstance(found, Run):
        raise ConfigError(f"the recipe {name!r} trains on pictures, not on rows of tokens")
    return found


def summaries() -> dict[str, str]:
    """One line about each recipe."""
    return {name: (make.__doc__ or "").splitlines()[0] for name, make in RECIPES.items()}
