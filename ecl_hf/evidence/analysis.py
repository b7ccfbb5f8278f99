"""What the paper's figures show, as arrays: transfer (Fig. 2), features (Fig. 6 and 7), and what the class prior does.

Calibration and confusion (Fig. 9 and 10) are in `metrics.py`, landscapes (Fig. 8) in `landscape.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from ecl_hf.evidence.metrics import class_accuracy, feature_distance
from ecl_hf.heads import log_prior_shift
from ecl_hf.losses import logit_distillation, posthoc_adjust, transfer_weights

SHIFT_FACTORS = (50, 25, 10, 5, 2)
"""Imbalance factors of the shifted test distributions, as LADE (Hong et al., CVPR 2021) has them."""


def class_ranking(class_counts: Sequence[int]) -> np.ndarray:
    """Classes from the largest to the smallest training class, [C]; equal ones in label order."""
    return np.argsort(-np.asarray(class_counts), kind="stable")


def shifted_prior(class_counts: Sequence[int], factor: float, backward: bool = False) -> Tensor:
    """Class frequencies of a test set that is long-tailed itself, exponentially as CIFAR-LT.

    Args:
        class_counts: training images of each class, [C]; they rank the classes.
        factor: largest frequency over the smallest; 1 is uniform.
        backward: the rarest training class is the most frequent one in the test.

    Returns:
        [C], sums to one, float64.
    """
    ranking = class_ranking(class_counts)
    places = torch.empty(len(ranking), dtype=torch.float64)
    places[torch.from_numpy(ranking[::-1].copy() if backward else ranking)] = torch.arange(
        len(ranking), dtype=torch.float64
    )
    weights = factor ** (-places / max(1, len(ranking) - 1))
    return weights / weights.sum()


def shifted_accuracy(
    logits: Tensor,
    labels: Tensor,
    class_counts: Sequence[int],
    carried: Sequence[float] | Tensor,
    factors: Sequence[float] = SHIFT_FACTORS,
) -> list[dict[str, str | float]]:
    """Top-1 under shifted test distributions, without and with the target prior (Eq. 2 and 4, tau = 1).

    Reading: LADE draws subsets of the balanced test set. Here each class's accuracy is weighted by its frequency, which
    is the expectation over all such subsets and needs no seed.

    Args:
        logits: [N, C].
        labels: [N]; classes without test image have no part.
        class_counts: training images of each class, [C].
        carried: class weights of the prior that the logits carry, [C].
        factors: largest frequency over the smallest.

    Returns:
        From the most forward to the most backward distribution: `direction` ("forward", "uniform", "backward"),
        `factor`, `top1` of the logits as they are and `top1_target_prior`.
    """
    plan = [("forward", factor) for factor in sorted(factors, reverse=True)]
    plan += [("uniform", 1.0), *(("backward", factor) for factor in sorted(factors))]
    tested = torch.bincount(labels, minlength=len(class_counts)) > 0
    raw = class_accuracy(logits.argmax(-1), labels, len(class_counts))
    rows = []
    for direction, factor in plan:
        prior = shifted_prior(class_counts, factor, direction == "backward")
        shift = log_prior_shift(carried, prior)
        informed = class_accuracy(posthoc_adjust(logits, shift).argmax(-1), labels, len(class_counts))
        weights = prior[tested] / prior[tested].sum()
        scores = ((accuracy[tested] * weights).sum().item() for accuracy in (raw, informed))
        rows.append(
            {"direction": direction, "factor": float(factor)}
            | dict(zip(("top1", "top1_target_prior"), scores, strict=True))
        )
    return rows


def posthoc_accuracy(
    expert_logits: Tensor,
    ensemble_logits: Tensor,
    labels: Tensor,
    class_counts: Sequence[int],
    taus: Sequence[float],
) -> dict[str, list]:
    """Top-1 after post-hoc logit adjustment (Eq. 4) to a uniform prior, over a grid of tau.

    Theory has its optimum at tau = 1 for logits that carry the training prior, and at 0 for those of Eq. 3; elsewhere
    the statistical bias that was learnt is not the one that was assumed (Sec. IV).

    Args:
        expert_logits: [N, K, C].
        ensemble_logits: [N, C].
        labels: [N].
        class_counts: training images of each class, [C].
        taus: strengths to try.

    Returns:
        `taus`, and for each of them the top-1 of the `ensemble`, [T], and of the `experts`, [K, T].
    """
    shift = log_prior_shift(class_counts)

    def curve(logits: Tensor) -> list[float]:
        return [(posthoc_adjust(logits, shift, t).argmax(-1) == labels).double().mean().item() for t in taus]

    experts = [curve(logits) for logits in expert_logits.unbind(1)]
    return {"taus": list(taus), "ensemble": curve(ensemble_logits), "experts": experts}


def expert_pairs(num_experts: int) -> list[tuple[int, int]]:
    """Unordered pairs of experts, in the order of `pairwise_feature_distance`."""
    return list(combinations(range(num_experts), 2))


def pairwise_feature_distance(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Feature distance of each expert pair by class (Eq. 12, Fig. 7), [N, K, D], [N] -> [pairs, C]; NaN if untested."""
    pairs = expert_pairs(features.shape[1])
    rows = [feature_distance(features[:, m], features[:, n], labels, num_classes) for m, n in pairs]
    return torch.stack(rows) if rows else features.new_zeros(0, num_classes)


