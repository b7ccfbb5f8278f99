"""KCL: k-positive contrastive learning (Kang et al., ICLR 2021), as TSC's authors train it.

Supervised contrast with a queue in which each picture has the same number of positives, so that frequent classes do not
take up more of the space; then a linear classifier on the frozen encoder.

Read: LTH14/targeted-supcon@c4f15eb moco/builder.py, main_moco_supcon_imba.py, main_lincls_imba.py, which has KCL beside
TSC (`tsc.py`). Departure: in the second stage the code leaves the frozen encoder's BatchNorm in training mode, against
its own comment; here it is in evaluation mode. The two views of a picture are drawn alike there; here the query is the
recipe's supervised view and the key its contrastive one, which changes colours more and blurs.

Published top-1 (TSC's paper): ImageNet-LT 51.5 (ResNet-50, 400 epochs, then 40 of the classifier).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.losses import contrast, key_similarities, same_class, share_evenly
from ecl_hf.methods.base import BACKBONES, HEADS, Experts, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import MomentumSettings
from ecl_hf.methods.terms import CROSS_ENTROPY


@dataclass(kw_only=True)
class KCLSettings(MomentumSettings):
    """Of k-positive contrastive learning; the defaults are those for ImageNet-LT, but for the classifier's rate."""

    queue_size: int = 65536
    """Keys in the queue."""
    projection_dim: int = 128
    """Width of the contrastive projections."""
    temperature: float = 0.07
    """Temperature of the similarities."""
    positives: int = 6
    """Keys of its class that are drawn for each picture from the queue, k; 0 takes all."""
    classifier_lr: float = 0.2
    """Factor on the learning rate in the last stage. Published: 0.2 on CIFAR (0.1 after 0.5); 100 on ImageNet-LT (10
    after 0.1, batches of 2048), which is far too much for small encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"loss.temperature must be positive, got {self.temperature}")
        require(self.positives >= 0, f"loss.positives must not be negative, got {self.positives}")
        require(self.classifier_lr > 0, f"loss.classifier_lr must be positive, got {self.classifier_lr}")


def draw_positives(labels: Tensor, queue_labels: Tensor, most: int) -> Tensor:
    """Up to so many keys of each picture's class, drawn from the queue without replacement.

    Args:
        labels: class indices, [B].
        queue_labels: class indices of the keys, [Q]; -1 for an empty slot.
        most: positives of a picture; 0 for all that there are.

    Returns:
        Mask, [B, Q].
    """
    candidates = same_class(labels, queue_labels)
    if most == 0 or most >= len(queue_labels):
        return candidates
    order = torch.rand(candidates.shape, device=labels.device).masked_fill(~candidates, -1)
    drawn = torch.zeros_like(candidates).scatter_(1, order.topk(most, dim=1).indices, True)
    return drawn & candidates


def k_positive_contrast(queries: Tensor, keys: Tensor, queue: Tensor, picked: Tensor, temperature: float) -> Tensor:
    """Mean log-probability of a picture's own key and of the keys that were picked for it, of all keys.

    Keys of the same class that were not picked count as negatives, and so do empty slots.

    Args:
        queries: L2-normalised projections of the first view, [B, P].
        keys: L2-normalised keys of the second view, [B, P]; carry no gradient.
        queue: keys of earlier batches, [Q, P].
        picked: positives in the queue, boolean, [B, Q]; see `draw_positives`.
        temperature: of the similarities.

    Returns:
        [B].
    """
    scores = key_similarities(queries, keys, queue) / temperature
    positives = torch.cat([torch.ones_like(picked[:, :1]), picked], dim=1)
    return contrast(scores, share_evenly(positives, scores.dtype))


def _contrast(out: TaskOutputs, settings: KCLSettings) -> PerImage:
    picked = draw_positives(out.labels, out.queue_labels, settings.positives)
    return PerImage(k_positive_contrast(out.queries[0], out.keys[0], out.queues[0], picked, settings.temperature))


CONTRAST = Term("contrast", _contrast, needs=frozenset({"momentum"}))


def classifier_stage(share: float) -> Stage:
    """A new classifier on the frozen encoder, from class-aware batches, without weight decay."""
    return Stage(
        (CROSS_ENTROPY,),
        "classifier",
        sampler=class_aware(4),
        trains=HEADS,
        heads="new",
        share=share,
        lr_factor=lambda name, settings, model: settings.classifier_lr,  # noqa: ARG005
        weight_decay=lambda _: 0.0,
    )


METHODS = {
    "kcl": Method(
        (Stage((CONTRAST,), "contrast", trains=BACKBONES, share=10 / 11), classifier_stage(1 / 11)),
        KCLSettings,
        experts=Experts(1, most=1),
    )
}
