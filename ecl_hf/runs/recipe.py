"""A training run as one typed value, filled by a file of `training/recipes` and flags of `training/train.py`."""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ecl_hf.checks import check_values, require
from ecl_hf.data.config import DataConfig
from ecl_hf.learning.config import ModelConfig, OptimConfig, TrainConfig
from ecl_hf.methods.settings import LossConfig
from ecl_hf.publishing.config import HubConfig


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
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        check_values(self, "")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Give a parser the recipe's keys as dotted flags."""
        parser.add_class_arguments(cls)

    @classmethod
    def from_arguments(cls, parser: ArgumentParser, arguments: Namespace) -> "Recipe":
        """The recipe among parsed arguments; a value out of range is a ValueError that names its key."""
        for section in (item.name for item in fields(cls) if is_dataclass(item.type)):
            require(isinstance(arguments[section], Namespace), f"{section} must be a section with keys of its own")
        values = parser.instantiate(arguments)
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a YAML recipe; FileNotFoundError if there is none, ValueError with the key of a wrong entry."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"recipe {path} is not a file")
        parser = ArgumentParser(exit_on_error=False)
        cls.add_arguments(parser)
        try:
            return cls.from_arguments(parser, parser.parse_path(path))
        except ArgumentError as error:
            raise ValueError(f"recipe {path}: {error}") from error
