"""`lwm train`: a recipe by name, with settings changed by dotted flags after it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import tyro
from rich.table import Table

from lwm.cli.info import print_table
from lwm.core.errors import ConfigError

if TYPE_CHECKING:
    from lwm.recipes.picture_run import PictureRun
    from lwm.recipes.run import Run


def train(arguments: Sequence[str]) -> None:
    """Train by a recipe.

    Args:
        arguments: what follows `lwm train`: a recipe's name and its settings, or --list.
    """
    from lwm.recipes.catalogue import PICTURE_RECIPES, RECIPES, summaries

    if "--list" in arguments or not arguments or arguments[0] in ("-h", "--help"):
        table = Table("recipe", "what it is")
        for name, summary in summaries().items():
            table.add_row(name, summary)
        print_table(table)
        print("lwm train RECIPE --help shows its settings.")
        return
    name, *settings = arguments
    if name.startswith("-"):
        raise ConfigError(
            f"the recipe must come first, but got {name!r}; write 'lwm train RECIPE {name} ...' "
            f"with one of {', '.join([*RECIPES, *PICTURE_RECIPES])}"
        )
    if name in PICTURE_RECIPES:
        from lwm.recipes.assemble_pictures import start_pictures

        print(start_pictures(_configure_pictures(name, settings)))
        return
    run = configure(name, settings)
    from lwm.recipes.assemble import start

    print(start(run))


def train_help() -> None:
    """Stands for `train` in the list of verbs."""
    train(["--help"])


def configure(name: str, settings: Sequence[str], verb: str = "train") -> "Run":
    """The run of a recipe with its settings changed.

    A size that is named replaces the recipe's own model; what else is set counts on top of it.

    Raises:
        ConfigError: no such recipe.
        SystemExit: a setting is unknown or of the wrong type; tyro has said which.
    """
    from lwm.recipes.catalogue import RECIPES, recipe
    from lwm.recipes.run import ModelSettings, Run

    default = recipe(name)
    if any(setting.split("=")[0] == "--model.size" for setting in settings):
        default = replace(default, model=ModelSettings(rope_theta=default.model.rope_theta))
    return tyro.cli(
        Run,
        default=default,
        args=list(settings),
        prog=f"lwm {verb} {name}",
        description=RECIPES[name].__doc__,
    )


def _configure_pictures(name: str, settings: Sequence[str]) -> "PictureRun":
    from lwm.recipes.catalogue import PICTURE_RECIPES, picture_recipe
    from lwm.recipes.picture_run import PictureRun

    return tyro.cli(
        PictureRun,
        default=picture_recipe(name),
        args=list(settings),
        prog=f"lwm train {name}",
        description=PICTURE_RECIPES[name].__doc__,
    )
