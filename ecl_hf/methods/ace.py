"""A reading of ACE: ally complementary experts, each for a smaller set of rarer classes (Cai et al., ICCV 2021).

There is no code; this follows the paper's description where it could be read, and readings elsewhere. The first expert
learns all classes, each further one a smaller set of the rarest. An image teaches the experts whose set has its
class, by cross-entropy over all classes; there the other classes' logits are pulled to zero. Only the first expert
teaches the shared stages, and a further expert's learning rate is in proportion to its share of the images. A class is
scored by the mean over the experts that know it, after all were brought to the scale of the first one's weights.

Readings: the pull is the sum of squares with weight 1; sets are cut at equal numbers of classes; the scale is the ratio
of the weight matrices' Frobenius norms; average pooling, where the paper has a learnt one. No result of this file is a
reproduction of the paper.

Published, 4 experts, 400 epochs: CIFAR-100-LT, imbalance 50/100: 51.9 / 49.6; CIFAR-10-LT: 84.9 / 81.4; ImageNet-LT,
ResNet-50 / ResNeXt-50: 54.7 / 56.6; iNaturalist 2018: 72.9.
"""

import torch
from torch import Tensor

from ecl_hf.losses import cross_entropies, full_precision
from ecl_hf.methods.base import FinishContext, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings
from ecl_hf.modeling_ecl import ECLForImageClassification


def nested_class_sets(class_counts: Tensor, num_experts: int) -> Tensor:
    """Classes of each expert: all for the first, of the rest each `C / K` of the most frequent ones fewer.

    Args:
        class_counts: training images of each class, [C].
        num_experts: K.

    Returns:
        Boolean [K, C]; each set holds the next.
    """
    rank = class_counts.argsort(descending=True, stable=True).argsort()
    starts = [len(rank) * k // num_experts for k in range(num_experts)]
    return torch.stack([rank >= start for start in starts])


def complementary_losses(expert_logits: Tensor, labels: Tensor, class_sets: Tensor) -> Tensor:
    """Cross-entropy plus the squares of the logits of classes that the expert does not know.

    Args:
        expert_logits: raw logits, [K, B, C].
        labels: class indices, [B].
        class_sets: classes that each expert knows, boolean [K, C].

    Returns:
        [K, B]; 0 where the expert does not know the label.
    """
    (expert_logits,) = full_precision(expert_logits)
    cross_entropy = cross_entropies(expert_logits, labels)
    pull = (expert_logits.square() * ~class_sets[:, None]).sum(-1)
    return (cross_entropy + pull) * class_sets[:, labels]


def _supervision(out: TaskOutputs, settings: Settings) -> PerImage:  # noqa: ARG001
    sets = nested_class_sets(out.class_counts, len(out.cls_logits))
    return PerImage(complementary_losses(out.cls_logits, out.labels, sets), sets.float())


def share_of_images(name: str, settings: Settings, model: ECLForImageClassification) -> float:  # noqa: ARG001
    """Factor on the learning rate of an expert's parameters: the share of the images whose class it knows."""
    if not name.startswith("model.experts."):
        return 1.0
    counts = torch.tensor(model.config.class_counts)
    known = nested_class_sets(counts, len(model.experts))[int(name.split(".")[2])]
    return (counts[known].sum() / counts.sum()).item()


def scale_heads(context: FinishContext) -> None:
    """Bring all experts' logits to the scale of the first one's: heads times `|W_1| / |W_k|`."""
    heads = [expert.head for expert in context.model.experts]
    with torch.no_grad():
        for head in heads:
            factor = heads[0].weight.norm() / head.weight.norm()
            head.weight.mul_(factor)
            head.bias.mul_(factor)


def _known(class_counts: Tensor, settings: Settings, num_experts: int) -> list[list[int]]:  # noqa: ARG001
    return nested_class_sets(class_counts, num_experts).int().tolist()


SUPERVISION = Term("supervision", _supervision)

METHODS = {
    "ace": Method(
        (Stage((SUPERVISION,), lr_factor=share_of_images, trunk_from="first"),),
        head=HeadKind("linear"),
        finish=(scale_heads,),
        aggregation=_known,
    )
}