def sample_features(
    features: Tensor, labels: Tensor, class_counts: Sequence[int], max_classes: int = 10, per_class: int = 100
) -> dict[str, np.ndarray]:
    """One expert's test features (Fig. 6) of as many classes and images as a reader can tell apart.

    Args:
        features: [N, D].
        labels: [N].
        class_counts: [C]; of more than `max_classes` classes some are taken at equal distances of this ranking.
        max_classes: classes to show.
        per_class: first images of each class.

    Returns:
        `features` [n, D] and their `labels` [n].
    """
    ranking = [c for c in class_ranking(class_counts).tolist() if (labels == c).any()]
    places = np.linspace(0, len(ranking) - 1, min(max_classes, len(ranking))).round().astype(int)
    rows = torch.cat([(labels == ranking[place]).nonzero()[:per_class, 0] for place in places])
    return {"features": features[rows].numpy(), "labels": labels[rows].numpy()}


def embed_features(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of features (Fig. 6), [n, D] -> [n, 2].

    Raises:
        ImportError: scikit-learn is not installed (`pip install 'ecl-hf[figures]'`).
        ValueError: fewer than three images.
    """
    from sklearn.manifold import TSNE

    if len(features) < 3:
        raise ValueError(f"t-SNE needs three images at least, got {len(features)}")
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def transfer_by_class(
    cls_logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    num_classes: int,
    weighted: bool,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """What the logit distillation transfers for each class (Fig. 2).

    Reading of "distilled logits value": the teacher's raw logit of the sample's own class times the sample's weight in
    the distillation (Eq. 6, the student's; 1 where it has none), averaged over the ordered expert pairs.

    Args:
        cls_logits: raw logits of the cls heads, [K, B, C], K > 1.
        ref_logits: of the reference heads, [K, B, C], if the method has some.
        labels: [B].
        num_classes: C.
        weighted: whether the method's distillation has the weights of Eq. 6; needs `ref_logits`.
        temperature: of the distillation.

    Returns:
        Sums over the batch's images of each class, [C], float64: `value` (as above), `loss` (the summand of Eq. 7),
        `weight` (Eq. 6, where there are reference heads), and the number of `images`.
    """
    k, b, _ = cls_logits.shape
    cls_logits = cls_logits.double()
    weights = transfer_weights(ref_logits.double(), cls_logits, labels) if ref_logits is not None else None
    applied = weights if weighted else torch.ones(k, b, dtype=torch.float64, device=labels.device)
    own = cls_logits.gather(-1, labels.expand(k, b)[..., None])[..., 0]
    # Over ordered pairs (teacher k, student q), a student's weight meets the logits of all others.
    value = ((own.sum(0) - own) * applied).sum(0) / (k * (k - 1))
    one_image = torch.vmap(lambda z, w: logit_distillation(z[:, None], w[:, None], temperature), in_dims=1)
    parts = {"value": value, "loss": one_image(cls_logits, applied), "images": torch.ones_like(value)}
    if weights is not None:
        parts["weight"] = weights.mean(0)
    return {
        name: torch.zeros(num_classes, dtype=torch.float64, device=labels.device).index_add_(0, labels, part)
        for name, part in parts.items()
    }


@torch.no_grad()
def collect_transfer(
    model: nn.Module,
    references: Sequence[nn.Module] | None,
    batches: Iterable[dict[str, Tensor]],
    weighted: bool,
    temperature: float = 1.0,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, np.ndarray]:
    """Fig. 2 of a trained task by one pass over its training images, without augmentation, in evaluation mode.

    Args:
        model: returns `expert_logits` [B, K, C] and `features` [B, K, D]; K > 1.
        references: reference heads, [B, D] -> [B, C] each, if the method has some.
        batches: dictionaries with `pixel_values` and `labels`.
        weighted: whether the distillation has the weights of Eq. 6.
        temperature: of the distillation.
        reduce: sums a tensor over all processes, if each has images of its own.

    Returns:
        Means over the images of each class, [C]; NaN for a class without image: `value`, `loss`, and `weight` where
        there are reference heads (see `transfer_by_class`).
    """
    model.eval()
    total: dict[str, Tensor] = {}
    for batch in batches:
        output = model(batch["pixel_values"], output_features=True)
        features, cls_logits = output.features.transpose(0, 1), output.expert_logits.transpose(0, 1)
        ref_logits = None
        if references is not None:
            ref_logits = torch.stack([head(v) for head, v in zip(references, features, strict=True)])
        sums = transfer_by_class(cls_logits, ref_logits, batch["labels"], cls_logits.shape[-1], weighted, temperature)
        for name, part in sums.items():
            total[name] = total.get(name, 0) + part
    total = {name: reduce(part) for name, part in total.items()}
    images = total.pop("images")
    return {name: (part / images).cpu().numpy() for name, part in total.items()}
