"""OLTR: open long-tailed recognition (Liu et al., CVPR 2019).

After a plain training, rare classes borrow from a memory of class centroids: the head adds to a picture's feature what
the memory says of it, and measures how far the picture is from all classes (`ECLMemoryHead`).

Read: zhmiao/OpenLongTailRecognition-OLTR@f50e375 (loss/DiscCentroidsLoss.py, models/MetaEmbeddingClassifier.py,
models/CosNormClassifier.py, layers/ModulatedAttLayer.py, run_networks.py, config/ImageNet_LT).

Readings: the modulated attention before pooling (`loss.attention`), published for maps of 7 x 7, is made for those of
the pictures at hand, and off by default: small pictures have none in any published run. The layer before the head is as
wide as the features, and all but attention, layer, memory and selector goes on from the first stage.

Published: ImageNet-LT 35.6 with ResNet-10; what is quoted for ResNet-50 and iNaturalist 2018 are others' runs.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ecl_hf.backbones import add_attention
from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.heads import ECLMemoryHead, ECLNeckHead
from ecl_hf.losses import full_precision
from ecl_hf.methods.base import EpochContext, HeadContext, Method, Part, PartsContext, Stage, TaskOutputs, Term
from ecl_hf.methods.decoupling import ONE_LINEAR, class_means
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY
from ecl_hf.modeling_ecl import ECLForImageClassification

MARGIN = 10.0
REPEL = 0.01
"""Mean squared distance from other classes' centroids up to which they repel, and the weight of that."""


@dataclass(kw_only=True)
class OLTRSettings(Settings):
    """Of the second stage, with the memory."""

    centroid_weight: float = 0.01
    """Weight of the discriminative centroids loss."""
    attention: bool = False
    """Put the modulated attention before the encoder's pooling in the second stage, as published for ImageNet-LT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.centroid_weight >= 0, f"loss.centroid_weight must not be negative, got {self.centroid_weight}")


def centroid_loss(features: Tensor, labels: Tensor, centroids: Tensor, weight: float) -> Tensor:
    """Discriminative centroids loss: near the own class's centroid, far from the others.

    `w (sum_i |f_i - m_y|^2 / (2 B) + 0.01 max(0, 10 - sum_i sum_{c != y} |f_i - m_c|^2 / (B C)))`.

    As published, the gradient by which a centroid is attracted is of its own kind, `sum_{i: y = c} (m_c - f_i) / (B (1
    + n_c))` with n_c pictures of the class in the batch, and w is not in it; the published code passes over the factor
    there.

    Args:
        features: f, [B, D].
        labels: class indices, [B].
        centroids: m, [C, D].
        weight: w.

    Returns:
        [].
    """
    features, centroids = full_precision(features, centroids)
    own, size, classes = centroids[labels], len(features), len(centroids)
    attract = (features - own.detach()).square().sum() / (2 * size)
    squares = classes * features.square().sum() + size * centroids.square().sum()  # |f_i - m_c|^2 of all pairs
    others = squares - 2 * features.sum(0) @ centroids.sum(0) - (features - own).square().sum()
    repel = REPEL * (MARGIN - others / (size * classes)).clamp_min(0)
    # Adds nothing to the value, and the published gradient of the centroids
    in_batch = labels.bincount(minlength=classes)[labels]
    pull = ((own - features.detach()).square().sum(-1) / (1 + in_batch)).sum() / (2 * size)
    return weight * (attract + repel) + pull - pull.detach()


@torch.no_grad()
def size_of_map(model: ECLForImageClassification) -> list[int]:
    """Height and width of what the encoder pools.

    Raises:
        ValueError: it pools no map before which an attention could stand.
    """
    backbone, training = model.experts[0].backbone, model.training
    require(
        isinstance(getattr(backbone, "global_pool", None), nn.Module),
        f"loss.attention: {model.config.architecture}, as it is used here, pools no map by a layer of its own; take a "
        "ResNet, for instance, and model.tune other than head",
    )
    image = torch.zeros(1, *model.config.pretrained_cfg["input_size"], device=next(backbone.parameters()).device)
    model.eval()
    maps = backbone.forward_features(image if model.trunk is None else model.trunk(image))
    model.train(training)
    return list(maps.shape[-2:])


def with_memory(head: nn.Linear, context: HeadContext) -> ECLNeckHead:
    """The head of the second stage: a new layer, and a memory whose class probabilities are those of the first head.

    The attention, which is new then too, is put into the encoder.
    """
    if context.settings.attention:
        config, backbone = context.model.config, context.model.experts[0].backbone
        config.attention_map = size_of_map(context.model)
        add_attention(backbone, *config.attention_map).to(head.weight.device)
    classifier = ECLMemoryHead(head.in_features, head.out_features, scale=16.0)
    classifier.probabilities.load_state_dict(head.state_dict())
    return ECLNeckHead(head.in_features, classifier)


class Probe(Part):
    """Finds out before the first stage whether the encoder can have the attention of the second."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        if context.settings.attention:
            size_of_map(context.model)


class Memory(Part):
    """Begins the second stage with the class means of the training set as its centroids."""

    def __init__(self, _: PartsContext) -> None:
        super().__init__()

    @torch.no_grad()
    def before_epoch(self, context: EpochContext) -> None:
        """Before the first epoch, look at all pictures."""
        if context.time.epoch == 0:
            head = context.model.experts[0].head
            labels, _, features = context.predict()
            seen = labels >= 0
            embedded = head.embed(features[seen, 0].to(head.neck.weight)).cpu()
            means = class_means(embedded, labels[seen], head.out_features)
            head.classifier.memory.copy_(means.nan_to_num())  # of a class without pictures, nothing is known


def _centroids(out: TaskOutputs, settings: OLTRSettings) -> Tensor:
    (features,) = full_precision(out.features[0])
    head = out.heads[0]
    return centroid_loss(head.embed(features), out.labels, head.classifier.memory, settings.centroid_weight)


def _rates(name: str, *_: Any) -> float:
    """The encoder and the centroids move at a tenth of the head's learning rate."""
    return 0.1 if ".head." not in name or name.endswith(".memory") else 1.0


CENTROIDS = Term("centroids", _centroids, part=Memory, whole_batch=True)

METHODS = {
    "oltr": Method(
        (
            Stage((replace(CROSS_ENTROPY, part=Probe),), "representation", share=1 / 3),
            Stage(
                (CROSS_ENTROPY, CENTROIDS),
                "memory",
                class_aware(4),
                heads=with_memory,
                share=2 / 3,
                lr_factor=_rates,
            ),
        ),
        OLTRSettings,
        **ONE_LINEAR,
    )
}
