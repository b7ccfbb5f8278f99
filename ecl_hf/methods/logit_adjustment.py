"""Logit adjustment after training (Menon et al., ICLR 2021). Adjustment of the loss, from the same paper, is `bc`.

Read: google-research/google-research logit_adjustment/{main,utils,models}.py (at 1d4d2f1 and 5b09c22) and its README.
TensorFlow; read, not run. The code adds 1e-12 to the powers of the prior, ours does not.

Published, ResNet-32 with bottleneck blocks and about 120,000 steps, imbalance 100, CIFAR-10/100-LT: without adjustment
71.36 / 39.87, adjusted after training 77.32 / 44.07, adjusted loss 77.89 / 44.06.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.heads import log_prior_shift
from ecl_hf.losses import carried_log_prior, prior_shifts
from ecl_hf.methods.base import Experts, FinishContext, Method, Stage
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY


@dataclass(kw_only=True)
class LogitAdjustmentSettings(Settings):
    """Of logit adjustment after training."""

    tau: float = 1.0
    """Strength of the class prior that is taken off the logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau >= 0, f"loss.tau must not be negative, got {self.tau}")


@torch.no_grad()
def adjust_bias(context: FinishContext) -> None:
    """Take `tau log p_c`, up to a constant, off the biases: what the logits would lose after training."""
    shift = context.settings.tau * log_prior_shift(context.class_counts)
    for expert in context.model.experts:
        expert.head.bias -= shift.to(expert.head.bias)


def _left_prior(class_counts: Tensor, settings: LogitAdjustmentSettings, num_experts: int) -> Tensor:
    """Log prior that is left in the published logits; uniform where tau is 1."""
    return carried_log_prior(class_counts, prior_shifts(class_counts, [settings.tau] * num_experts))


METHODS = {
    "la_posthoc": Method(
        (Stage((CROSS_ENTROPY,)),),
        LogitAdjustmentSettings,
        experts=Experts(1, most=1),
        finish=(adjust_bias,),
        logit_prior=_left_prior,
    )
}
