"""A training run as one typed value, filled by a file of `training/recipes` and flags of `training/train.py`.

The sections lie in the rooms that they are for; which settings the section `loss` has depends on the method.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ecl_hf.checks import check_values, require
from ecl_hf.data.config import DataConfig
from ecl_hf.files import read_text
from ecl_hf.learning.config import ModelConfig, OptimConfig, TrainConfig
from ecl_hf.methods import METHODS, Settings
from ecl_hf.publishing.config import HubConfig
from ecl_hf.runs.recipe_files import find_recipe

MAX_RECIPE = 1 << 20
"""Bytes of a recipe file."""


@dataclass(kw_only=True)
class Recipe:
    """One training run; the defaults are the paper's for CIFAR-100-LT (Sec. VI-C), whose labels are `fine_label`."""

    method: str = "ecl"
    """What to train: a name in `ecl_hf.methods.METHODS`."""
    seed: int = 0
    """Seed of initialisation, sample order and augmentation."""
    epochs: int = 200
    """Passes over the long-tailed training split."""
    batch_size: int = 64
    """Images of one optimiser step over all processes."""
    stage_epochs: list[int] | None = None
    """Epochs of each of the method's stages, which add up to `epochs`; the method's own shares when not given."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: Settings = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        settings = settings_of(self.method)
        if self.loss is None:
            self.loss = settings()
        require(
            type(self.loss) is settings,
            f"loss holds {type(self.loss).__name__}, but {self.method} takes {settings.__name__}",
        )
        check_values(self, "")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        if (given := self.stage_epochs) is not None:
            stages = len(METHODS[self.method].stages)
            require(len(given) == stages, f"stage_epochs has {len(given)} entries; {self.method} has {stages} stages")
            require(
                min(given) >= 1 and sum(given) == self.epochs,
                f"stage_epochs {given} must be positive and add up to epochs, which is {self.epochs}",
            )
        self._check_together()

    def _check_together(self) -> None:
        """Refuse keys that would do nothing because of keys in other sections."""
        validated = self.data.val_fraction is not None
        require(
            validated or self.train.patience is None,
            "train.patience looks at validation pictures: set data.val_fraction",
        )
        if self.model.head_init == "class_means":
            require(
                not self.data.streaming,
                "model.head_init class_means looks at all training pictures first, which data.streaming does not allow",
            )

    @property
    def epochs_of_stages(self) -> list[int]:
        """Epochs of each stage; ValueError if there are fewer epochs than stages."""
        return self.stage_epochs or METHODS[self.method].stage_epochs(self.epochs)

    @classmethod
    def add_arguments(cls, parser: ArgumentParser, method: str = "ecl") -> None:
        """Give a parser the recipe's keys as dotted flags, with the settings of a method."""
        parser.add_class_arguments(cls, skip={"loss"})
        parser.add_class_arguments(settings_of(method), "loss", help=f"settings of {method}")

    @classmethod
    @cache
    def _parser(cls, settings: type[Settings]) -> ArgumentParser:
        """A parser of recipes of methods with these settings; building one takes longer than reading a recipe."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, skip={"loss"})
        parser.add_class_arguments(settings, "loss")
        return parser

    @classmethod
    def from_arguments(cls, parser: ArgumentParser, arguments: Namespace) -> "Recipe":
        """The recipe among parsed arguments; a value out of range is a ValueError that names its key."""
        for section in ("loss", *(item.name for item in fields(cls) if is_dataclass(item.type))):
            given = arguments.get(section, Namespace())  # settings without a field leave no trace
            require(isinstance(given, Namespace), f"{section} must be a section with keys of its own")
        values = parser.instantiate(arguments)
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a YAML recipe; FileNotFoundError if there is none, ValueError with the key of a wrong entry."""
        path = find_recipe(path)
        found = read_yaml(path)
        try:
            method = found.get("method", "ecl")
            check_settings(method, found["loss"] if isinstance(found.get("loss"), dict) else ())
            parser = cls._parser(settings_of(method))
            return cls.from_arguments(parser, parser.parse_path(path))
        except (ArgumentError, ValueError) as error:
            raise ValueError(f"recipe {path}: {error}") from error

    @classmethod
    def of_run(cls, path: str | Path) -> "Recipe":
        """Read what a run was trained with, maybe by another version: settings that its method lacks are left out."""
        found = read_yaml(path)
        try:
            method = found.get("method", "ecl")
            known = {item.name for item in fields(settings_of(method))}
            loss = found.get("loss") or {}
            require(isinstance(loss, dict), "loss must be a section with keys of its own")
            return cls._from_tree({**found, "loss": {key: loss[key] for key in loss if key in known}}, method)
        except (ArgumentError, TypeError, ValueError) as error:
            raise ValueError(f"recipe {path}: {error}") from error

    @classmethod
    def _from_tree(cls, tree: dict[str, Any], method: str) -> "Recipe":
        tree = {key: value for key, value in tree.items() if value != {}}
        parser = cls._parser(settings_of(method))
        return cls.from_arguments(parser, parser.parse_object(json.loads(json.dumps(tree, default=os.fspath))))

    @classmethod
    def named(cls, name: str | Path, **changes: Any) -> "Recipe":
        """A recipe of the package by its name, or one of your own by its file, with some keys changed.

            Recipe.named("quickstart", epochs=5, optim={"lr": 0.1})

        Args:
            name: such as `cifar100_lt`, or a path.
            changes: keys with their values; a section is a dictionary of the keys that change in it.

        Raises:
            FileNotFoundError: there is no such recipe; the message lists the names.
            ValueError: a key is unknown, or a value does not fit it; the message names the key.
        """
        found = read_yaml(find_recipe(name))
        tree, own = dict(found), found.get("method", "ecl")
        method = changes.get("method", own)
        try:
            tree["loss"], _ = own_settings(own, tree.get("loss", {}), method)
            for key, value in changes.items():
                section = tree.get(key) if isinstance(tree.get(key), dict) else {}
                tree[key] = {**section, **value} if isinstance(value, dict) else value
            check_settings(method, tree["loss"])
            profile = tree["data"].get("profile") if isinstance(tree.get("data"), dict) else None
            check_file(found, profile)
            if isinstance(data := changes.get("data"), dict):
                check_profile(profile, [f"data.{key}" for key in data])
            return cls._from_tree(tree, method)
        except (ArgumentError, TypeError, ValueError) as error:
            raise ValueError(f"recipe {name}: {error}") from error


