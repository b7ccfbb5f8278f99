"""CKT, class knowledge transfer (Parisot et al., CVPR 2022): a reading.

The abstract says: prototypes and the rows of a learned cosine classifier are two views of the class centres; an
attention over the common classes, computed from prototypes, recomposes their rows into rows for the rare classes,
without training; an ensemble of classifiers belongs to the result. All else here is a reading; neither code nor the
full text could be read, and no result of it reproduces the published 54.2 % (ImageNet-LT, ResNeXt-50).

Readings: prototypes are normalised means of normalised features; classes with at most t images are rare; a rare class
attends to the k common classes with the most similar prototypes; its row mixes what it receives with its own prototype.
The ensemble is the mean of three cosine classifiers: the one of the run, one retrained on class-balanced batches, and
the one with recomposed rows. They see the same features, so their mean folds into one matrix (`ECLNormalisedHead`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.methods.decoupling import class_means


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
