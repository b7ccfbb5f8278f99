"""CKT, class knowledge transfer (Parisot et al., CVPR 2022): a reading.

The abstract says: prototypes and the rows of a learned cosine classifier are two views of the class centres; an
attention over the common classes, computed from prototypes, recomposes their rows into rows for the rare classes,
without training; an ensemble of classifiers belongs to the result. All else here is a reading; neither code nor the
full text could be read, and no result of it reproduces the published 54.2 % (ImageNet-LT, ResNeXt-50).

Readings: prototypes are normalised means of normalised features; classes with at most t images are rare; a rare class
attends to the k common classes with the most similar prototypes; its row mixes what it receives with its own prototype.
The ensemble is the mean of three cosine classifiers: the one of the run, one retrained on class-balanced batches, and
the one with recomposed rows. They see the same features, so their mean folds into one matrix (`ECLNormalisedHead`).
The retraining has a tenth of all epochs.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.heads import ECLCosineHead, ECLNormalisedHead
from ecl_hf.methods.base import EpochContext, Experts, HeadContext, HeadKind, Method, Part, PartsContext, Stage, Trains
from ecl_hf.methods.decoupling import class_means, representation
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Normalised mean of the normalised features of each class.

    Args:
        features: of the whole training set in the evaluation view, [N, D].
        labels: class indices, [N].
        num_classes: C.

    Returns:
        [C, D]; zeros for a class without images.
    """
    return F.normalize(class_means(F.normalize(features, dim=-1), labels, num_classes).nan_to_num(), dim=-1)


def recomposed_rows(
    weight: Tensor,
    prototypes: Tensor,
    class_counts: Tensor,
    rare: int,
    neighbours: int,
    temperature: float,
    own: float,
) -> Tensor:
    """Rows of a cosine classifier, those of the rare classes recomposed from those of the common ones.

    For a rare class r, over the `neighbours` common classes j with the largest `P_r . P_j`:

        a_j = softmax_j(P_r . P_j / T),   v = u(sum_j a_j u(w_j)),   w_r = u(b P_r + (1 - b) v)

    Args:
        weight: w, [C, D].
        prototypes: P, unit vectors, [C, D].
        class_counts: training images of each class, [C].
        rare: classes with at most so many images are rare.
        neighbours: common classes that a rare class attends to, at most.
        temperature: T.
        own: b, the share of a rare class's own prototype.

    Returns:
        Unit rows, [C, D]; the common ones as they were, all of them where no class or every class is rare.
    """
    rows = F.normalize(weight, dim=-1)
    few = class_counts <= rare
    if few.all() or not few.any():
        return rows
    nearest, positions = (prototypes[few] @ prototypes[~few].T).topk(min(neighbours, int((~few).sum())), dim=-1)
    received = torch.einsum("rk,rkd->rd", (nearest / temperature).softmax(-1), rows[~few][positions])
    recomposed = own * prototypes[few] + (1 - own) * F.normalize(received, dim=-1)
    return rows.index_put((few,), F.normalize(recomposed, dim=-1))


class KnowledgeTransferHead(nn.Module):
    """In training, a new cosine classifier beside that of the run; evaluated, the mean of three. [B, D] -> [B, C].

    Args:
        head: cosine classifier of the run, without bias.
    """

    def __init__(self, head: ECLCosineHead) -> None:
        super().__init__()
        self.in_features = head.in_features
        self.head = head
        self.retrained = copy.deepcopy(head)
        self.retrained.reset_parameters()
        self.register_buffer("recomposed", F.normalize(head.weight.detach(), dim=-1))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return self.retrained(features) if self.training else self.fold()(features)

    @torch.no_grad()
    def fold(self) -> ECLNormalisedHead:
        """The published head: the mean of the rows of all three."""
        rows = [F.normalize(self.head.weight, dim=-1), F.normalize(self.retrained.weight, dim=-1), self.recomposed]
        folded = ECLNormalisedHead(self.in_features, len(self.recomposed), bias=False).to(self.recomposed)
        folded.weight.copy_(self.head.scale * torch.stack(rows).mean(0))
        return folded


@dataclass(kw_only=True)
class CKTSettings(Settings):
    """Of class knowledge transfer; all of them readings."""

    rare: int = 20
    """Classes with at most so many images receive knowledge, those with more give it."""
    neighbours: int = 10
    """Common classes that a rare class attends to."""
    attention_temperature: float = 0.1
    """Temperature of the attention over them."""
    own_share: float = 0.5
    """Share of a rare class's own prototype in its new row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rare >= 0, f"loss.rare must not be negative, got {self.rare}")
        for name in ("neighbours", "attention_temperature"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        require(0 <= self.own_share <= 1, f"loss.own_share must lie in 0..1, got {self.own_share}")


class Transfer(Part):
    """Recomposes the rows of the rare classes before the retraining; the encoder does not move any more."""

    def __init__(self, _: PartsContext) -> None:
        super().__init__()

    @torch.no_grad()
    def before_epoch(self, context: EpochContext) -> None:
        """Once, before the first epoch."""
        if context.time.epoch:
            return
        labels, _, features = context.predict()
        seen, settings = labels >= 0, context.settings
        for k, expert in enumerate(context.model.experts):
            head: KnowledgeTransferHead = expert.head
            rows = recomposed_rows(
                head.head.weight.cpu(),
                class_prototypes(features[seen, k].float(), labels[seen], len(context.class_counts)),
                context.class_counts,
                settings.rare,
                settings.neighbours,
                settings.attention_temperature,
                settings.own_share,
            )
            head.recomposed.copy_(rows)


def _beside(head: ECLCosineHead, _: HeadContext) -> KnowledgeTransferHead:
    return KnowledgeTransferHead(head)


METHODS = {
    "ckt": Method(
        (
            representation(0.9),
            Stage(
                (replace(CROSS_ENTROPY, part=Transfer),),
                "classifier",
                class_aware(4),
                trains=Trains(lambda name: ".head.retrained." in name),
                heads=_beside,
                share=0.1,
                schedule="cosine",
            ),
        ),
        CKTSettings,
        head=HeadKind("cosine", bias=False),
        experts=Experts(1, most=1),
    )
}
