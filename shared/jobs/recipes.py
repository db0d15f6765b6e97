"""The recipes that come with the package: a config with comments each, and rows to try it on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError, StorageError, did_you_mean

FITS = "# Fits: "


@dataclass(frozen=True)
class Recipe:
    """A recipe's name, what it is for, the machines its memory was estimated to fit, and its file."""

    name: str
    title: str
    fits: tuple[str, ...]
    file: Path


def list_recipes(folder: Path) -> list[Recipe]:
    """Return the recipes of a folder, by name; their first two lines say what they are for and where they fit."""
    return [read_recipe(file) for file in sorted(folder.glob("*.yaml"))]


def read_recipe(file: Path) -> Recipe:
    """Return what a recipe's first two lines say."""
    title, fits = file.read_text(encoding="utf-8").splitlines()[:2]
    return Recipe(file.stem, title.removeprefix("# "), tuple(fits.removeprefix(FITS).split(", ")), file)


def find_recipe(folder: Path, name: str) -> Recipe:
    """Return a recipe; raises ConfigError with the nearest name."""
    known = {recipe.name: recipe for recipe in list_recipes(folder)}
    if name not in known:
        raise ConfigError(f'no recipe "{name}"', fix=did_you_mean(name, list(known)))
    return known[name]


def copy_recipe(recipe: Recipe, target: Path, *, demo: Path, with_base: bool) -> tuple[Path, ...]:
    """Write recipe.yaml and the rows in data/ into a new folder, and return what it holds.

    demo: folder with the base/ that is copied too where asked for, and the task/ of recipes without rows of their own.
    Raises ConfigError where something is there already.
    """
    rows = recipe.file.parent / "data" / recipe.name
    parts = {"recipe.yaml": recipe.file, "data": rows if rows.is_dir() else demo / "task"}
    parts |= {"base": demo / "base"} if with_base else {}
    try:
        target.mkdir(parents=True)
        for name, source in parts.items():
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, target / name)
    except FileExistsError:
        raise ConfigError(f"{target} exists", fix="name another folder", code="E205") from None
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}", fix="name another folder") from None
    return tuple(target / name for name in parts)
