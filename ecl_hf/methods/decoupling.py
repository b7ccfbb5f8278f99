"""Decoupling representation and classifier (Kang et al., ICLR 2020): tau-norm, cRT, LWS and NCM.

All four begin with an ordinary run (cross-entropy, instance-balanced sampling) and change nothing but the classifier:

- tau_norm divides its rows by a power of their norms and drops the bias;
- crt trains a new one on class-balanced batches, the encoder frozen;
- lws trains one scale for each class on such batches, on top of the frozen classifier;
- ncm takes the nearest class mean instead.

Read: facebookresearch/classifier-balancing@f162ade (tau_norm.py, models/TauNormClassifier.py, models/KNNClassifier.py,
run_networks.py, data/ClassAwareSampler.py, config).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ecl_hf.heads import ECLHead, ECLNormalisedHead, normalise_chunks

NEVER = -1e4
"""Logit of a class that can't be the answer; half precision still holds it."""


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """Rows of a classifier divided by a power of their norms, `w_c / |w_c|^tau`.

    Args:
        weight: [C, D].
        tau: 0 leaves the rows as they are, 1 makes all of them equally long.

    Returns:
        [C, D]; a row of zeros stays one.
    """
    norms = weight.norm(dim=-1, keepdim=True)
    return weight / torch.where(norms > 0, norms, 1.0) ** tau


class ScaledHead(nn.Module):
    """LWS: a head whose logits, bias and all, are multiplied by one learned scale for each class; [B, D] -> [B, C].

    Args:
        head: a linear classifier.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.scales = nn.Parameter(torch.ones_like(head.bias))

    def forward(self, features: Tensor) -> Tensor:
        """`s_c (w_c . v + b_c)`."""
        return self.scales * self.head(features)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The head with the scales inside its weights and its bias."""
        self.head.weight.mul_(self.scales[:, None])
        self.head.bias.mul_(self.scales)
        return self.head


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class.

    Args:
        features: of the whole training set, [N, D].
        labels: class indices, [N].
        num_classes: C.

    Returns:
        [C, D]; NaN for a class without images.
    """
    sums = features.new_zeros(num_classes, features.shape[-1]).index_add_(0, labels, features)
    return sums / labels.bincount(minlength=num_classes)[:, None]


def nearest_mean_classifier(means: Tensor) -> tuple[Tensor, Tensor]:
    """The linear classifier whose logits are `-|v - k_c|^2`, but for `|v|^2`, which is the same for all classes.

    Args:
        means: k, [C, D]; NaN for a class without images, which is never the nearest.

    Returns:
        Weight `2 k_c`, [C, D], and bias `-|k_c|^2`, [C].
    """
    absent = means.isnan().any(-1)
    bias = torch.where(absent, NEVER, -means.square().sum(-1))
    return 2 * means.nan_to_num(), bias


@torch.no_grad()
def nearest_mean_head(
    features: Tensor, labels: Tensor, num_classes: int, kind: Literal["raw", "normalised", "centred"]
) -> ECLHead | ECLNormalisedHead:
    """NCM: the head that answers with the nearest class mean.

    Args:
        features: of the whole training set in the evaluation view, [N, D].
        labels: class indices, [N].
        num_classes: C.
        kind: what means and distances are of: the features, the features divided by their norms, or those after the
            mean over all images is taken off (which is mostly that of the large classes). Published as un, l2n, cl2n.
    """
    centre = features.mean(0) if kind == "centred" else torch.zeros_like(features[0])
    if kind != "raw":
        features = normalise_chunks(features - centre)
    weight, bias = nearest_mean_classifier(class_means(features, labels, num_classes))
    make = ECLHead if kind == "raw" else ECLNormalisedHead
    head = make(features.shape[-1], num_classes).to(features)
    head.load_state_dict({"weight": weight, "bias": bias} | ({} if kind == "raw" else {"centre": centre}))
    return head
