"""KCL: k-positive contrastive learning (Kang et al., ICLR 2021), as TSC's authors train it.

Supervised contrast with a queue in which each picture has the same number of positives, so that frequent classes do not
take up more of the space; then a linear classifier on the frozen encoder.

Read: LTH14/targeted-supcon@c4f15eb moco/builder.py, main_moco_supcon_imba.py, main_lincls_imba.py, which has KCL beside
TSC (`tsc.py`). Departure: in the second stage the code leaves the frozen encoder's BatchNorm in training mode, against
its own comment; here it is in evaluation mode.

Published top-1 (TSC's paper): ImageNet-LT 51.5 (ResNet-50, 400 epochs, then 40 of the classifier).
"""

import torch
from torch import Tensor

from ecl_hf.losses import contrast, key_similarities, same_class, share_evenly


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
