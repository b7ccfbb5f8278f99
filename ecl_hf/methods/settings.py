"""The recipe's section `loss`."""

from dataclasses import dataclass
from typing import Literal

from ecl_hf.checks import check_values, require


@dataclass(kw_only=True)
class LossConfig:
    """Weights and constants of the loss terms (Eq. 3 to 11)."""

    sup_reduction: Literal["mean", "sum"] = "mean"
    """Supervision over the experts (Eq. 10): `mean` as printed; `sum` keeps each expert's gradient whole."""
    alpha_logit: float = 0.6
    """Weight of the logit distillation (Eq. 11)."""
    alpha_feature: float = 0.6
    """Weight of the feature distillation (Eq. 11)."""
    beta: float = 1.0
    """Weight of the contrastive proxy task (Eq. 11)."""
    tau: float = 1.0
    """Strength of the class prior in the balanced cross-entropy (Eq. 3)."""
    temperature: float = 1.0
    """Temperature of both distillations (Eq. 7 and 8)."""
    contrast_temperature: float = 0.2
    """Temperature of the contrastive loss (Eq. 9)."""
    key_momentum: float = 0.999
    """Momentum of the key encoders' moving average, once per optimiser step."""
    queue_size: int = 1024
    """Keys in each expert's queue of negatives."""
    projection_dim: int = 64
    """Width of the contrastive projections."""

    def __post_init__(self) -> None:
        check_values(self, "loss.")
        for name in ("alpha_logit", "alpha_feature", "beta", "tau"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")
        for name in ("temperature", "contrast_temperature", "queue_size", "projection_dim"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        require(0 <= self.key_momentum <= 1, f"loss.key_momentum must lie in 0..1, got {self.key_momentum}")
