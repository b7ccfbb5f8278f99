"""MiSLAS: mixup, label-aware smoothing and shifted statistics (Zhong et al., CVPR 2021).

Stage 1 is cross-entropy with mixup. Stage 2 sees class-balanced batches: it trains the classifier, at a smaller
learning rate, and one scale of the logits for each class (LWS of `decoupling`), with labels that are smoothed the more,
the more images their class has. The encoder is frozen; where its BatchNorm statistics shift, they follow the balanced
batches.

Read: dvlab-research/MiSLAS@0fc381e (methods.py, train_stage1.py, train_stage2.py, datasets, config).

Reading: the smoothed label as in the code, `1 - eps + eps / C` for the true class; the paper has 1 - eps, and
eps / (C - 1) for the others. Equal counts, a division by zero there, mean the head's smoothing for all classes here.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ecl_hf.losses import full_precision

Shape = Literal["concave", "linear", "convex", "power"]


def smoothing_factors(
    class_counts: Tensor, head: float, tail: float, shape: Shape = "concave", power: float = 2.0
) -> Tensor:
    """How much the label of each class is smoothed: `head` for the largest class, `tail` for the smallest.

    With `r = (n_c - n_min) / (n_max - n_min)` the shapes between them are

        concave  tail + (head - tail) sin(pi r / 2)
        linear   tail + (head - tail) r
        convex   head + (head - tail) sin(3 pi / 2 + pi r / 2)
        power    tail + (head - tail) r^power

    Args:
        class_counts: training images of each class, [C].
        head: in 0..1.
        tail: in 0..1.
        shape: one of the four.
        power: of the last shape.

    Returns:
        [C]; `head` everywhere where all classes are equally large.
    """
    least, most = class_counts.min(), class_counts.max()
    rank = (class_counts - least) / (most - least) if most > least else torch.ones_like(class_counts)
    if shape == "convex":
        return head + (head - tail) * torch.sin(math.pi / 2 * (3 + rank))
    rise = {"concave": torch.sin(math.pi / 2 * rank), "linear": rank, "power": rank**power}[shape]
    return tail + (head - tail) * rise


def label_aware_smoothing(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Cross-entropy with a label that is smoothed as its class says, `(1 - eps_y) CE_y + eps_y mean_j CE_j`.

    Args:
        logits: [B, C].
        labels: class indices, [B].
        smoothing: eps, `smoothing_factors`, [C].

    Returns:
        [B].
    """
    (logits,) = full_precision(logits)
    surprise = -logits.log_softmax(-1)
    eps = smoothing[labels].to(logits.dtype)
    return (1 - eps) * surprise.gather(-1, labels[:, None])[:, 0] + eps * surprise.mean(-1)
