"""Recipes by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lwm.core.errors import ConfigError
from lwm.recipes.catalogue import small, text, vision, vqgan
from lwm.recipes.picture_run import PictureRun
from lwm.recipes.settings import Run, nearest

RECIPES: dict[str, Callable[[], Run]] = {
    "debug": small.debug,
    "book": small.book,
    "chat": small.chat,
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

PICTURE_RECIPES: dict[str, Callable[[], PictureRun]] = {
    "vqgan": vqgan.vqgan,
    "vqgan-256": vqgan.vqgan_256,
}
"""Those that learn from pictures alone, and give a VQGAN."""


def picture_recipe(name: str) -> PictureRun:
    """The run of one of `PICTURE_RECIPES`."""
    return replace(PICTURE_RECIPES[name](), out=Path("runs") / name)


def recipe(name: str) -> Run:
    """The run that a name stands for.

    Raises:
        ConfigError: no recipe has this name, with the nearest, or it learns from vqgan.
    """
    if name in PICTURE_RECIPES:
        raise ConfigError(
            f"the recipe {name!r} learns from pictures, which have no rows of tokens; name one of "
            f"{', '.join(RECIPES)}"
        )
    if name not in RECIPES:
        known = [*RECIPES, *PICTURE_RECIPES]
        raise ConfigError(f"there is no recipe {name!r}; {nearest(name, known)}")
    return replace(RECIPES[name](), out=Path("runs") / name)


def summaries() -> dict[str, str]:
    """One line about each recipe."""
    return {
        name: (make.__doc__ or "").splitlines()[0]
        for name, make in (RECIPES | PICTURE_RECIPES).items()
    }
