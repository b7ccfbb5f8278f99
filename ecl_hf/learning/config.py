"""The recipe's sections `model`, `optim` and `train`."""

from dataclasses import dataclass
from typing import Literal

from ecl_hf.checks import check_values, require


@dataclass(kw_only=True)
class ModelConfig:
    """The experts."""

    architecture: str = "resnet32_cifar"
    """timm name of every expert's encoder."""
    pretrained: bool | str = False
    """Weights that every encoder starts from: true (timm's own), a local file, or a Hub repository in timm's format."""
    num_experts: int = 3
    """Number of experts K; methods that are defined for one expert train one."""
    share_stages: int = 0
    """Stages of the encoder, with its stem, that are one for all experts: cheaper, and not the paper's."""
    classifier: Literal["linear", "cosine"] = "linear"
    """Kind of the classification heads."""
    classifier_scale: float = 16.0
    """Scale of the cosine classifier; not used by the linear one."""
    image_size: int | None = None
    """Side of the square input in pixels; the architecture's own when not given."""

    def __post_init__(self) -> None:
        check_values(self, "model.")
        require(self.classifier_scale > 0, f"model.classifier_scale must be positive, got {self.classifier_scale}")
        require(self.num_experts >= 1, f"model.num_experts must be at least 1, got {self.num_experts}")
        require(self.share_stages >= 0, f"model.share_stages must not be negative, got {self.share_stages}")
        require(
            self.image_size is None or self.image_size >= 8,
            f"model.image_size must be at least 8, got {self.image_size}",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """SGD with a cosine schedule to zero."""

    lr: float = 0.01
    """Learning rate at the start, for the global batch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.005
    """Weight decay of all parameters."""

    def __post_init__(self) -> None:
        check_values(self, "optim.")
        require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        require(0 <= self.momentum < 1, f"optim.momentum must lie in [0, 1), got {self.momentum}")
        require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")


@dataclass(kw_only=True)
class TrainConfig:
    """How the run is carried out; none of it is meant to change the result."""

    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimiser step; `batch_size` counts all of them."""
    compile: bool = False
    """Compile the encoders with `torch.compile`."""
    gradient_checkpointing: bool = False
    """Save memory: compute the activations within the encoders' blocks a second time instead of keeping them."""
    experts_one_by_one: bool = False
    """Save more memory: repeat each expert's forward just before its backward, so that the activations of one expert
    are kept at a time. Takes about a quarter more time; gradients are the same."""
    checkpoint_every: int = 10
    """Epochs between checkpoints for `--resume`; one is also written at the end."""
    keep_last: int = 2
    """Checkpoints to keep."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """Losses and gradients that are not finite: `raise` stops before the optimiser moves and names them; `skip` leaves
    such steps out, and says how many there were."""
    sync_batchnorm: bool = False
    """BatchNorm over the images of all processes instead of each one's own."""
    timeout: float = 30.0
    """Minutes that a process waits for another one before it gives up."""
    max_steps: int | None = None
    """Stop after this many optimiser steps with a checkpoint; the schedule stays that of all epochs."""

    def __post_init__(self) -> None:
        check_values(self, "train.")
        for name in ("gradient_accumulation_steps", "checkpoint_every", "keep_last"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        require(self.timeout > 0, f"train.timeout must be positive, got {self.timeout}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"train.max_steps must be at least 1, got {self.max_steps}"
        )
