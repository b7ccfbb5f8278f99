"""Recipes by their file, or by the name of one that comes with the package."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile


def recipe_folder() -> Path:
    """Where the package's recipes lie: `training/recipes` of a checkout, or its copy in an installed package."""
    return Path(find_spec("ecl_hf.training").submodule_search_locations[0]) / "recipes"


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or a name such as `cifar100_lt` or `published/focal`.

    A file of that name comes before the package's own.

    Raises:
        FileNotFoundError: there is neither; the message lists the names.
    """
    known = recipe_folder() / f"{name}.yaml"
    if Path(name).is_file() or known.is_file():
        return Path(name) if Path(name).is_file() else known
    files = (path.relative_to(recipe_folder()) for path in recipe_folder().rglob("*.yaml"))
    names = ", ".join(sorted(file.with_suffix("").as_posix() for file in files))
    raise FileNotFoundError(f"recipe {name} is neither a file nor one of {names}")


class RecipeFile(ActionConfigFile):
    """Action of the flag `--recipe`, a file, a name, or JSON: what it says, flags override."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the recipe that the flag names."""
        try:
            content = values if values.startswith("{") else str(find_recipe(values))
            super().__call__(parser, cfg, content, option_string)
        except FileNotFoundError as error:
            parser.error(str(error))
