"""Weight balancing (LTR-WD; Alshammari et al., CVPR 2022).

Stage 1 is cross-entropy with a weight decay ten times the usual one, which alone keeps the rows of the classifier from
growing with their classes. Stage 2 trains the classifier on with a class-balanced loss, a very strong weight decay and
MaxNorm: after each epoch the rows are cut to a length that was fixed before.

Read: ShadeAlsha/LTR-weight-balancing@e89f292 (utils/regularizers.py, utils/trainval.py, utils/class_balanced_loss.py,
both notebooks).

The loss of stage 2 is the published one: binary cross-entropy of softmax probabilities, about 1 / C as large as
cross-entropy, so that the weight decay of 0.1 has the upper hand. It comes from a port of Cui et al.'s "softmax" loss,
which is another.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import full_precision


def softmax_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each class's softmax probability with 1 for the label and 0 for the others.

    Args:
        logits: [B, C].
        labels: class indices, [B].

    Returns:
        Mean over the classes, [B].
    """
    (logits,) = full_precision(logits)
    target = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy(logits.softmax(-1), target, reduction="none").mean(-1)


def norm_limit(weight: Tensor, share: float) -> Tensor:
    """The length that MaxNorm allows, `min_c |w_c| + share * (max_c |w_c| - min_c |w_c|)`.

    Args:
        weight: rows of the classifier before stage 2, [C, D].
        share: in 0..1; 1 allows all that there is.

    Returns:
        [].
    """
    norms = weight.norm(dim=-1)
    return torch.lerp(norms.min(), norms.max(), share)


def limit_norms(weight: Tensor, limit: Tensor | float) -> Tensor:
    """MaxNorm: rows that are longer than the limit, cut to it, `w_c min(1, limit / |w_c|)`.

    Args:
        weight: [C, D].
        limit: a length.

    Returns:
        [C, D].
    """
    return weight * (limit / weight.norm(dim=-1, keepdim=True)).clamp_max(1)
