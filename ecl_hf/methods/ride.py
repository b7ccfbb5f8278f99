"""RIDE: diverse experts on shared first stages, their distillation, and their routing (Wang et al., ICLR 2021).

Read: frank-xwang/RIDE-LongTailRecognition@ab8be5c model/loss.py, model/ldam_drw_resnets, model/fb_resnets,
trainer/trainer.py, train.py, configs. Each expert learns by LDAM's cross-entropy, after four fifths of training with
class weights, and is pushed away from the mean of all experts, then with a temperature for each class.

Departures from the paper, with the code: the push is from the detached mean of the logits, not between pairs; the class
temperatures are divided by the largest. From the code: it takes `diversity` 0 for a loss of another kind, on the mean
logits; ours just leaves the push out. Its teacher runs in training mode (batch statistics, drifting averages); ours
is in evaluation mode.

As in the code, all losses are sums over the experts, and the distillation's whole loss is multiplied by the number
of experts once more, which is a learning rate that many times as large.

Published, best test epoch on CIFAR: CIFAR-100-LT, ResNet-32, imbalance 100, 200 epochs: 48.6 (3 experts), distilled
from 6 experts 49.0 / 49.4 (3 / 4 experts); ImageNet-LT, ResNeXt-50, 100 epochs: 55.7 (3), 56.8 (4, distilled);
iNaturalist 2018, ResNet-50, 100 epochs: 71.2 (3), 72.6 (4, distilled). A user of the code found no gain from the push,
another .4 lost by the routing (its issues 7 and 6).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import cross_entropies, full_precision, log_class_prior, margin_logits, pairwise_kl


def diversity_temperatures(class_counts: Tensor, spread: float) -> Tensor:
    """Temperatures of the classes, 1 for the most frequent: in proportion to `spread C n_c / N + 1 - spread`.

    Args:
        class_counts: training images of each class, [C].
        spread: in [0, 1); 0 gives 1 to all.

    Returns:
        [C].
    """
    temperatures = spread * len(class_counts) * log_class_prior(class_counts).exp() + 1 - spread
    return temperatures / temperatures.max()


def margin_losses(expert_logits: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """LDAM's cross-entropies, summed over the experts.

    Args:
        expert_logits: scaled cosines, [K, B, C].
        labels: class indices, [B].
        margins: of each class, on the cosines, [C].
        scale: of the cosines.

    Returns:
        [B].
    """
    (expert_logits,) = full_precision(expert_logits)
    return cross_entropies(margin_logits(expert_logits / scale, labels, margins, scale), labels).sum(0)


def divergence_from_mean(expert_logits: Tensor, temperatures: Tensor) -> Tensor:
    """Divergence of each expert from the mean logits, which carry no gradient, summed over the experts.

    `(mean_c T_c)^2 sum_k KL(softmax(mean z / T) || softmax(z_k / T))`.

    Args:
        expert_logits: [K, B, C].
        temperatures: T, [C].

    Returns:
        [B].
    """
    (expert_logits,) = full_precision(expert_logits)
    mean = expert_logits.detach().mean(0, keepdim=True)
    return temperatures.mean() ** 2 * pairwise_kl(mean, expert_logits, temperatures)[0].sum(0)


def routing_targets(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Whether one more expert would help: the mean of the first ones is wrong, and that of more of them is right.

    Args:
        expert_logits: [K, B, C].
        labels: class indices, [B].

    Returns:
        Boolean, [K - 1, B].
    """
    right = expert_logits.cumsum(0).argmax(-1) == labels
    later = torch.stack([right[k:].any(0) for k in range(1, len(right))])
    return ~right[:-1] & later


def routing_losses(scores: Tensor, targets: Tensor, positive_weight: float) -> Tensor:
    """Binary cross-entropies of the router with weighted positives, mean over its decisions; [K - 1, B] each -> [B]."""
    (scores,) = full_precision(scores)
    weight = torch.tensor(positive_weight, dtype=scores.dtype, device=scores.device)
    answers = targets.to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, answers, pos_weight=weight, reduction="none").mean(0)
