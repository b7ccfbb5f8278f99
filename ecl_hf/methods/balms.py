"""BALMS: balanced softmax with a learned sampler (Ren et al., NeurIPS 2020). Balanced softmax alone is `bc`.

Read: jiawei-ren/BalancedMetaSoftmax-Classification@34a61e4 loss/BalancedSoftmaxLoss.py, data/MetaSampler.py,
run_networks.py, utils.py, config.

The first stage is cross-entropy. In the second the encoder is frozen and a new classifier learns from pictures drawn in
proportion to the rate of their class. The rates learn as well: had a picture's draw been likelier, would the
classifier's next step have served a class-balanced batch better?

Readings: an epoch's pictures are drawn by the rates at its start, since they are loaded ahead of the steps. The step by
which a draw is judged is plain gradient descent at a fixed rate; the published one has the optimiser's momentum and
course. The balanced batch comes from the training set, as the code has it for CIFAR.

Published (CIFAR-10/100-LT, imbalance 200, best epoch on the test set): cross-entropy 74.0 / 41.2, balanced softmax
79.8 / 46.7, with the second stage but no sampler 81.8 / 47.2, BALMS 82.2 / 48.0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.adam import adam

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.data.samplers import by_weights, class_balanced
from ecl_hf.methods.base import (
    EpochContext,
    Experts,
    Method,
    Part,
    PartsContext,
    Stage,
    TaskOutputs,
    Term,
    Trains,
)
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import BALANCED_CROSS_ENTROPY, CROSS_ENTROPY


@dataclass(kw_only=True)
class BALMSSettings(Settings):
    """Of the learned sampler."""

    rate_lr: float = 0.01
    """Learning rate of the classes' rates, which Adam moves."""
    step_lr: float = 0.1
    """Learning rate of the classifier's step by which draws are judged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rate_lr", "step_lr"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")


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


class RateLearner(Part):
    """How often the pictures of each class are drawn, `sigmoid(a_c)`, and Adam's state for it.

    Its numbers are buffers, since it has an optimiser of its own.
    """

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        zeros = torch.zeros(len(context.class_counts))
        self.lr = context.settings.rate_lr
        self.register_buffer("labels", context.labels, persistent=False)
        for name in ("scores", "mean", "square", "drawn_by"):
            self.register_buffer(name, zeros.clone())
        self.register_buffer("steps", torch.zeros(()))
        self.gradient: Tensor | None = None

    @property
    def picture_weights(self) -> Tensor:
        """Rates of the pictures at the start of the epoch, [N]."""
        return self.drawn_by.sigmoid()[self.labels]

    def before_epoch(self, context: EpochContext) -> None:  # noqa: ARG002
        """Let the epoch's pictures be drawn by the rates of now."""
        self.drawn_by.copy_(self.scores)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the rates by the gradient of the last batch."""
        state = [[self.mean], [self.square], [], [self.steps]]
        usual = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        adam([self.scores], [self.gradient], *state, foreach=False, lr=self.lr, **usual)


def _meta(out: TaskOutputs, settings: BALMSSettings) -> Tensor:
    part = out.parts["meta"]
    scores = part.scores.detach().requires_grad_()
    log_rates = F.logsigmoid(scores)[part.labels]
    probabilities = draw_probabilities(log_rates, conditional_noise(log_rates, out.indices), out.indices)
    features, balanced = losses.full_precision(out.features[0], out.partner.features[0])
    drawn = (features, out.labels, out.log_prior_shift, probabilities)
    loss = meta_loss(out.heads[0], *drawn, balanced, out.partner_labels, settings.step_lr)
    (part.gradient,) = torch.autograd.grad(loss, scores)
    return loss.detach()


META = Term("meta", _meta, weight=lambda *_: 0.0, part=RateLearner, whole_batch=True)
"""Only looked at: it moves the rates alone, which it does itself."""
CLASSIFIERS = Trains(lambda name: ".head." in name, statistics=True)

METHODS = {
    "balms": Method(
        (
            Stage((CROSS_ENTROPY,), "features", share=13 / 15),
            Stage(
                (BALANCED_CROSS_ENTROPY, META),
                "classifier",
                by_weights,
                class_balanced(1),
                trains=CLASSIFIERS,
                heads="new",
                share=2 / 15,
                schedule="cosine",
            ),
        ),
        BALMSSettings,
        experts=Experts(1, most=1),
    )
}
