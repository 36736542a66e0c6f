"""Recipes by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lwm.core.errors import ConfigError
from lwm.recipes import pictures, small, text
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
}


def recipe(name: str) -> Run | PictureRun:
    """The run that a name stands for.

    Raises:
        ConfigError: no recipe has this name; names the nearest.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; {nearest(name, list(RECIPES))}")
    return replace(RECIPES[name](), out=Path("runs") / name)


def summaries() -> dict[str, str]:
    """One line about each recipe."""
    return {name: (make.__doc__ or "").splitlines()[0] for name, make in RECIPES.items()}
