"""Causal norm, or TDE: the total direct effect of an image (Tang, Huang and Zhang, NeurIPS 2020).

Features and rows are cut into H chunks. Training is plain cross-entropy on

    z_c = (s / H) sum_h  w_c^h / (|w_c^h| + g) . u(v^h)

beside a moving mean m of the features. The answer leaves out what a feature has in the direction of m,
`a cos(v, m) u(m)` of each chunk. That is linear in the normalised chunks, so it folds into one matrix: the published
head is an `ECLNormalisedHead` without bias, and m is not published.

Read: KaihuaTang/Long-Tailed-Recognition.pytorch@5c916d0 (classification/models/CausalNormClassifier.py,
run_networks.py, config).

Readings: mu is constant (published for CIFAR; on ImageNet-LT the code takes `1 - 0.1 min(50 lr, 1)`). Published values
of a: CIFAR-10-LT 1, CIFAR-100-LT 1.5, ImageNet-LT 3; the code's hint is that `a cos(v, m)` should be about 1.

Published top-1, the last epoch: CIFAR-10-LT 88.5, 83.6, 80.6 and CIFAR-100-LT 59.6, 50.3, 44.1 for imbalance factors of
10, 50, 100. The encoder there is ResNet-32 with its last block twice side by side and 128 features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.heads import ECLNormalisedHead, normalise_chunks
from ecl_hf.losses import full_precision
from ecl_hf.methods.base import Experts, HeadContext, HeadKind, Method, Stage
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY


def damped_rows(weight: Tensor, chunks: int, gamma: float) -> Tensor:
    """Rows of a classifier whose chunks are divided by their norms plus a constant, `w_c^h / (|w_c^h| + g)`.

    Args:
        weight: [C, D].
        chunks: H.
        gamma: g; it lets short rows stay shorter.

    Returns:
        [C, D].
    """
    parts = weight.unflatten(-1, (chunks, -1))
    return (parts / (parts.norm(dim=-1, keepdim=True) + gamma)).flatten(-2)


def causal_logits(features: Tensor, weight: Tensor, chunks: int, scale: float, gamma: float) -> Tensor:
    """Logits of training, `(s / H) sum_h w_c^h / (|w_c^h| + g) . u(v^h)`.

    Args:
        features: v, [B, D].
        weight: [C, D].
        chunks: H.
        scale: s (the paper's tau).
        gamma: g.

    Returns:
        [B, C].
    """
    features, weight = full_precision(features, weight)
    return scale / chunks * F.linear(normalise_chunks(features, chunks), damped_rows(weight, chunks, gamma))


def direct_rows(weight: Tensor, mean: Tensor, chunks: int, scale: float, gamma: float, alpha: float) -> Tensor:
    """Rows that give the direct effect when they meet the normalised chunks of a feature.

    The answer's `(s / H) sum_h w~_c^h . (u(v^h) - a cos(v^h, m^h) u(m^h))`, with w~ of `damped_rows`, has the feature
    in `u(v^h)` alone, whose factor is `(s / H) (w~_c^h - a (w~_c^h . u(m^h)) u(m^h))`.

    Args:
        weight: [C, D].
        mean: m, of which only the direction of each chunk counts, [D]; zeros take nothing off.
        chunks: H.
        scale: s.
        gamma: g.
        alpha: a; 0 gives the logits of training, 1 takes away all that lies in the direction of m.

    Returns:
        [C, D].
    """
    rows = damped_rows(weight, chunks, gamma).unflatten(-1, (chunks, -1))
    direction = normalise_chunks(mean, chunks).unflatten(-1, (chunks, -1))
    along = (rows * direction).sum(-1, keepdim=True) * direction
    return scale / chunks * (rows - alpha * along).flatten(-2)


class CausalNormHead(nn.Module):
    """Causal norm in training: `causal_logits` and the moving mean; evaluated, the direct effect. [B, D] -> [B, C].

    The mean follows the features of each training batch, `m <- mu m + (1 - mu) mean(v)`. The published code has no
    factor `1 - mu`; the direction is the same. It is named like the running statistics of BatchNorm, since it is
    treated like one: averaged over processes, taken back with a step that is left out.

    Args:
        head: without bias; holds the rows, and at the end the published ones.
        scale: s.
        gamma: g.
        alpha: a.
        momentum: mu.
    """

    def __init__(self, head: ECLNormalisedHead, scale: float, gamma: float, alpha: float, momentum: float) -> None:
        super().__init__()
        self.in_features = head.in_features
        self.head = head
        self.scale = scale
        self.gamma = gamma
        self.alpha = alpha
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros_like(head.weight[0]))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        if not self.training:
            return F.linear(normalise_chunks(features, self.head.chunks), self._direct_rows())
        with torch.no_grad():
            self.running_mean.lerp_(features.mean(0).to(self.running_mean), 1 - self.momentum)
        return causal_logits(features, self.head.weight, self.head.chunks, self.scale, self.gamma)

    def _direct_rows(self) -> Tensor:
        return direct_rows(self.head.weight, self.running_mean, self.head.chunks, self.scale, self.gamma, self.alpha)

    @torch.no_grad()
    def fold(self) -> ECLNormalisedHead:
        """The published head, which computes what this one does when it is evaluated."""
        self.head.weight.copy_(self._direct_rows())
        return self.head


@dataclass(kw_only=True)
class TDESettings(Settings):
    """Of causal norm."""

    scale: float = 16.0
    """Scale of the logits (the paper's tau)."""
    gamma: float = 1 / 32
    """Added to the norms that divide the classifier's rows."""
    alpha: float = 1.5
    """How much of the mean feature's direction the answer leaves out."""
    mean_momentum: float = 0.9
    """Momentum of the moving mean feature, once per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale > 0, f"loss.scale must be positive, got {self.scale}")
        for name in ("gamma", "alpha"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")
        require(0 <= self.mean_momentum < 1, f"loss.mean_momentum must lie in [0, 1), got {self.mean_momentum}")


def causal_norm(head: ECLNormalisedHead, context: HeadContext) -> CausalNormHead:
    """The train-only head around a head without bias."""
    settings: TDESettings = context.settings
    return CausalNormHead(head, settings.scale, settings.gamma, settings.alpha, settings.mean_momentum)


TWO_CHUNKS = HeadKind("normalised", bias=False, chunks=2)

METHODS = {
    "tde": Method(
        (Stage((CROSS_ENTROPY,), heads=causal_norm),), TDESettings, head=TWO_CHUNKS, experts=Experts(1, most=1)
    )
}
