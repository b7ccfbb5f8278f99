"""TSC: targeted supervised contrastive learning (Li, Cao et al., CVPR 2022), on top of KCL.

Class targets are spread evenly over the sphere before training. In the second half of the first stage each class's
features are drawn to a target; the targets are handed out anew at each step, to the classes whose features are near.

Read: LTH14/targeted-supcon@c4f15eb moco/builder.py, main_moco_supcon_imba.py, main_lincls_imba.py,
target_generation.py, cifar_dirty/*, supp_release.pdf. Code and paper differ: the code divides the target's weight, too,
by the number of positives, so that its 0.2 is 0.025 at 6 picked keys. The paper's form is the default, the code's a
setting.

Departures: targets that fit a regular simplex are computed and not searched for; centroids and assignment move after
the step, so that a batch meets the assignment of the batches before it (there: its own counts already); all data sets
are trained with a queue, where the CIFAR code contrasts batches of 1024; the last stage trains the classifier with
cross-entropy, as published for ImageNet-LT, on CIFAR too, where it is 200 epochs of LDAM-DRW; the frozen encoder's
BatchNorm is in evaluation mode; the query is the recipe's supervised view and the key its contrastive one, which are
drawn alike there.

Published top-1: CIFAR-10-LT at imbalance 10/50/100 88.7/82.9/79.7, CIFAR-100-LT 59.0/47.4/43.8 (1000 epochs, then 200
of LDAM-DRW); ImageNet-LT 52.4 (KCL 51.5), iNaturalist 2018 69.7 (ResNet-50, 400 epochs, then 40 of the classifier).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.losses import contrast, full_precision, key_similarities, share_evenly
from ecl_hf.methods.base import (
    BACKBONES,
    Experts,
    Method,
    Part,
    PartsContext,
    PerImage,
    Stage,
    TaskOutputs,
    Term,
    sum_over_processes,
)
from ecl_hf.methods.kcl import CONTRAST, KCLSettings, classifier_stage, draw_positives

TARGET_TEMPERATURE = 0.07
TARGET_STEPS = 10_000
CENTROID_MOMENTUM = 0.9


def spread(targets: Tensor, temperature: float = TARGET_TEMPERATURE) -> Tensor:
    """How near the targets are to each other: `mean_i ln sum_j exp(t_i.t_j / T)`, itself included.

    Args:
        targets: any rows, which are L2-normalised here, [C, P].
        temperature: of the similarities.

    Returns:
        [].
    """
    targets = F.normalize(*full_precision(targets), dim=-1)
    return (targets @ targets.T / temperature).logsumexp(-1).mean()


def simplex(num_classes: int, dim: int) -> Tensor:
    """Rows of unit length whose cosines are all -1 / (C - 1), the least possible; needs C <= P + 1.

    Args:
        num_classes: C, at least 2.
        dim: P.

    Returns:
        [C, P], float32.
    """
    centred = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    directions = torch.linalg.eigh(centred).eigenvectors[:, 1:]  # the first has the eigenvalue 0
    return F.pad(F.normalize(directions, dim=-1), (0, dim - num_classes + 1)).float()


def spread_targets(num_classes: int, dim: int, seed: int = 0, steps: int = TARGET_STEPS) -> Tensor:
    """One target for each class, as far from each other as can be: a simplex, or the best of a search by Adam.

    Args:
        num_classes: C.
        dim: P.
        seed: of the search, which starts from normal rows.
        steps: of the search.

    Returns:
        L2-normalised rows, [C, P], float32.
    """
    if 2 <= num_classes <= dim + 1:
        return simplex(num_classes, dim)
    rows = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=1e-3)
    least, best = torch.inf, rows.detach().clone()
    with torch.enable_grad():
        for _ in range(steps):
            value = spread(rows)
            if value.item() < least:
                least, best = value.item(), rows.detach().clone()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return F.normalize(best, dim=-1)


def move_centroids(centroids: Tensor, sums: Tensor, momentum: float = CENTROID_MOMENTUM) -> Tensor:
    """Moving averages of the directions of the classes: `u(0.9 c + 0.1 u(mean))`; absent classes stay.

    Args:
        centroids: L2-normalised, [C, P].
        sums: summed queries of each class's pictures in the batch (of all processes), [C, P]; 0 for an absent class.
        momentum: share that stays.

    Returns:
        [C, P].
    """
    moved = F.normalize(momentum * centroids + (1 - momentum) * F.normalize(sums, dim=-1), dim=-1)
    return torch.where(sums.any(-1, keepdim=True), moved, centroids)


def assign(centroids: Tensor, targets: Tensor) -> Tensor:
    """The target of each class such that the similarities of classes and targets have the greatest sum.

    Args:
        centroids: [C, P].
        targets: [C, P].

    Returns:
        Permutation of 0..C-1, [C].
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and of use to this method alone

    similarity = (centroids @ targets.T).cpu().numpy()
    return torch.as_tensor(linear_sum_assignment(similarity, maximize=True)[1], device=centroids.device)


