"""`mlxlora recipes`: configs to begin with, each with rows to try it on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mlxlora.cli.options import Debug, Json
from mlxlora.cli.output import emit, emit_object

recipes = typer.Typer(name="recipes", help="Recipes to begin with: list, read, copy.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Recipe, as `mlxlora recipes ls` names it.")]
DEMO_OPTIONS = "--model base --set device=auto --set train.dtype=float32"


@recipes.command()
def ls(as_json: Json = False, debug: Debug = False) -> None:
    """The recipes, and the machines whose memory they fit."""
    from dataclasses import asdict

    from mlxlora import RECIPES
    from shared.jobs.recipes import list_recipes

    found = list_recipes(RECIPES)
    if as_json:
        emit_object({"recipes": [asdict(recipe) for recipe in found]})
        return
    for recipe in found:
        print(f"{recipe.name:<14} {recipe.title}\n{'':<14} fits: {', '.join(recipe.fits)}")


@recipes.command()
def show(name: Name, as_json: Json = False, debug: Debug = False) -> None:
    """One recipe, with its comments."""
    from mlxlora import RECIPES
    from shared.jobs.recipes import find_recipe

    recipe = find_recipe(RECIPES, name)
    text = recipe.file.read_text(encoding="utf-8")
    emit(recipe, yaml=text) if as_json else print(text, end="")


@recipes.command()
def cp(
    name: Name,
    target: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="New folder; by default the name.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Copy the demo base too, to try the recipe at once.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy a recipe and its rows into a new folder."""
    from mlxlora import DEMO, RECIPES
    from shared.jobs.recipes import copy_recipe, find_recipe

    recipe, folder = find_recipe(RECIPES, name), target or Path(name)
    written = copy_recipe(recipe, folder, demo=DEMO, with_base=demo)
    train = f"cd {shlex.quote(str(folder))} && mlxlora train recipe.yaml"
    command = f"{train} {DEMO_OPTIONS}" if demo else train
    if as_json:
        emit_object({"recipe": name, "written": written, "next": command})
        return
    print("\n".join(f"wrote {path}" for path in written))
    print(f"next: {command}")
