"""DRO-LT: distributionally robust features of rare classes (Samuel and Chechik, ICCV 2021).

Read: dvirsamuel/DRO-LT@1960518 losses.py, main.py, ClassAwareSampler.py.

Readings: a picture's margin is the learned one of its own class. The published code lists distances class by class and
margins in the order of the batch, so that a batch that is not sorted by class mixes them up.

Published (ResNet-32, imbalance 10/50/100; epochs of both stages chosen on the test set): CIFAR-100-LT
63.41 / 57.57 / 47.33.
"""

import torch
from torch import Tensor

from ecl_hf import losses


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


def robust_loss(losses_of_images: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over the classes of the batch of their images' mean loss.

    Args:
        losses_of_images: `robust_losses`, [B].
        labels: class indices, [B].
        class_weights: of the sum over the classes; it is divided by the weights of all classes, also of absent ones,
            as published; [C]. When None the classes of the batch count alike.

    Returns:
        [].
    """
    shares = 1 / (labels[:, None] == labels).to(losses_of_images.dtype).sum(1)
    if class_weights is None:
        return losses.weighted_mean(losses_of_images, shares)
    return (class_weights[labels] * shares * losses_of_images).sum() / class_weights.sum()