def targeted_contrast(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    picked: Tensor,
    targets: Tensor,
    own_target: Tensor,
    temperature: float,
    target_weight: float,
    as_in_code: bool = False,
) -> Tensor:
    """KCL with the targets among the candidates, and the own class's target as a further positive.

    Args:
        queries: L2-normalised projections of the first view, [B, P].
        keys: L2-normalised keys of the second view, [B, P]; carry no gradient.
        queue: keys of earlier batches, [Q, P].
        picked: positives in the queue, boolean, [B, Q].
        targets: L2-normalised, [C, P].
        own_target: row of the target of each picture's class, [B].
        temperature: of the similarities.
        target_weight: of the target's log-probability, beside the mean over the other positives.
        as_in_code: divide by the number of all positives, the target too, as the published code does.

    Returns:
        [B].
    """
    queries, targets = full_precision(queries, targets)
    scores = torch.cat([key_similarities(queries, keys, queue), queries @ targets.T], dim=1) / temperature
    pictures = torch.cat([torch.ones_like(picked[:, :1]), picked], dim=1)
    target = target_weight * F.one_hot(own_target, len(targets)).to(scores.dtype)
    if as_in_code:
        weights = torch.cat([pictures, target], dim=1) / (pictures.sum(1, keepdim=True) + 1)
    else:
        weights = torch.cat([share_evenly(pictures, scores.dtype), target], dim=1)
    return contrast(scores, weights)


@dataclass(kw_only=True)
class TSCSettings(KCLSettings):
    """Of targeted supervised contrast; the defaults are those for ImageNet-LT, but for the classifier's rate."""

    target_weight: float = 0.2
    """Weight of the target among the positives."""
    target_form: Literal["paper", "code"] = "paper"
    """`paper`: the weight as it is; `code`: divided by the number of positives, as the published code has it."""
    target_steps: int = TARGET_STEPS
    """Steps of the search for the targets, where they are no simplex: more classes than projection_dim + 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target_weight >= 0, f"loss.target_weight must not be negative, got {self.target_weight}")
        require(self.target_steps >= 1, f"loss.target_steps must be at least 1, got {self.target_steps}")


class Targets(Part):
    """Targets, the classes' centroids, and which target a class has; all move after each step, by all its pictures."""

    def __init__(self, num_classes: int, dim: int, steps: int) -> None:
        super().__init__()
        self.register_buffer("targets", spread_targets(num_classes, dim, steps=steps))
        self.register_buffer("centroids", F.normalize(torch.randn(num_classes, dim), dim=-1))
        self.register_buffer("assignment", assign(self.centroids, self.targets))
        self.register_buffer("sums", torch.zeros(num_classes, dim))

    @torch.no_grad()
    def collect(self, queries: Tensor, labels: Tensor) -> None:
        """Remember queries [B, P] of classes [B] until the end of the step."""
        self.sums.index_add_(0, labels, queries.detach().to(self.sums.dtype))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centroids of the classes that the step had pictures of, and assign the targets anew."""
        self.centroids = move_centroids(self.centroids, sum_over_processes(self.sums))
        self.assignment = assign(self.centroids, self.targets)
        self.sums.zero_()


def _targets(context: PartsContext) -> Targets:
    settings = context.settings
    return Targets(len(context.class_counts), settings.projection_dim, settings.target_steps)


def _contrast(out: TaskOutputs, settings: TSCSettings) -> PerImage:
    part = out.parts["contrast"]
    part.collect(out.queries[0], out.labels)
    losses = targeted_contrast(
        out.queries[0],
        out.keys[0],
        out.queues[0],
        draw_positives(out.labels, out.queue_labels, settings.positives),
        part.targets,
        part.assignment[out.labels],
        settings.temperature,
        settings.target_weight,
        settings.target_form == "code",
    )
    return PerImage(losses)


TARGETED = Term("contrast", _contrast, needs=frozenset({"momentum"}), part=_targets)

METHODS = {
    "tsc": Method(
        (
            Stage((CONTRAST,), "contrast", trains=BACKBONES, share=5 / 11),
            Stage((TARGETED,), "targeted contrast", trains=BACKBONES, share=5 / 11),
            classifier_stage(1 / 11),
        ),
        TSCSettings,
        experts=Experts(1, most=1),
    )
}
