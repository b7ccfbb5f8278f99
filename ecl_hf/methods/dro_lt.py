"""DRO-LT: distributionally robust features of rare classes (Samuel and Chechik, ICCV 2021).

Read: dvirsamuel/DRO-LT@1960518 losses.py, main.py, ClassAwareSampler.py.

Readings: a picture's margin is the learned one of its own class. The published code lists distances class by class and
margins in the order of the batch, and mixes them up unless that is sorted by class. It begins with a network that
cross-entropy has trained; ours trains it in a first stage, of 200 epochs to the published 80 and 20. Prototypes are
means of the training pictures in the evaluation view; the published ones are of resampled and augmented pictures. The
second stage ends with its last epoch, the published one with the best on the test set. An epoch is as long as the
training set; the published one is as long as if every class were as large as the largest.

Published (ResNet-32, imbalance 10/50/100; epochs of both stages chosen on the test set): CIFAR-100-LT
63.41 / 57.57 / 47.33.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.methods.base import (
    BACKBONES,
    HEADS,
    EpochContext,
    Experts,
    Method,
    Part,
    PartsContext,
    PerImage,
    Stage,
    TaskOutputs,
    Term,
)
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY


@dataclass(kw_only=True)
class DROLTSettings(Settings):
    """Of the distributionally robust loss."""

    temperature: float = 1.0
    """Of the distances between pictures and prototypes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"loss.temperature must be positive, got {self.temperature}")


def robust_losses(
    features: Tensor, labels: Tensor, prototypes: Tensor, margins: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """How well each image is found from the prototype of its class among all images of the batch.

    `-log softmax_j(-(d(mu_y, v_j) + [y_j = y] margin_j) / T)` at the image itself, with Euclidean distances d.

    Args:
        features: [B, D].
        labels: class indices, [B].
        prototypes: mean features of the classes, [C, D].
        margins: how much farther the worst case is, of each image, [B]; none when None.
        temperature: T.

    Returns:
        [B].
    """
    features, prototypes = losses.full_precision(features, prototypes)
    # The fast way of cdist, by a matrix product, loses the digits of small distances
    distances = torch.cdist(prototypes[labels], features, compute_mode="donot_use_mm_for_euclid_dist")
    if margins is not None:
        distances = distances + (labels[:, None] == labels) * margins
    return -(-distances / temperature).log_softmax(-1).diagonal()


def robust_loss(losses_of_images: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the batch of their images' mean loss.

    Args:
        losses_of_images: `robust_losses`, [B].
        labels: class indices, [B].

    Returns:
        [].
    """
    return losses.weighted_mean(losses_of_images, 1 / (labels[:, None] == labels).to(losses_of_images.dtype).sum(1))


class Prototypes(Part):
    """Mean feature of each class, renewed before each epoch, and the learned margins; both [C, ...].

    Attributes:
        means: [C, D]; zeros for a class without pictures.
        margins: [C].
    """

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        classes = len(context.class_counts)
        self.register_buffer("means", torch.zeros(classes, context.width))
        self.margins = nn.Parameter(torch.ones(classes))

    @torch.no_grad()
    def before_epoch(self, context: EpochContext) -> None:
        """Renew the means from the evaluation view of the training set."""
        labels, _, features = context.predict()
        decoded = labels >= 0
        labels, features = labels[decoded], features[decoded, 0].float()
        sums = torch.zeros(self.means.shape).index_add_(0, labels, features)
        self.means.copy_(sums / labels.bincount(minlength=len(sums)).clamp_min(1)[:, None])


def _robust(out: TaskOutputs, settings: DROLTSettings) -> Tensor:
    part = out.parts["robust"]
    images = robust_losses(out.features[0], out.labels, part.means, part.margins[out.labels], settings.temperature)
    return robust_loss(images, out.labels)


def _long_tailed_again(out: TaskOutputs, _: DROLTSettings) -> PerImage:
    """Cross-entropy with weights `n_c / n_max`, which undo the balance of the sampler."""
    weights = out.class_counts / out.class_counts.max()
    return PerImage(losses.cross_entropies(out.cls_logits[0], out.labels), weights)


ROBUST = Term("robust", _robust, part=Prototypes, whole_batch=True)
LONG_TAILED = Term("supervision", _long_tailed_again, two_labels=True)
AFTERWARDS = {"sampler": class_aware(4), "schedule": "constant"}
"""What the second and the third stage have in common."""

METHODS = {
    "dro_lt": Method(
        (
            Stage((CROSS_ENTROPY,), "cross-entropy", share=200 / 300),
            Stage((LONG_TAILED, ROBUST), "features", trains=BACKBONES, share=80 / 300, lr=0.05, **AFTERWARDS),
            Stage((CROSS_ENTROPY,), "classifier", trains=HEADS, share=20 / 300, lr=0.1, **AFTERWARDS),
        ),
        DROLTSettings,
        experts=Experts(1, most=1),
    )
}
