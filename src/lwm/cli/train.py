"""`lwm train`: a recipe by name, with settings changed by dotted flags after it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import tyro
from rich.table import Table

from lwm.cli.info import print_table
from lwm.core.errors import ConfigError

if TYPE_CHECKING:
    from lwm.recipes.settings import TrainingRun, VqganRun


_MIXTURE = ["--data", "mixture"]


def train(arguments: Sequence[str]) -> None:
    """Train by a recipe.

    Args:
        arguments: what follows `lwm train`: a recipe's name and its settings, or --list.
    """
    from lwm.recipes.catalogue.by_name import RECIPES, VQGAN_RECIPES, summaries

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
            f"with one of {', '.join([*RECIPES, *VQGAN_RECIPES])}"
        )
    if name in VQGAN_RECIPES:
        from lwm.recipes.assemble_vqgan import train_vqgan

        print(train_vqgan(_configure_vqgan(name, settings)))
        return
    run = configure(name, settings)
    from lwm.recipes.assemble import train_model

    print(train_model(run))


def train_help() -> None:
    """Stands for `train` in the list of verbs."""
    train(["--help"])


def configure(name: str, settings: Sequence[str], verb: str = "train") -> "TrainingRun":
    """The run of a recipe with its settings changed.

    A size that is named replaces the recipe's own model, but for what it sees, and a path the data
    sets that it mixes, and fields those that its examples bring; what else is set counts on top of
    it. Settings of a data set that the recipe does not have add it.

    Raises:
        ConfigError: no such recipe.
        SystemExit: a setting is unknown or of the wrong type; tyro has said which.
    """
    from lwm.recipes.catalogue.by_name import RECIPES, recipe
    from lwm.recipes.settings import TrainingRun

    default = _with_room(recipe(name), settings)
    return tyro.cli(
        TrainingRun,
        default=default,
        args=list(settings),
        prog=f"lwm {verb} {name}",
        description=RECIPES[name].__doc__,
    )


def _with_room(default: "TrainingRun", settings: Sequence[str]) -> "TrainingRun":
    """The recipe's run without what the settings replace whole, and with what they name anew."""
    from lwm.data.config import DataSet
    from lwm.recipes.settings import ModelSettings

    named = [setting.split("=")[0].replace("_", "-") for setting in settings]
    if "--model.size" in named:
        own = default.model
        default = replace(
            default, model=ModelSettings(rope_theta=own.rope_theta, vision=own.vision)
        )
    if "--data.path" in named:
        default = replace(default, data=replace(default.data, mixture={}))
    if "--data.fields" in named:
        default = replace(default, data=replace(default.data, fields_from_example="", messages=""))
    if "--data.fields-from-example" in named:
        default = replace(default, data=replace(default.data, messages=""))
    flags = [flag.split(".") for flag in named]
    mixed = [parts[2] for parts in flags if parts[:2] == _MIXTURE and len(parts) > 3]
    if new := {part: DataSet() for part in mixed if part not in default.data.mixture}:
        mixture = default.data.mixture | new
        default = replace(default, data=replace(default.data, path="", mixture=mixture))
    return default


def _configure_vqgan(name: str, settings: Sequence[str]) -> "VqganRun":
    from lwm.recipes.catalogue.by_name import VQGAN_RECIPES, vqgan_recipe
    from lwm.recipes.settings import VqganRun

    return tyro.cli(
        VqganRun,
        default=vqgan_recipe(name),
        args=list(settings),
        prog=f"lwm train {name}",
        description=VQGAN_RECIPES[name].__doc__,
    )