def settings_of(method: str) -> type[Settings]:
    """Type of a method's settings; ValueError for an unknown method."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    return METHODS[method].settings


def check_settings(method: str, keys: Iterable[str]) -> None:
    """Refuse settings that a method does not have, with the name of a method that has them."""
    own = [item.name for item in fields(settings_of(method))]
    for key in keys:
        if key not in own:
            others = [name for name, other in METHODS.items() if key in {item.name for item in fields(other.settings)}]
            of = f", but of {', '.join(others[:5])}" if others else ""
            has = f"it has {', '.join(own)}" if own else "it has none"
            raise ValueError(f"loss.{key} is no setting of {method}{of}; {has}")


def check_file(found: dict[str, Any], profile: Any) -> None:
    """Refuse a file with keys that its own profile of the class counts does not use, if that is the run's, too.

    With their defaults it may hold them, as the resolved recipe of a run does.
    """
    data = found.get("data")
    if isinstance(data, dict) and data.get("profile") == profile:
        check_profile(profile, [f"data.{key}" for key in data if data[key] != getattr(DataConfig, key, None)])


def check_profile(profile: Any, keys: Iterable[str]) -> None:
    """Refuse keys that somebody gives although the profile of the class counts does not use them."""
    without = [key for key in keys if key in ("data.imbalance_factor", "data.max_count")]
    if profile == "as_is" and without:
        raise ValueError(
            f"{without[0]} does nothing with data.profile as_is, which takes all pictures: leave it out, or make them "
            "long-tailed with data.profile exponential or pareto"
        )


def own_settings(method: str, section: Any, other: str) -> tuple[Any, list[str]]:
    """A file's section `loss`, which is for the file's own method, as another method can take it.

    Returns:
        The settings that both methods share, and the names of the others; a name that two papers use for different
        things is not shared.

    Raises:
        ValueError: the file's own method does not have one.
    """
    if not isinstance(section, dict):
        return section, []
    check_settings(method, section)
    ours, theirs = declarations(settings_of(method)), declarations(settings_of(other))
    shared = {key for key in section if ours[key] is theirs.get(key)}
    return {key: section[key] for key in section if key in shared}, [key for key in section if key not in shared]


def declarations(settings: type[Settings]) -> dict[str, type]:
    """The class that was the first to declare each setting."""
    return {name: kind for kind in settings.__mro__ for name in vars(kind).get("__annotations__", {})}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe file as they stand there; nothing is checked but that it is YAML with keys."""
    try:
        text = read_text(path, MAX_RECIPE)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few of them make billions of keys
            raise ValueError("an alias (*name) stands in it; write out what it means")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path} is no YAML file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"recipe {path} must hold keys with values")
    return found


def prepare_flags(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Find out which method flags and recipe files choose, before a parser can know its settings.

    A file's section `loss` is for the file's own method. Where a flag chooses another one, settings which that does not
    have are left out.

    Args:
        argv: flags, with `--recipe` and a file or a name anywhere among them; flags override it.

    Returns:
        The flags, recipes first, with such a file replaced by its content; the method; the settings that were left out.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a flag or a file names settings that its method does not have, or a key that has no effect.
    """
    recipes, flags, words = [], [], iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name in ("--recipe", "--method", "--data.profile"):
            word = f"{name}={value if given else next(words, '')}"
        (recipes if name == "--recipe" else flags).append(word)
    flags = recipes + flags  # a parser lets what comes later override
    method, profile, files = "ecl", DataConfig.profile, []
    for name, _, value in (flag.partition("=") for flag in flags):
        if name == "--method":
            method = value
        elif name == "--data.profile":
            profile = value
        elif name == "--recipe":
            found = read_yaml(find_recipe(value))
            method = found.get("method", method)
            profile = found["data"].get("profile", profile) if isinstance(found.get("data"), dict) else profile
            files.append(found)
    left_out = []
    for position, found in enumerate(files):
        kept, dropped = own_settings(found.get("method", method), found.get("loss"), method)
        if dropped:
            flags[position] = f"--recipe={json.dumps({**found, 'method': method, 'loss': kept})}"
            left_out += [f"loss.{key}" for key in dropped]
    given = [flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")]
    check_settings(method, (key.removeprefix("loss.") for key in given if key.startswith("loss.")))
    check_profile(profile, given)
    for found in files:
        check_file(found, profile)
    return flags, method, left_out
