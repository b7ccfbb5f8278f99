"""PaCo: parametric contrastive learning (Cui et al., ICCV 2021).

The classifier's logits join the similarities in one softmax, as learnable centres of the classes: a rare class that has
no other picture at hand still has its centre, and the centre's weight falls as positives grow more.

Read: dvlab-research/Parametric-Contrastive-Learning@fe56535 PaCo/LT/{losses.py,paco_cifar.py,paco_lt.py},
moco/builder.py. Code and paper differ: the paper sums the weighted logarithms, the code divides by the sum of the
weights; this is the code's form. Left out: the initial queue, which there has random labels and rows that are not of
unit length (here an empty slot counts for nothing), and the 1e-12 and 1e-9 in logarithms.

Published top-1, best test epoch: CIFAR-100-LT at imbalance 10/50/100 64.2/56.0/52.0 (ResNet-32, 400 epochs,
AutoAugment); ImageNet-LT 57.0 (ResNet-50), 58.2 (ResNeXt-50), iNaturalist 2018 73.2 (ResNet-50), all 400 epochs.
"""

import torch
from torch import Tensor

from ecl_hf.losses import contrast, full_precision, same_class


def parametric_contrast(
    logits: Tensor,
    log_prior: Tensor,
    labels: Tensor,
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float = 1.0,
    gamma: float = 1.0,
    logit_temperature: float = 1.0,
) -> Tensor:
    """Parametric contrastive loss: log-probabilities of the label's centre and of all pictures of the label.

    With c = (z + ln p) / logit_temperature, and A the other queries, the keys and the queue, of which P are of the same
    class: `-[beta (c_y - ln D) + alpha sum_P (s_a - ln D)] / (beta + alpha |P|)`, where
    `D = sum_c exp(c_c) + gamma sum_A exp(s_a)` and `s_a = q.a / temperature`.

    Args:
        logits: raw, of the first view, [B, C].
        log_prior: log shares of the classes in the training set, [C].
        labels: class indices, [B].
        queries: L2-normalised projections of the first view, [B, P]; the gradient also passes where one is a candidate.
        keys: L2-normalised keys of the second view, [B, P]; carry no gradient.
        queue: keys of earlier batches, [Q, P].
        queue_labels: their class indices, [Q]; -1 for an empty slot.
        temperature: of the similarities.
        alpha: weight of a picture as a positive.
        beta: weight of the centre.
        gamma: how often a picture counts in D.
        logit_temperature: of the centres' logits.

    Returns:
        [B].
    """
    logits, queries, keys, queue = full_precision(logits, queries, keys.detach(), queue)
    centres = (logits + log_prior) / logit_temperature
    candidates = torch.cat([queries, keys, queue])
    candidate_labels = torch.cat([labels, labels, queue_labels])
    present = (candidate_labels >= 0).expand(len(queries), -1).clone()
    present.fill_diagonal_(False)  # a query is no candidate for itself
    positives = alpha * (same_class(labels, candidate_labels) & present)
    own_centre = torch.zeros_like(centres).scatter_(1, labels[:, None], beta)
    weights = torch.cat([own_centre, positives], dim=1)
    return contrast(
        torch.cat([centres, queries @ candidates.T / temperature], dim=1),
        weights / weights.sum(1, keepdim=True),
        torch.cat([torch.ones_like(centres), gamma * present], dim=1),
    )
