"""What the settings of all methods share; a method's settings are the recipe's section `loss`."""

from dataclasses import dataclass

from ecl_hf.checks import check_values, require


@dataclass(kw_only=True)
class Settings:
    """Constants of a method; this one has none."""

    def __post_init__(self) -> None:
        check_values(self, "loss.")


@dataclass(kw_only=True)
class DeferredSettings(Settings):
    """Of class weights that set in late in the training (deferred re-weighting, Cao et al. 2019)."""

    beta: float = 0.9999
    """Of the effective number of images, by which classes are weighted in the end; 0 weights all alike."""
    reweight_from: float = 0.8
    """Share of the training after which classes are weighted; 1 for never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta < 1, f"loss.beta must lie in [0, 1), got {self.beta}")
        require(0 <= self.reweight_from <= 1, f"loss.reweight_from must lie in 0..1, got {self.reweight_from}")

    def has_begun(self, progress: float) -> bool:
        """Whether classes are weighted at this share of the training."""
        return progress >= self.reweight_from


@dataclass(kw_only=True)
class MomentumSettings(Settings):
    """Of the momentum branch (MoCo v2): key encoders, projectors and queues."""

    key_momentum: float = 0.999
    """Momentum of the key encoders' moving average, once per optimiser step."""
    queue_size: int = 1024
    """Keys in each expert's queue of negatives."""
    projection_dim: int = 64
    """Width of the contrastive projections."""
    projector_batchnorm: bool = False
    """BatchNorm between the two layers of the projectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queue_size", "projection_dim"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        require(0 <= self.key_momentum <= 1, f"loss.key_momentum must lie in 0..1, got {self.key_momentum}")
