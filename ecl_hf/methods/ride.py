"""RIDE: diverse experts on shared first stages, their distillation, and their routing (Wang et al., ICLR 2021).

Read: frank-xwang/RIDE-LongTailRecognition@ab8be5c model/loss.py, model/ldam_drw_resnets, model/fb_resnets,
trainer/trainer.py, train.py, configs. Each expert learns by LDAM's cross-entropy, after four fifths of training with
class weights, and is pushed away from the mean of all experts, then with a temperature for each class.

Departures from the paper, with the code: the push is from the detached mean of the logits, not between pairs; the class
temperatures are divided by the largest. From the code: it takes `diversity` 0 for a loss of another kind, on the mean
logits; ours just leaves the push out. Its teacher runs in training mode (batch statistics, drifting averages); ours
is in evaluation mode.

The router is trained with the batches of the experts; in the code they are four times as large, 512.

As in the code, all losses are sums over the experts, and the distillation's whole loss is multiplied by the number
of experts once more, which is a learning rate that many times as large.

Published, best test epoch on CIFAR: CIFAR-100-LT, ResNet-32, imbalance 100, 200 epochs: 48.6 (3 experts), distilled
from 6 experts 49.0 / 49.4 (3 / 4 experts); ImageNet-LT, ResNeXt-50, 100 epochs: 55.7 (3), 56.8 (4, distilled);
iNaturalist 2018, ResNet-50, 100 epochs: 71.2 (3), 72.6 (4, distilled). A user of the code found no gain from the push,
another .4 lost by the routing (its issues 7 and 6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.backbones import stage_names
from ecl_hf.checks import require
from ecl_hf.data.samplers import class_balanced
from ecl_hf.losses import (
    cross_entropies,
    full_precision,
    log_class_prior,
    margin_logits,
    pairwise_kl,
    soft_label_losses,
)
from ecl_hf.methods.base import Experts, HeadKind, Method, PerImage, Stage, TaskOutputs, Term, Trains
from ecl_hf.methods.ldam import LDAMDRWSettings, ldam_margins, unit_rows
from ecl_hf.methods.terms import deferred_weights


@dataclass(kw_only=True)
class RIDESettings(LDAMDRWSettings):
    """Of the experts' margins, class weights and diversity."""

    diversity: float = -0.45
    """Weight of the experts' divergence from their mean; below 0 it pushes them apart. Published -0.2 for ImageNet-LT
    and iNaturalist."""
    temperature_spread: float = 0.05
    """How far the temperatures of the classes differ, from `reweight_from` on; published 0.02 for ImageNet-LT, and
    0.015 for iNaturalist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inside = 0 <= self.temperature_spread < 1
        require(inside, f"loss.temperature_spread must lie in [0, 1), got {self.temperature_spread}")


@dataclass(kw_only=True)
class RIDEDistilledSettings(RIDESettings):
    """Of the distillation, too."""

    distillation: float = 1.0
    """Weight of the divergence from the teacher."""
    temperature: float = 1.5
    """Of the distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distillation >= 0, f"loss.distillation must not be negative, got {self.distillation}")
        require(self.temperature > 0, f"loss.temperature must be positive, got {self.temperature}")


@dataclass(kw_only=True)
class RIDERoutedSettings(RIDESettings):
    """Of the router, too."""

    choices: int = 30
    """Largest logits that the router sees; all where there are fewer classes. Published 50 for more than 100."""
    router_width: int = 16
    """To which it reduces the features."""
    positive_weight: float = 100.0
    """Weight of images that need one more expert."""
    threshold: float = 0.5
    """Probability above which one more expert is asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("choices", "router_width"):
            require(getattr(self, name) >= 1, f"loss.{name} must be at least 1, got {getattr(self, name)}")
        require(self.positive_weight > 0, f"loss.positive_weight must be positive, got {self.positive_weight}")
        require(0 <= self.threshold <= 1, f"loss.threshold must lie in 0..1, got {self.threshold}")


def all_but_two_stages(encoder: nn.Module) -> tuple[int, int]:
    """Stages that the experts share, as published: 1 of 3 of a CIFAR ResNet, 2 of 4 of others; none elsewhere."""
    stages = len(stage_names(encoder))
    return (stages - 2 if stages in (3, 4) else 0), 0


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


def _supervision(out: TaskOutputs, settings: RIDESettings) -> PerImage:
    margins = ldam_margins(out.class_counts, settings.max_margin)
    losses = margin_losses(out.cls_logits, out.labels, margins, out.heads[0].scale)
    return PerImage(losses, deferred_weights(out, settings))


def _diversity(out: TaskOutputs, settings: RIDESettings) -> PerImage:
    spread = settings.temperature_spread if settings.has_begun(out.time.progress) else 0.0
    return PerImage(divergence_from_mean(out.cls_logits, diversity_temperatures(out.class_counts, spread)))


def _distillation(out: TaskOutputs, settings: RIDEDistilledSettings) -> PerImage:
    (logits,) = full_precision(out.cls_logits)
    return PerImage(soft_label_losses(logits.mean(0), out.teacher.logits.mean(0), settings.temperature))


def _routing(out: TaskOutputs, settings: RIDERoutedSettings) -> PerImage:
    scores = out.router(out.features.transpose(0, 1).float(), out.cls_logits.transpose(0, 1).float())
    return PerImage(routing_losses(scores.T, routing_targets(out.cls_logits, out.labels), settings.positive_weight))


def _router(class_counts: Tensor, settings: RIDERoutedSettings, _: int) -> dict[str, float]:
    choices = min(settings.choices, len(class_counts))
    return {"choices": choices, "width": settings.router_width, "threshold": settings.threshold}


SUPERVISION = Term("supervision", _supervision, two_labels=True)
DIVERSITY = Term("diversity", _diversity, "diversity")
# As published, the distilled experts' whole loss is added up over the experts once more
DISTILLED = (
    Term("supervision", _supervision, lambda out, _: len(out.cls_logits), two_labels=True),
    Term("diversity", _diversity, lambda out, settings: len(out.cls_logits) * settings.diversity),
    Term(
        "distillation",
        _distillation,
        lambda out, settings: len(out.cls_logits) * settings.distillation,
        needs=frozenset({"teacher"}),
    ),
)
ROUTING = Term("routing", _routing)
HEAD = HeadKind("cosine", scale=30.0, bias=False)
SHARING = Experts(shared=all_but_two_stages)
ROUTER = Trains(lambda name: name.startswith("model.router."))
EXPERTS = Trains(lambda name: not name.startswith("model.router."))

METHODS = {
    "ride": Method((Stage((SUPERVISION, DIVERSITY), heads=unit_rows),), RIDESettings, HEAD, SHARING),
    "ride_distilled": Method(
        (Stage(DISTILLED, heads=unit_rows),), RIDEDistilledSettings, HEAD, SHARING, teacher="ride"
    ),
    "ride_routed": Method(
        (
            Stage((SUPERVISION, DIVERSITY), "experts", trains=EXPERTS, heads=unit_rows, share=200 / 205),
            Stage((ROUTING,), "router", class_balanced(), trains=ROUTER, share=5 / 205, lr=0.1, schedule="cosine"),
        ),
        RIDERoutedSettings,
        HEAD,
        Experts(3, least=2, shared=all_but_two_stages),
        aggregation=_router,
    ),
}
