"""Classification heads, and the gap of the class priors that their logits meet (Eq. 2)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_ecl import ECLConfig

REACH = 10.0
"""Distance to the nearest centroid at which a picture's feature keeps its length in OLTR's head."""


def log_prior_shift(
    class_counts: Sequence[int] | Tensor, target_prior: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Gap of the log priors of training and test set, `log p_s - log p_t` (Eq. 2).

    Args:
        class_counts: training images of each class, [C]; a zero is counted as one, with a warning.
        target_prior: class probabilities (or weights) of the test set, [C]; uniform when None.

    Returns:
        [C], float32.

    Raises:
        ValueError: a negative or non-finite entry, or lengths that differ.
    """
    counts = torch.as_tensor(class_counts).to("cpu", torch.float64)
    if counts.ndim != 1 or not len(counts) or not counts.isfinite().all() or counts.min() < 0:
        raise ValueError("class_counts must be one non-negative number for each class")
    if empty := (counts == 0).nonzero().flatten().tolist():
        warnings.warn(f"{len(empty)} classes have no training image and are counted as one: {empty[:10]}", stacklevel=2)
        counts = counts.clamp_min(1)
    source = counts / counts.sum()
    if target_prior is None:
        return (source.log() + math.log(len(counts))).float()
    target = torch.as_tensor(target_prior).to("cpu", torch.float64)
    if target.shape != counts.shape:
        raise ValueError(f"target_prior has shape {list(target.shape)}, but there are {len(counts)} classes")
    if not target.isfinite().all() or target.min() < 0 or target.sum() == 0:
        raise ValueError("target_prior must hold non-negative finite numbers, not all of them zero")
    target = (target / target.sum()).clamp_min(torch.finfo(torch.float32).tiny)  # a zero would give infinite logits
    return (source.log() - target.log()).float()


class ECLHead(nn.Linear):
    """Linear classifier, [B, D] -> [B, C]."""


class ECLCosineHead(nn.Linear):
    """Cosine classifier, `scale * cos(v, w_c) + b_c`, or without b; [B, D] -> [B, C]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, scale: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Uniform weights and a zero bias."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        cosine = F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))
        return self.scale * cosine if self.bias is None else self.scale * cosine + self.bias


def normalise_chunks(features: Tensor, chunks: int = 1) -> Tensor:
    """Features cut into equal parts, each divided by its L2 norm (a part without a norm stays zero).

    Args:
        features: [..., D].
        chunks: parts H; a divisor of D.

    Returns:
        [..., D]; the norm of each row is the root of H.
    """
    return F.normalize(features.unflatten(-1, (chunks, -1)), dim=-1).flatten(-2)


class ECLNormalisedHead(nn.Linear):
    """Linear classifier on normalised features, `w_c . u(v - m) + b_c`; [B, D] -> [B, C].

    u is `normalise_chunks`. The published form of causal norm (H chunks) and of the nearest class mean (the centre m).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, chunks: int = 1) -> None:
        if in_features % chunks:
            raise ValueError(f"classifier_chunks: {in_features} features can't be cut into {chunks} equal parts")
        super().__init__(in_features, out_features, bias)
        self.chunks = chunks
        self.register_buffer("centre", torch.zeros(in_features))

    def reset_parameters(self) -> None:
        """As a linear classifier; nothing is taken off the features."""
        super().reset_parameters()
        if "centre" in self._buffers:  # nn.Linear calls this before there is one
            nn.init.zeros_(self.centre)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return super().forward(normalise_chunks(features - self.centre, self.chunks))


