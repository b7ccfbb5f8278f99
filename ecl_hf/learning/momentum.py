"""The momentum branch of the contrastive proxy task (Sec. V-C): key encoders and queues, in the manner of MoCo v2."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.losses import full_precision
from ecl_hf.methods.settings import MomentumSettings


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters take no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(keys: Sequence[nn.Module], queries: Sequence[nn.Module], momentum: float) -> None:
    """Move every parameter to `momentum * key + (1 - momentum) * query`."""
    ours, theirs = ([parameter for module in part for parameter in module.parameters()] for part in (keys, queries))
    torch._foreach_lerp_(ours, theirs, 1.0 - momentum)


def create_projector(width: int, settings: MomentumSettings) -> nn.Sequential:
    """Two layers on the pooled features, [B, D] -> [B, P]."""
    middle = [nn.BatchNorm1d(width)] if settings.projector_batchnorm else []
    return nn.Sequential(nn.Linear(width, width), *middle, nn.ReLU(), nn.Linear(width, settings.projection_dim))


class MomentumEncoder(nn.Module):
    """Moving average of an encoder with its projector: [B, 3, H, W] -> L2-normalised keys [B, P].

    It starts as a copy of both, and only parameters follow. BatchNorm normalises keys by their own batch (of this
    process, or of all with `train.sync_batchnorm`) and keeps running statistics of its own, which training never reads;
    they are not those of the experts, and no part of the published model.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = frozen_copy(encoder)
        self.projector = frozen_copy(projector)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Keys without gradient."""
        return F.normalize(*full_precision(self.projector(self.encoder(pixel_values))), dim=-1)

    def follow(self, encoder: nn.Module, projector: nn.Module, momentum: float) -> None:
        """Move towards encoder and projector."""
        follow((self.encoder, self.projector), (encoder, projector), momentum)


class KeyQueue(nn.Module):
    """Ring of the newest keys of each of K experts, with their labels (-1: nothing stored yet).

    It takes batches of any size and is part of the saved state.
    """

    def __init__(self, num_experts: int, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(num_experts, size, dim), dim=-1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Replace the oldest keys.

        Args:
            keys: keys of all processes in the order of their images, [B, K, P].
            labels: of these images, [B].
        """
        size = self.keys.shape[1]
        slots = (self.cursor + torch.arange(len(keys), device=keys.device)) % size
        self.keys[:, slots[-size:]] = keys[-size:].transpose(0, 1).to(self.keys.dtype)
        self.labels[slots[-size:]] = labels[-size:]
        self.cursor.copy_((self.cursor + len(keys)) % size)
