"""SSD: self-supervision to distillation for long-tailed recognition (Li, Wang, Wu, ICCV 2021).

`ssd_teacher` trains an encoder with cross-entropy and a contrastive task, and then its head's scales on balanced
batches (stages I and II); `ssd` trains a new one from the labels and from that teacher's probabilities, with one head
for each (III), and then scales the head of the second (IV). The model is that with the soft labels' head.

Read: MCG-NJU/SSD-LT@5eaa1db (SSD_LT/builder.py, ssd_stage_i.py, ssd_stage_ii.py, ssd_stage_iii.py,
models/tau_norm_classifier.py, loader.py). Readings: frozen encoders are in evaluation mode (published: their BatchNorm
keeps counting, in the teacher as well); stage IV scales the soft head (the published loader would take the other); an
empty slot of the queue is of no class (published: of class 0); the settings for CIFAR-LT, which the code does not have.

Published: CIFAR-100-LT 62.3, 50.5 and 46.0 for imbalance 10, 50 and 100; ImageNet-LT 56.0 (ResNeXt-50, 135 epochs; 55.4
without stage IV); iNaturalist 2018 71.5.
"""

import torch
from torch import Tensor

from ecl_hf import losses


def other_class_contrast(
    query: Tensor, key: Tensor, queue: Tensor, labels: Tensor, queue_labels: Tensor, temperature: float
) -> Tensor:
    """Contrastive loss whose negatives are the keys of other classes alone: nothing pushes a class apart.

    Args:
        query: L2-normalised projections, [B, P].
        key: L2-normalised keys of the second view, [B, P]; carries no gradient.
        queue: keys of earlier batches, [Q, P]; carries no gradient.
        labels: class indices, [B].
        queue_labels: of the queue's keys, [Q].
        temperature: of the similarities.

    Returns:
        [B]; 0 where the queue has no key of another class.
    """
    similarities = losses.key_similarities(query, key, queue) / temperature
    others = ~losses.same_class(labels, queue_labels)
    own = torch.ones_like(others[:, :1])
    candidates = torch.cat([own, others], dim=1)
    return losses.contrast(similarities, torch.cat([own, torch.zeros_like(others)], dim=1), candidates)
