"""What becomes of a batch before the forward: pictures mixed with each other, and the shares of their labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


def beta_draws(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Draws from Beta(alpha, alpha), [count], on the CPU; the generator's state decides them."""
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count)).float()


def mix(batch: Batch, partners: Tensor, share: Tensor) -> Batch:
    """Mix pictures with others of their batch, pixel by pixel.

    Args:
        batch: `pixel_values` [B, 3, H, W], `labels` [B].
        partners: positions in the batch, [B].
        share: weight of each picture's own pixels and label, [] or [B].

    Returns:
        The batch with mixed `pixel_values`, `mixed_labels` and `share`.
    """
    pixels, labels = batch["pixel_values"], batch["labels"]
    partners, share = partners.to(labels.device), share.to(pixels)
    weight = share.view(-1, 1, 1, 1)
    mixed = weight * pixels + (1 - weight) * pixels[partners]
    return batch | {"pixel_values": mixed, "mixed_labels": labels[partners], "share": share}


def mixup(alpha: float | Callable[[Any], float]) -> Callable[[Batch, Any], Batch]:
    """Mixup (Zhang et al., ICLR 2018): one share for the whole batch, drawn from Beta(alpha, alpha).

    Args:
        alpha: of the Beta distribution, or a function of the method's settings.
    """

    def mixing(batch: Batch, context: Any) -> Batch:
        value = alpha(context.settings) if callable(alpha) else alpha
        share = beta_draws(value, 1, context.generator)[0]
        return mix(batch, torch.randperm(len(batch["labels"]), generator=context.generator), share)

    return mixing
