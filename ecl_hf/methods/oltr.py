"""OLTR: open long-tailed recognition (Liu et al., CVPR 2019).

After a plain training, rare classes borrow from a memory of class centroids: the head adds to a picture's feature what
the memory says of it, and measures how far the picture is from all classes (`ECLMemoryHead`).

Read: zhmiao/OpenLongTailRecognition-OLTR@f50e375 (loss/DiscCentroidsLoss.py, models/MetaEmbeddingClassifier.py,
models/CosNormClassifier.py, layers/ModulatedAttLayer.py, run_networks.py, config/ImageNet_LT).

Published: ImageNet-LT 35.6 with ResNet-10; what is quoted for ResNet-50 and iNaturalist 2018 are others' runs.
"""

from torch import Tensor

from ecl_hf.losses import full_precision

MARGIN = 10.0
REPEL = 0.01
"""Mean squared distance from other classes' centroids up to which they repel, and the weight of that."""


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
