"""BALMS: balanced softmax with a learned sampler (Ren et al., NeurIPS 2020). Balanced softmax alone is `bc`.

Read: jiawei-ren/BalancedMetaSoftmax-Classification@34a61e4 loss/BalancedSoftmaxLoss.py, data/MetaSampler.py,
run_networks.py, utils.py, config.

The first stage is cross-entropy. In the second the encoder is frozen and a new classifier learns from pictures drawn in
proportion to the rate of their class. The rates learn as well: had a picture's draw been likelier, would the
classifier's next step have served a class-balanced batch better?

Published (CIFAR-10/100-LT, imbalance 200, best epoch on the test set): cross-entropy 74.0 / 41.2, balanced softmax
79.8 / 46.7, with the second stage but no sampler 81.8 / 47.2, BALMS 82.2 / 48.0.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ecl_hf import losses


def conditional_noise(log_rates: Tensor, drawn: Tensor) -> Tensor:
    """Gumbel noise given what was drawn: a sample under which `log_rates + noise` is largest at the drawn picture.

    The published code draws the noise first and the picture from it. Noise for pictures that are already loaded has the
    same distribution.

    Args:
        log_rates: log of how often each picture is drawn, up to a constant, [N].
        drawn: positions of the pictures drawn, [B].

    Returns:
        [B, N].
    """
    (log_rates,) = losses.full_precision(log_rates.detach())
    fresh = -log_rates.new_empty(len(drawn), len(log_rates) + 1).exponential_().log()
    largest = log_rates.logsumexp(0) + fresh[:, -1:]
    others = -torch.logaddexp(-largest, -log_rates - fresh[:, :-1])
    return others.scatter(1, drawn[:, None], largest) - log_rates


def draw_probabilities(log_rates: Tensor, noise: Tensor, drawn: Tensor) -> Tensor:
    """Probability of the drawn pictures after Gumbel noise; [N], [B, N], [B] -> [B]."""
    return (log_rates + noise).log_softmax(-1).gather(-1, drawn[:, None])[:, 0].exp()


def drawn_loss(losses_of_images: Tensor, probabilities: Tensor) -> Tensor:
    """Mean of the losses of the drawn pictures, with the slope of their probabilities (straight-through).

    Args:
        losses_of_images: [B].
        probabilities: `draw_probabilities`, [B].

    Returns:
        [].
    """
    return (losses_of_images * (1 + probabilities - probabilities.detach())).mean()


def stepped_classifier(loss: Tensor, parameters: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
    """Parameters after one step of gradient descent that stays differentiable."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    return {name: p - lr * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}


def meta_loss(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    shift: Tensor,
    probabilities: Tensor,
    balanced_features: Tensor,
    balanced_labels: Tensor,
    lr: float,
) -> Tensor:
    """Cross-entropy on a class-balanced batch after a step of the classifier on the drawn one.

    The gradient reaches the probabilities of the draw alone.

    Args:
        head: classifier, of which a copy makes the step.
        features: of the drawn batch, [B, D].
        labels: of the drawn batch, [B].
        shift: of the logits in the balanced softmax, [C].
        probabilities: `draw_probabilities`, [B].
        balanced_features: [M, D].
        balanced_labels: [M].
        lr: of the step.

    Returns:
        [].
    """
    parameters = {name: p.detach().requires_grad_() for name, p in head.named_parameters()}
    logits = functional_call(head, parameters, (features.detach(),))
    step = drawn_loss(losses.cross_entropies(logits, labels, shift), probabilities)
    stepped = stepped_classifier(step, parameters, lr)
    return losses.cross_entropies(functional_call(head, stepped, (balanced_features.detach(),)), balanced_labels).mean()