def align_logits(logits: Tensor, confidence: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Calibrated logits of DisAlign (Zhang et al., CVPR 2021) as its classification code has them.

    `(1 + g s_c) z_c + g b_c`; the paper's `g (a_c z_c + b_c) + (1 - g) z_c` is the same with `s = a - 1`.

    Args:
        logits: z, [B, C].
        confidence: g, in 0..1 for each image, [B, 1].
        scales: s, [C].
        offsets: b, [C].

    Returns:
        [B, C].
    """
    return (1 + confidence * scales) * logits + confidence * offsets


class ECLDisAlignHead(nn.Linear):
    """Linear classifier with adaptive calibration (`align_logits`), `g = sigmoid(u . v + u_0)`; [B, D] -> [B, C].

    How much an image's logits are moved depends on the image, so that no linear classifier computes the same.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.logit_scale = nn.Parameter(torch.ones(out_features))
        self.logit_bias = nn.Parameter(torch.zeros(out_features))
        self.confidence_weight = nn.Parameter(torch.empty(in_features))
        self.confidence_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As a linear classifier; the calibration starts as published: s 1, b 0 and every entry of u 0.1."""
        super().reset_parameters()
        if "confidence_bias" in self._parameters:  # nn.Linear calls this before there is one
            nn.init.ones_(self.logit_scale)
            nn.init.zeros_(self.logit_bias)
            nn.init.constant_(self.confidence_weight, 0.1)
            nn.init.uniform_(self.confidence_bias, -(self.in_features**-0.5), self.in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        # No matrix product: with one column, its rounding depends on where in memory a loaded model's weights lie.
        confidence = ((features * self.confidence_weight).sum(-1, keepdim=True) + self.confidence_bias).sigmoid()
        return align_logits(super().forward(features), confidence, self.logit_scale, self.logit_bias)


class ECLMemoryHead(nn.Linear):
    """Cosine classifier with a memory of class centroids, of OLTR (Liu et al., CVPR 2019); [B, D] -> [B, C].

    `scale * squash(x) . u(w_c)` of `x = r (v + e * o V)`: what the memory V says of the picture, by the class
    probabilities o, is added in the channels that e selects; the reach r is large near one of the centroids. `u`
    normalises, and `squash(x) = x / (1 + |x|)`. r and the squash are one positive factor for all classes: they make far
    pictures unsure.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, scale: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.scale = scale
        self.memory = nn.Parameter(torch.empty(out_features, in_features))
        self.probabilities = nn.Linear(in_features, out_features)
        self.selector = nn.Linear(in_features, in_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights; centroids at random places near the unit sphere."""
        super().reset_parameters()
        if "selector" in self._modules:  # nn.Linear calls this before there is one
            self.probabilities.reset_parameters()
            self.selector.reset_parameters()
            nn.init.normal_(self.memory, std=self.in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        memory = self.memory.detach()  # the loss of the centroids alone moves it
        remembered = self.probabilities(features).softmax(-1) @ memory
        nearest = torch.cdist(features, memory).amin(1, keepdim=True)
        x = REACH / nearest.clamp_min(1e-6) * (features + self.selector(features).tanh() * remembered)
        cosine = F.linear(x / (1 + x.norm(dim=-1, keepdim=True)), F.normalize(self.weight, dim=-1))
        return self.scale * cosine if self.bias is None else self.scale * cosine + self.bias


class ECLNeckHead(nn.Module):
    """A classifier behind a linear layer and ReLU; [B, D] -> [B, C].

    Args:
        in_features: D.
        classifier: head on the layer's W channels.
    """

    def __init__(self, in_features: int, classifier: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, classifier.out_features
        self.neck = nn.Linear(in_features, classifier.in_features)
        self.classifier = classifier

    def reset_parameters(self) -> None:
        """A new layer and a new classifier."""
        self.neck.reset_parameters()
        self.classifier.reset_parameters()

    def embed(self, features: Tensor) -> Tensor:
        """What the classifier gets, [B, D] -> [B, W]."""
        return self.neck(features).relu()

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return self.classifier(self.embed(features))


HEADS = (ECLHead, ECLCosineHead, ECLNormalisedHead, ECLDisAlignHead, ECLMemoryHead, ECLNeckHead)


def create_head(config: ECLConfig, in_features: int) -> nn.Module:
    """A freshly initialised classifier of the configured kind.

    Raises:
        ValueError: the features can't be cut into `classifier_chunks` equal parts.
    """
    classifier = _create_classifier(config, config.classifier_neck or in_features)
    return ECLNeckHead(in_features, classifier) if config.classifier_neck else classifier


def _create_classifier(config: ECLConfig, in_features: int) -> nn.Linear:
    shape = (in_features, config.num_labels, config.classifier_bias)
    match config.classifier:
        case "cosine":
            return ECLCosineHead(*shape, scale=config.classifier_scale)
        case "normalised":
            return ECLNormalisedHead(*shape, chunks=config.classifier_chunks)
        case "disalign":
            return ECLDisAlignHead(*shape)
        case "memory":
            return ECLMemoryHead(*shape, scale=config.classifier_scale)
    return ECLHead(*shape)


def describe_head(head: nn.Module) -> dict[str, object]:
    """What the configuration says of a head, so that `create_head` makes one of its kind."""
    if isinstance(head, ECLNeckHead):
        return describe_head(head.classifier) | {"classifier_neck": head.classifier.in_features}
    described = {"classifier_bias": head.bias is not None, "classifier_neck": 0}
    match head:
        case ECLCosineHead():
            return described | {"classifier": "cosine", "classifier_scale": head.scale}
        case ECLNormalisedHead():
            return described | {"classifier": "normalised", "classifier_chunks": head.chunks}
        case ECLDisAlignHead():
            return described | {"classifier": "disalign"}
        case ECLMemoryHead():
            return described | {"classifier": "memory", "classifier_scale": head.scale}
    return described | {"classifier": "linear"}
