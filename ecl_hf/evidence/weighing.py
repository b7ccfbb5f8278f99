"""Weights of experts for a test set, from its pictures without labels (Zhang et al., NeurIPS 2022, Sec. 3.3).

The experts that know a class best predict it alike in two views of a picture: the weights for which the ensemble does
so suit the classes that are frequent among these pictures. All are looked at before one is scored: results are
transductive.

Read: Vanint/SADE-AgnosticLT@cba11b8 test_training_cifar.py 244-421. As there, weights start equal, are the softmax of
what SGD moves, and rest once an epoch ends with one of them, rounded to two decimals, below 0.05.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import full_precision


def prediction_stability(expert_logits: Tensor, raw_weights: Tensor) -> Tensor:
    """How alike the weighted experts predict two views of an image: mean cosine of the two softmax outputs.

    Args:
        expert_logits: raw logits of two views, [2, B, K, C].
        raw_weights: of the experts, before their softmax, [K].

    Returns:
        [], at most 1.
    """
    expert_logits, raw_weights = full_precision(expert_logits, raw_weights)
    first, second = torch.einsum("k,vbkc->vbc", raw_weights.softmax(0), expert_logits).softmax(-1)
    return F.cosine_similarity(first, second, dim=-1, eps=1e-6).mean()


def stable_weights(
    views: Callable[[int], Iterable[Tensor]], epochs: int = 5, lr: float = 0.1, least: float = 0.05
) -> Tensor:
    """Weights with which an ensemble predicts two views of each picture most alike.

    Args:
        views: batches of an epoch, counted from 0: raw logits of two views, [2, B, K, C].
        epochs: at most.
        lr: learning rate of SGD with Nesterov's momentum 0.9 and weight decay 5e-4.
        least: weight below which an expert ends the search.

    Returns:
        [K], they add up to 1.

    Raises:
        ValueError: there is no batch.
    """
    raw, optimizer = None, None
    for epoch in range(epochs):
        for logits in views(epoch):
            if raw is None:
                experts = logits.shape[2]
                raw = torch.full((experts,), 1 / experts, dtype=logits.dtype, device=logits.device, requires_grad=True)
                optimizer = torch.optim.SGD([raw], lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
            optimizer.zero_grad()
            (-prediction_stability(logits.detach(), raw)).backward()
            optimizer.step()
        if raw is None:
            raise ValueError("weights of experts can't be found from no picture")
        if (raw.softmax(0).detach().cpu().double().numpy().round(2) < least).any():
            break
    return raw.detach().softmax(0)
