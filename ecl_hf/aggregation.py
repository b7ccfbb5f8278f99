"""From the logits of several experts to those of the ensemble: a mean, with or without weights, or of the first few."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Aggregation = str | list[float] | list[list[float]] | dict[str, Any]
"""`ECLConfig.aggregation`."""


def combine(expert_logits: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sum over the experts; their mean when None.

    Args:
        expert_logits: [B, K, C].
        weights: [B, K, 1] or [1, K, C], for instance; they add up to 1 over the experts.

    Returns:
        [B, C].
    """
    return expert_logits.mean(1) if weights is None else (weights * expert_logits).sum(1)


def fixed_weights(aggregation: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """Weights of experts, [K], or of each expert for each class, [K, C], divided by their sum over the experts.

    Returns:
        [1, K, 1] or [1, K, C], float32.
    """
    weights = torch.tensor(aggregation, dtype=torch.float64)
    weights = weights[:, None] if weights.ndim == 1 else weights
    return (weights / weights.sum(0)).float()[None]


def of_experts(aggregation: Aggregation, experts: Sequence[int], num_experts: int) -> Aggregation:
    """What remains for some of the experts: their weights; of a router nothing, unless all are there in their order.

    Raises:
        ValueError: for some class none of them has a weight.
    """
    if list(experts) == list(range(num_experts)):
        return aggregation
    if not isinstance(aggregation, list):
        return "mean"
    chosen = [aggregation[k] for k in experts]
    if not (fixed_weights(chosen).isfinite()).all():
        raise ValueError(f"for some class experts {list(experts)} have no weight in the ensemble; take others")
    return chosen


def prefix_means(expert_logits: Tensor) -> Tensor:
    """Means over the first 1, 2, ... K experts; [B, K, C] -> [B, K, C]."""
    numbers = torch.arange(1, expert_logits.shape[1] + 1, device=expert_logits.device)
    return expert_logits.cumsum(1) / numbers[:, None]


def routed_weights(scores: Tensor, threshold: float) -> Tensor:
    """Weights of a mean over the first experts, up to the one after which no further one is asked.

    Args:
        scores: `ExpertRouter`, [B, K - 1].
        threshold: probability above which one more expert is asked.

    Returns:
        [B, K, 1].
    """
    enough = (scores.sigmoid() <= threshold).long().cumsum(1)
    asked = F.pad((enough == 0).to(scores.dtype), (1, 0), value=1.0)
    return (asked / asked.sum(1, keepdim=True))[..., None]


class ExpertRouter(nn.Module):
    """Whether one more expert should be asked, judged after each but the last (Wang et al., ICLR 2021, Sec. 3.3).

    It sees the largest of the mean logits so far, in their order, and the direction of the last expert's features.

    Args:
        in_features: width D of the features.
        num_experts: K, at least 2.
        choices: logits that it sees.
        width: to which the features are reduced.
    """

    def __init__(self, in_features: int, num_experts: int, choices: int, width: int) -> None:
        super().__init__()
        self.choices = choices
        self.reduce = nn.ModuleList(nn.Linear(in_features, width) for _ in range(num_experts - 1))
        self.decide = nn.Linear(choices + width, 1)

    def reset_parameters(self) -> None:
        """As linear layers start."""
        for layer in (*self.reduce, self.decide):
            layer.reset_parameters()

    def forward(self, features: Tensor, expert_logits: Tensor) -> Tensor:
        """[B, K, D], [B, K, C] -> logits of the probability that one more expert is needed, [B, K - 1]."""
        seen = prefix_means(expert_logits).topk(self.choices, dim=-1).values
        reduced = [F.relu(layer(F.normalize(features[:, k], dim=-1))) for k, layer in enumerate(self.reduce)]
        rows = [self.decide(torch.cat([seen[:, k], hidden], dim=-1)) for k, hidden in enumerate(reduced)]
        return torch.cat(rows, dim=-1)
