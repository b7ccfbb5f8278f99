"""The recipe's sections `model`, `optim` and `train`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ecl_hf.checks import check_values, require
from ecl_hf.configuration_ecl import FORBIDDEN_MODEL_ARGS, MAX_RANK


@dataclass(kw_only=True)
class ModelConfig:
    """The experts."""

    architecture: str = "resnet32_cifar"
    """timm name of every expert's encoder."""
    pretrained: bool | str = False
    """Weights that every encoder starts from: true (timm's own), a local file, or a Hub repository in timm's format."""
    tune: Literal["all", "norm_bias", "lora", "adapter", "head"] = "all"
    """What moves of the encoders: `all`; `norm_bias`, normalisation layers and biases; `lora`, low-rank additions to
    linear layers and dense convolutions, which merge into them at the end; `adapter`, AdaptFormers beside the MLPs of
    transformer blocks, which stay a part of the published model; or `head`, nothing: features of all pictures are
    computed once then, kept in the run folder, and an epoch takes seconds. All experts share the encoder then."""
    rank: int | None = None
    """Rank of `lora`, or width of `adapter`; LIFT's rule when not given: the largest power of two with which they have
    no more weights than the classifier, at least 1."""
    head_init: Literal["random", "class_means"] = "random"
    """Cosine and linear classifiers start at random, or at the directions of the classes' mean features, which suits a
    pretrained encoder; so do those that a later stage of a method begins anew. Experts with the same encoder start at
    means over bootstrap samples, and so nearly alike: K > 1 pays there only with a method that drives experts apart."""
    num_experts: int | None = None
    """Number of experts K; the method's own when not given: 3 for most that train several."""
    teacher: str | None = None
    """Finished model that a method with a teacher learns from: run folder, model directory, or Hub repository."""
    share_stages: int | None = None
    """Stages of the encoder, with its stem, that are one for all experts: cheaper, and not ECL's. The method's own
    when not given: none for most."""
    share_blocks: int = 0
    """Blocks of the stage behind them that are, too."""
    classifier: Literal["linear", "cosine"] = "linear"
    """Kind of the classification heads, where the method does not bring its own."""
    classifier_scale: float = 16.0
    """Scale of the cosine classifier. The linear one has none, but starts like a cosine one of this scale with
    `head_init` class_means."""
    args: dict[str, Any] | None = None
    """More arguments of timm's for the encoders: {widths: [16, 24, 48]} of CIFAR ResNets, {channels: ...} of others."""
    image_size: int | None = None
    """Side of the square input in pixels; the architecture's own when not given."""

    def __post_init__(self) -> None:
        check_values(self, "model.")
        require(self.classifier_scale > 0, f"model.classifier_scale must be positive, got {self.classifier_scale}")
        forbidden = sorted(FORBIDDEN_MODEL_ARGS & (self.args or {}).keys())
        require(not forbidden, f"model.args must not hold {', '.join(forbidden)}")
        least = self.num_experts is None or self.num_experts >= 1
        require(least, f"model.num_experts must be at least 1, got {self.num_experts}")
        light = self.tune in ("lora", "adapter")
        require(light or self.rank is None, f"model.rank is that of model.tune lora and adapter, not of {self.tune}")
        require(
            self.rank is None or 1 <= self.rank <= MAX_RANK, f"model.rank must lie in 1..{MAX_RANK}, got {self.rank}"
        )
        whole = self.tune == "head" and (self.share_stages or self.share_blocks)
        require(not whole, "model.share_stages: with model.tune head experts share the whole encoder; leave it out")
        for name in ("share_stages", "share_blocks"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"model.{name} must not be negative, got {value}")
        require(
            self.share_stages or not self.share_blocks,
            "model.share_blocks counts blocks behind shared stages: set model.share_stages, too",
        )
        require(
            self.image_size is None or self.image_size >= 8,
            f"model.image_size must be at least 8, got {self.image_size}",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """The optimiser, and the learning rate's course; both begin anew with each stage of a method."""

    name: str = "sgd"
    """`sgd`, or another of timm's optimizers: adamw, lamb, ..."""
    lr: float = 0.01
    """Learning rate at its highest, for the global batch."""
    momentum: float = 0.9
    """Momentum of SGD, and of those of timm's that have one."""
    nesterov: bool = False
    """Nesterov's momentum for SGD."""
    weight_decay: float = 0.005
    """Weight decay of all parameters but those of `no_decay`."""
    no_decay: list[Literal["norm", "bias", "head"]] = field(default_factory=list)
    """Parameters without weight decay: of normalisation layers, biases, classification heads."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer of an encoder to the one below it; for pretrained encoders."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Course of the learning rate within a stage: half a cosine to zero, step by step; `step` at the milestones."""
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    """Shares of the stage after which `step` multiplies the learning rate by `step_factor`."""
    step_factor: float = 0.1
    """Factor at each milestone."""
    warmup_epochs: float = 0.0
    """Epochs at the start of each stage in which the learning rate rises linearly, step by step; part of the stage."""
    clip_grad: float | None = None
    """Largest norm of the gradient over all parameters; longer ones are scaled down."""
    ema: float | None = None
    """Decay of an average of the weights, such as 0.999; the average is what is tested and published."""

    def __post_init__(self) -> None:
        check_values(self, "optim.")
        require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        require(0 <= self.momentum < 1, f"optim.momentum must lie in [0, 1), got {self.momentum}")
        require(self.momentum > 0 or not self.nesterov, "optim.nesterov needs optim.momentum")
        for name in ("weight_decay", "warmup_epochs"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        inside = all(0 < share < 1 for share in self.milestones) and sorted(self.milestones) == self.milestones
        require(inside, f"optim.milestones must rise between 0 and 1, got {self.milestones}")
        for name in ("layer_decay", "step_factor", "clip_grad"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name} must be positive, got {value}")
        require(self.ema is None or 0 < self.ema < 1, f"optim.ema must lie between 0 and 1, got {self.ema}")


@dataclass(kw_only=True)
class TrainConfig:
    """How the run is carried out: what it saves, when it stops, what it does with steps that can't be taken.

    Accumulation, and what saves memory or time, are not meant to change the result.
    """

    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimiser step; `batch_size` counts all of them."""
    compile: bool = False
    """Compile the encoders with `torch.compile`; those that a method does not run as a whole stay as they are."""
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
    connect_timeout: float = 1.0
    """The same at the start, while the processes look for each other."""
    patience: int | None = None
    """End after this many epochs of the last stage without a better balanced accuracy on the validation pictures."""
    calibration_folds: int | None = None
    """Where features are kept: find the temperature by cross-validation, with as many trainings more, each of which
    leaves out its part of the training pictures. None is lost to the model, as by `data.val_fraction`."""
    max_steps: int | None = None
    """Stop after this many optimiser steps with a checkpoint; the schedule stays that of all epochs."""

    def __post_init__(self) -> None:
        check_values(self, "train.")
        folds = self.calibration_folds
        require(folds is None or folds >= 2, f"train.calibration_folds must be at least 2, got {folds}")
        for name in ("gradient_accumulation_steps", "checkpoint_every", "keep_last"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        require(self.patience is None or self.patience >= 1, f"train.patience must be at least 1, got {self.patience}")
        for name in ("timeout", "connect_timeout"):
            require(getattr(self, name) > 0, f"train.{name} must be positive, got {getattr(self, name)}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"train.max_steps must be at least 1, got {self.max_steps}"
        )
