"""Train by a recipe: `lwm train`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lwm.cli.info import print_table
from lwm.cli.parsing import UsageError, parse

if TYPE_CHECKING:
    from lwm.recipes.settings import TrainingRun


def train(arguments: Sequence[str]) -> None:
    """Train a model by a recipe; --list shows the recipes."""
    from lwm.recipes.catalogue.index import VQGAN_RECIPES, summaries, vqgan_recipe

    if "--list" in arguments or not arguments or arguments[0] in ("-h", "--help"):
        table = Table("recipe", "what it trains")
        for name, summary in summaries().items():
            table.add_row(name, summary)
        print_table(table)
        print("'lwm train RECIPE --help' describes the settings of a recipe.")
        return
    name, *settings = arguments
    if name.startswith("-"):
        raise UsageError(
            f"lwm train: the recipe must come first, not {name}; see 'lwm train --list'"
        )
    if name in VQGAN_RECIPES:
        from lwm.recipes.assemble_vqgan import train_vqgan

        print(train_vqgan(_parse(name, settings, vqgan_recipe(name), VQGAN_RECIPES[name].__doc__)))
        return
    from lwm.recipes.assemble import train_model

    print(train_model(configure(name, settings)))


def configure(name: str, settings: Sequence[str]) -> "TrainingRun":
    """Return the run of a recipe with settings from the command line."""
    from lwm.recipes.catalogue.index import RECIPES

    return _parse(name, settings, default_run(name, settings), RECIPES[name].__doc__)


def _parse(name: str, settings: Sequence[str], default: Any, summary: str | None) -> Any:
    command = f"lwm train {name}"
    return parse(type(default), command, settings, default=default, description=summary)


def default_run(name: str, settings: Sequence[str]) -> "TrainingRun":
    """Return the run of a recipe, adapted to the settings that will be applied to it.

    A setting that replaces a whole part discards what the recipe says of that part: --model.size
    its model except for vision and RoPE theta, --data.path its mixture, --data.fields the other
    ways to choose fields. A setting of a data set that the mixture lacks adds that data set.
    """
    from lwm.data.config import DataSet
    from lwm.recipes.catalogue.index import recipe
    from lwm.recipes.settings import ModelSettings

    run = recipe(name)
    model, data = run.model, run.data
    options = [setting.partition("=")[0].replace("_", "-") for setting in settings]
    if "--model.size" in options:
        model = ModelSettings(rope_theta=model.rope_theta, vision=model.vision)
    if "--data.path" in options:
        data = replace(data, mixture={})
    if "--data.fields" in options:
        data = replace(data, fields_from_example="", messages="")
    if "--data.fields-from-example" in options:
        data = replace(data, messages="")
    parts = [option.split(".") for option in options]
    mixed = [part[2] for part in parts if part[:2] == ["--data", "mixture"] and len(part) > 3]
    if added := {data_set: DataSet() for data_set in mixed if data_set not in data.mixture}:
        data = replace(data, path="", mixture=data.mixture | added)
    return replace(run, model=model, data=data)
