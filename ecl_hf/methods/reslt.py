"""ResLT: residual learning for long-tailed recognition (Cui et al., TPAMI 2022).

Three branches share encoder and classifier. The first learns from all classes, the second from the medium and rare
ones, the third from the rare ones; their logits are added, so that the later ones correct the first.

Read: jiequancui/ResLT@9650d93 (CIFAR/cifarTrain_reslt_cifar100.py, CIFAR/networks/resnet_cifar.py, ImageNetLT). Ours is
the CIFAR form for every encoder: a branch is a BatchNorm of its own on the encoder's last map. The published models for
ImageNet-LT have a 1x1 convolution there, and compute something else in the test than in training.

Published weights of the branches' loss (200 epochs, crop and flip): 0.72, 0.99 and 0.995 for CIFAR-100-LT with
imbalance 10, 50 and 100; 0.96, 0.998 and 0.998 for CIFAR-10-LT. Published accuracy, with RIDE's three experts in place
of one network: ImageNet-LT 57.6 (ResNeXt-50), iNaturalist 2018 72.9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.methods.base import HeadContext, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.decoupling import ONE_LINEAR
from ecl_hf.methods.settings import Settings
from ecl_hf.modeling_ecl import ECLForImageClassification

EPSILON = 1e-7
"""Added to the probabilities in the published loss of the branches: its values are at most 16.1."""


@dataclass(kw_only=True)
class ResLTSettings(Settings):
    """Of residual learning."""

    branch_weight: float = 0.995
    """Weight of the branches' own losses; the rest is the sum's."""
    medium: float = 0.65
    """Share of the classes, the rarest ones, that the second branch learns from."""
    tail: float = 0.3
    """Share of the classes that the third branch learns from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("branch_weight", "medium", "tail"):
            require(0 <= getattr(self, name) <= 1, f"loss.{name} must lie in 0..1, got {getattr(self, name)}")
        require(self.tail <= self.medium, "loss.tail must not exceed loss.medium")


def nested_classes(class_counts: Tensor, medium: int, tail: int) -> Tensor:
    """Classes that each of the three branches learns from: all, the `medium` rarest, the `tail` rarest.

    Args:
        class_counts: training images of each class, [C]; of equally large ones the first is the more frequent.
        medium: number of classes of the second branch.
        tail: of the third.

    Returns:
        [3, C], boolean.
    """
    rank = class_counts.argsort(descending=True, stable=True).argsort()
    sizes = torch.tensor([len(class_counts), medium, tail], device=class_counts.device)
    return rank >= len(class_counts) - sizes[:, None]


def branch_losses(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Negative log-probability of the label, averaged over the branches that learn from its class.

    The mean over images with the weights `classes.sum(0)` is the published loss: the sum over branches and their
    images, divided by the number of its addends.

    Args:
        logits: of the branches, [3, B, C].
        labels: class indices, [B].
        classes: of each branch, [3, C]; every class belongs to the first.

    Returns:
        [B].
    """
    (logits,) = losses.full_precision(logits)
    probabilities = logits.softmax(-1).gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]
    takes_part = classes[:, labels]
    return -((probabilities + EPSILON).log() * takes_part).sum(0) / takes_part.sum(0)


def folded_classifier(weight: Tensor, bias: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The linear classifier on pooled features that computes the sum of branches `W (g_b v + s_b) + b`.

    Args:
        weight: W, [C, D].
        bias: b, [C].
        scales: g, factor of each branch on each channel, [3, D].
        offsets: s, [3, D].

    Returns:
        Weight [C, D] and bias [C].
    """
    return weight * scales.sum(0), F.linear(offsets.sum(0), weight) + len(scales) * bias


class ResidualBranches(nn.Module):
    """A linear head behind the sum of three branches, each a BatchNorm on the encoder's last map; [B, D] -> [B, C].

    Args:
        head: which the branches share.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        self.head = head
        self.norms = nn.ModuleList(nn.BatchNorm2d(head.in_features) for _ in range(3))

    def branches(self, maps: Tensor) -> Tensor:
        """Logits of each branch, [B, D, H, W] -> [3, B, C]."""
        return torch.stack([self.head(norm(maps).mean((-2, -1))) for norm in self.norms])

    def _folded(self) -> tuple[Tensor, Tensor]:
        scales = torch.stack([norm.weight / (norm.running_var + norm.eps).sqrt() for norm in self.norms])
        means, biases = (torch.stack([getattr(n, name) for n in self.norms]) for name in ("running_mean", "bias"))
        return folded_classifier(self.head.weight, self.head.bias, scales, biases - means * scales)

    def forward(self, features: Tensor) -> Tensor:
        """The sum of the branches' logits with their running statistics."""
        return F.linear(features, *self._folded())

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The linear head that computes the same."""
        weight, bias = self._folded()
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)
        return self.head


def with_branches(head: nn.Linear, context: HeadContext) -> ResidualBranches:
    """Three branches before a head.

    Raises:
        ValueError: the features are not the means of the encoder's last map.
    """
    _check_pooling(context.model)
    return ResidualBranches(head)


@torch.no_grad()
def _check_pooling(model: ECLForImageClassification) -> None:
    backbone, training = model.experts[0].backbone, model.training
    parameter = next(backbone.parameters())
    image = torch.zeros(1, *model.config.pretrained_cfg["input_size"], device=parameter.device)
    model.eval()
    maps = backbone.forward_features(image if model.trunk is None else model.trunk(image))
    features = backbone.forward_head(maps, pre_logits=True)
    model.train(training)
    fits = maps.ndim == 4 and maps.shape[1] == features.shape[1]
    if not fits or not torch.allclose(maps.mean((-2, -1)), features, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"reslt normalises the last map of an encoder before it is averaged, and {model.config.architecture} "
            "averages none; ResNets do, for instance"
        )


def _classes(out: TaskOutputs, settings: ResLTSettings) -> Tensor:
    counts = out.class_counts
    return nested_classes(counts, *(max(1, round(share * len(counts))) for share in (settings.medium, settings.tail)))


def _branches(out: TaskOutputs, settings: ResLTSettings) -> PerImage:
    classes = _classes(out, settings)
    return PerImage(branch_losses(out.branch_logits[0], out.labels, classes), classes.sum(0).float())


def _sum(out: TaskOutputs, _: ResLTSettings) -> PerImage:
    (logits,) = losses.full_precision(out.branch_logits[0])
    return PerImage(losses.cross_entropies(logits.sum(0), out.labels))


def _rest(_: TaskOutputs, settings: ResLTSettings) -> float:
    return 1 - settings.branch_weight


_NEEDS = frozenset({"branches"})
BRANCHES = Term("branches", _branches, "branch_weight", _NEEDS)
SUM = Term("sum", _sum, _rest, _NEEDS)

METHODS = {"reslt": Method((Stage((BRANCHES, SUM), heads=with_branches),), ResLTSettings, **ONE_LINEAR)}
