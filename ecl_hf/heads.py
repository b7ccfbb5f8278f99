"""Classification heads, and the gap of the class priors that their logits meet (Eq. 2)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_ecl import ECLConfig


def log_prior_shift(
    class_counts: Sequence[int] | Tensor, target_prior: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Gap of the log priors of training and test set, `log p_s - log p_t` (Eq. 2).

    Args:
        class_counts: training images of each class, [C]; a zero is counted as one, with a warning.
        target_prior: class probabilities (or weights) of the test set, [C]; uniform when None.

    Returns:
        [C], float32.

    Raises:
        ValueError: a negative or non-finite entry, or lengths that differ.
    """
    counts = torch.as_tensor(class_counts).to("cpu", torch.float64)
    if counts.ndim != 1 or not len(counts) or not counts.isfinite().all() or counts.min() < 0:
        raise ValueError("class_counts must be one non-negative number for each class")
    if empty := (counts == 0).nonzero().flatten().tolist():
        warnings.warn(f"{len(empty)} classes have no training image and are counted as one: {empty[:10]}", stacklevel=2)
        counts = counts.clamp_min(1)
    source = counts / counts.sum()
    if target_prior is None:
        return (source.log() + math.log(len(counts))).float()
    target = torch.as_tensor(target_prior).to("cpu", torch.float64)
    if target.shape != counts.shape:
        raise ValueError(f"target_prior has shape {list(target.shape)}, but there are {len(counts)} classes")
    if not target.isfinite().all() or target.min() < 0 or target.sum() == 0:
        raise ValueError("target_prior must hold non-negative finite numbers, not all of them zero")
    target = (target / target.sum()).clamp_min(torch.finfo(torch.float32).tiny)  # a zero would give infinite logits
    return (source.log() - target.log()).float()


class ECLHead(nn.Linear):
    """Linear classifier, [B, D] -> [B, C]."""


class ECLCosineHead(nn.Linear):
    """Cosine classifier, `scale * cos(v, w_c) + b_c`; [B, D] -> [B, C]."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Uniform weights and a zero bias."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        cosine = F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))
        return self.scale * cosine + self.bias


def create_head(config: ECLConfig, in_features: int) -> nn.Linear:
    """A freshly initialised classifier of the configured kind."""
    if config.classifier == "cosine":
        return ECLCosineHead(in_features, config.num_labels, config.classifier_scale)
    return ECLHead(in_features, config.num_labels)
