"""Decoupling representation and classifier (Kang et al., ICLR 2020): tau-norm, cRT, LWS and NCM.

All four begin with an ordinary run (cross-entropy, instance-balanced sampling) and change nothing but the classifier:

- tau_norm divides its rows by a power of their norms and drops the bias;
- crt trains a new one on class-balanced batches, the encoder frozen;
- lws trains one scale for each class on such batches, on top of the frozen classifier;
- ncm takes the nearest class mean instead.

Read: facebookresearch/classifier-balancing@f162ade (tau_norm.py, models/TauNormClassifier.py, models/KNNClassifier.py,
run_networks.py, data/ClassAwareSampler.py, config).

Readings: the epochs of the second stage are a share of all epochs (of 100, cRT takes the published 10, and LWS 5). As
published, the BatchNorm layers of the frozen encoder go on counting on the class-balanced batches; `shift_statistics`
turns it off. tau of tau-norm is a setting (published: 0.7 on ImageNet-LT); the code prints the accuracies of 21 values
on the chosen split. NCM takes Euclidean distances; the code's "cos" is another similarity, the dot product.

Published top-1 on ImageNet-LT, ResNeXt-50, 90 epochs and those of the second stage, the best epoch by the validation
set: tau-norm 49.4, cRT 49.6, LWS 49.9, NCM 47.3 (the repository's README).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.heads import ECLHead, ECLNormalisedHead, normalise_chunks
from ecl_hf.methods.base import Experts, FinishContext, HeadContext, HeadKind, Method, Stage, Trains, is_backbone
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY

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
        self.in_features = head.in_features
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


@dataclass(kw_only=True)
class TauNormSettings(Settings):
    """Of tau-norm."""

    tau: float = 0.7
    """Power of the norms that divide the classifier's rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau >= 0, f"loss.tau must not be negative, got {self.tau}")


@dataclass(kw_only=True)
class FrozenEncoderSettings(Settings):
    """Of a stage that trains no encoder."""

    shift_statistics: bool = True
    """Let the BatchNorm statistics of the frozen encoder follow the batches of the stage."""


@dataclass(kw_only=True)
class NCMSettings(Settings):
    """Of the nearest class mean."""

    kind: Literal["raw", "normalised", "centred"] = "centred"
    """Whether features are divided by their norms, and their mean taken off before."""


def shifts_statistics(settings: FrozenEncoderSettings) -> bool:
    """Whether a frozen encoder's BatchNorm layers go on counting."""
    return settings.shift_statistics


HEADS_ALONE = Trains(lambda name: not is_backbone(name), shifts_statistics)
SCALES_ALONE = Trains(lambda name: name.endswith(".scales"), shifts_statistics)


def with_scales(head: nn.Linear, _: HeadContext) -> ScaledHead:
    """A head with scales on top."""
    return ScaledHead(head)


@torch.no_grad()
def _normalise_rows(context: FinishContext) -> None:
    for expert in context.model.experts:
        expert.head.weight.copy_(tau_normalised(expert.head.weight, context.settings.tau))
        expert.head.bias.zero_()


def _take_means(context: FinishContext) -> None:
    labels, _, features = context.predict()
    seen = labels >= 0
    for k, expert in enumerate(context.model.experts):
        head = nearest_mean_head(features[seen, k], labels[seen], len(context.class_counts), context.settings.kind)
        expert.head = head.to(expert.head.weight)


def representation(share: float) -> Stage:
    """The first stage: an ordinary run, for a share of the epochs."""
    return Stage((CROSS_ENTROPY,), "representation", share=share)


ONE_LINEAR = {"head": HeadKind("linear"), "experts": Experts(1, most=1)}
"""What most methods that mend a classifier have in common."""

METHODS = {
    "tau_norm": Method((representation(1),), TauNormSettings, finish=(_normalise_rows,), **ONE_LINEAR),
    "crt": Method(
        (
            representation(0.9),
            Stage(
                (CROSS_ENTROPY,),
                "classifier",
                class_aware(4),
                trains=HEADS_ALONE,
                heads="new",
                share=0.1,
                schedule="cosine",
            ),
        ),
        FrozenEncoderSettings,
        **ONE_LINEAR,
    ),
    "lws": Method(
        (
            representation(0.95),
            Stage(
                (CROSS_ENTROPY,),
                "scales",
                class_aware(4),
                trains=SCALES_ALONE,
                heads=with_scales,
                share=0.05,
                schedule="cosine",
            ),
        ),
        FrozenEncoderSettings,
        **ONE_LINEAR,
    ),
    "ncm": Method((representation(1),), NCMSettings, finish=(_take_means,), **ONE_LINEAR),
}
