"""The equations of the paper as pure functions, and what several methods share.

Stacked inputs have the expert first: K experts, B images, C classes, D feature channels, P projection channels, Q queue
slots. Half-precision inputs are computed in float32; a caller under autocast switches it off around these functions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_SIGMA = 1e-6
MIN_ENTROPY = 1e-4
WEIGHT_RANGE = (0.1, 10.0)


def full_precision(*tensors: Tensor) -> list[Tensor]:
    """Half-precision tensors as float32; float32 and float64 as they are."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def balanced_cross_entropy(logits: Tensor, labels: Tensor, log_prior_shift: Tensor, tau: float = 1.0) -> Tensor:
    """Balanced cross-entropy (Eq. 3): cross-entropy of `z + tau * (log p_s - log p_t)`.

    Args:
        logits: [B, C].
        labels: class indices, [B].
        log_prior_shift: `log p_s - log p_t`, [C].
        tau: strength of the prior; 0 gives plain cross-entropy.

    Returns:
        Mean over the batch, [].
    """
    logits, shift = full_precision(logits, log_prior_shift)
    return F.cross_entropy(logits + tau * shift, labels)


def log_class_prior(class_counts: Tensor) -> Tensor:
    """`log(n_c / N)`, [C] -> [C]; a class without images counts as one image."""
    (counts,) = full_precision(class_counts)
    return counts.clamp_min(1).log().log_softmax(0)


def spread(least: float, most: float, num_experts: int) -> list[float]:
    """A number for each expert, at equal distances between two limits; the middle for a single expert; [K]."""
    if num_experts == 1:
        return [(least + most) / 2]
    return [least + (most - least) * k / (num_experts - 1) for k in range(num_experts)]


def prior_shifts(class_counts: Tensor, strengths: Sequence[float] | Tensor) -> Tensor:
    """Shifts of the experts' logits by `strength_k * log(n_c / N)`; [C], [K] -> [K, C].

    A constant added to a row changes no softmax, so `log n_c^strength` is the same shift.
    """
    log_prior = log_class_prior(class_counts)
    return torch.as_tensor(strengths, dtype=log_prior.dtype, device=log_prior.device)[:, None] * log_prior


def shifted_cross_entropy(logits: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """Cross-entropy of `z_k + b_k` of each expert on each image.

    Args:
        logits: raw logits z, [K, B, C].
        labels: class indices, [B].
        shifts: b, [K, C].

    Returns:
        [K, B].
    """
    return cross_entropies(logits, labels, shifts[:, None])


def carried_log_prior(class_counts: Tensor, shifts: Tensor) -> Tensor:
    """Log prior that the mean of the experts' raw logits carries after training with these shifts: `log pi - mean b_k`.

    Args:
        class_counts: training images of each class, [C].
        shifts: what was added to the experts' logits in their cross-entropies, [K, C].

    Returns:
        Log probabilities, [C]; uniform iff the mean shift is the log prior, up to a constant.
    """
    return (log_class_prior(class_counts) - full_precision(shifts)[0].mean(0)).log_softmax(0)


def posthoc_adjust(logits: Tensor, log_prior_shift: Tensor, tau: float = 1.0) -> Tensor:
    """Post-hoc logit adjustment (Eq. 4): `z - tau * (log p_s - log p_t)`, for logits that carry the prior p_s.

    Args:
        logits: [..., C].
        log_prior_shift: `log p_s - log p_t`, [C].
        tau: strength of the prior.

    Returns:
        [..., C].
    """
    return logits - tau * log_prior_shift


def _standardised_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the label of `softmax(z / sigma)` (Eq. 5), at least 1e-4; [..., B, C], [B] -> [..., B].

    Reading: sigma is the population standard deviation of the sample's own raw logits over the classes.
    """
    sigma = logits.std(-1, correction=0, keepdim=True).clamp_min(MIN_SIGMA)
    log_p = (logits / sigma).log_softmax(-1)
    return -log_p.gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0].clamp_max(-MIN_ENTROPY)


@torch.no_grad()
def transfer_weights(ref_logits: Tensor, cls_logits: Tensor, labels: Tensor) -> Tensor:
    """Weight of each sample in the logit distillation (Eq. 5 and 6): `H(cls, y) / H(ref, y)`.

    Above 1 where the cls head is less confident of the label than the reference head. Reading: the orientation of the
    equation's right-hand side and of the prose; the printed middle term is its inverse. Clipped to [0.1, 10]; never
    carries a gradient.

    Args:
        ref_logits: raw logits of the reference heads, [..., B, C].
        cls_logits: raw logits of the cls heads, [..., B, C].
        labels: class indices, [B].

    Returns:
        [..., B], float32 for half-precision inputs.
    """
    ref, cls = full_precision(ref_logits, cls_logits)
    return (_standardised_entropy(cls, labels) / _standardised_entropy(ref, labels)).clamp(*WEIGHT_RANGE)


def pairwise_kl(teachers: Tensor, students: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """`KL(softmax(t / T) || softmax(s / T))` of every teacher and every student, image by image.

    Gradient reaches both; detach the teachers where it must not. There is no factor `T^2`.

    Args:
        teachers: scores, [J, B, N].
        students: scores, [K, B, N].
        temperature: T of both softmaxes; one for each entry when [N].

    Returns:
        [J, K, B].
    """
    teachers, students = full_precision(teachers, students)
    return _divergences(*((scores / temperature).log_softmax(-1) for scores in (teachers, students)))


def _divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p_j || q_k)` of log probabilities, [J, B, N], [K, B, N] -> [J, K, B]."""
    p = log_p.exp()
    return (p * log_p).sum(-1)[:, None] - torch.einsum("jbn,kbn->jkb", p, log_q)


def soft_label_losses(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distillation from a frozen teacher, `T^2 KL(softmax(t / T) || softmax(s / T))`.

    Args:
        student: raw logits s, [B, C].
        teacher: raw logits t, [B, C]; carries no gradient.
        temperature: T.

    Returns:
        [B].
    """
    return temperature**2 * pairwise_kl(teacher.detach()[None], student[None], temperature)[0, 0]


def sum_over_pairs(kl: Tensor) -> Tensor:
    """Sum over the ordered pairs of different experts, image by image; [K, K, B] -> [B]."""
    others = ~torch.eye(len(kl), dtype=torch.bool, device=kl.device)
    return (kl * others[..., None]).sum((0, 1))


def _mean_over_pairs(kl: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of [K, K, B] over samples and ordered pairs, weighted by the student's [K, B]; 0 for a single expert."""
    k = len(kl)
    return sum_over_pairs(kl if weights is None else kl * weights).mean() / max(1, k * (k - 1))


def logit_distillation(
    cls_logits: Tensor, weights: Tensor | None = None, temperature: float = 1.0, detach_teacher: bool = False
) -> Tensor:
    """Re-weighted online distillation between experts (Eq. 7), on raw logits.

    Readings: the weight of a pair is the student's; gradient reaches teacher and student, as in NCL.

    Args:
        cls_logits: raw logits of the K experts' cls heads, [K, B, C].
        weights: Eq. 6 weight of each sample for each expert as the student, [K, B]; all ones when None.
        temperature: of both softmaxes; its square scales the loss.
        detach_teacher: stop the gradient at the teacher.

    Returns:
        Mean over samples and ordered pairs, []; 0 when K is 1.
    """
    (cls_logits,) = full_precision(cls_logits)
    log_p = (cls_logits / temperature).log_softmax(-1)  # once for both sides
    kl = _divergences(log_p.detach() if detach_teacher else log_p, log_p)
    return temperature**2 * _mean_over_pairs(kl, weights)


def feature_distillation(features: Tensor, temperature: float = 1.0, detach_teacher: bool = False) -> Tensor:
    """Distillation between experts on the pooled features (Eq. 8), softmax over the D channels.

    Reading: a mean over the samples like Eq. 7's; the printed sum would depend on the batch size.

    Args:
        features: pooled backbone features of the K experts, [K, B, D].
        temperature: of both softmaxes; its square scales the loss.
        detach_teacher: stop the gradient at the teacher.

    Returns:
        Mean over samples and ordered pairs, []; 0 when K is 1.
    """
    return logit_distillation(features, None, temperature, detach_teacher)


def key_similarities(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """Scalar products of each query with its own key and with all keys of the queue; keys carry no gradient.

    Args:
        query: [B, P].
        key: [B, P].
        queue: [Q, P].

    Returns:
        [B, 1 + Q]; the first column belongs to the own keys.
    """
    query, key, queue = full_precision(query, key.detach(), queue.detach())
    return torch.cat([(query * key).sum(-1, keepdim=True), query @ queue.T], dim=-1)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of one expert (Eq. 9): the positive is the image's own key, the negatives are the queue.

    Args:
        query: L2-normalised projections of the supervised view, [B, P].
        key: L2-normalised keys of the second view, [B, P]; carries no gradient.
        queue: keys of earlier batches, [Q, P]; carries no gradient.
        temperature: the contrastive temperature.

    Returns:
        Mean over the batch, [].
    """
    similarities = key_similarities(query, key, queue) / temperature
    return F.cross_entropy(similarities, torch.zeros(len(query), dtype=torch.long, device=query.device))


# Supervision that several methods share


def cross_entropies(logits: Tensor, labels: Tensor, shift: Tensor | None = None) -> Tensor:
    """Cross-entropy of `z + shift` of each image.

    Args:
        logits: [..., B, C].
        labels: class indices, [B].
        shift: added to the logits, [C] or any shape that fits them; nothing when None.

    Returns:
        [..., B].
    """
    (logits,) = full_precision(logits)
    log_p = (logits if shift is None else logits + shift).log_softmax(-1)
    return -log_p.gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean of the images' losses, divided by the sum of their weights; [B], [B] -> [].

    With `weights = w[labels]` it is the mean of `F.cross_entropy(weight=w)`.
    """
    return (weights * losses).sum() / weights.sum()


def effective_number_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Class weights by the effective number of images, `(1 - beta) / (1 - beta^n_c)` (Cui et al., CVPR 2019).

    Args:
        class_counts: training images of each class, at least 1, [C].
        beta: in [0, 1); 0 weights all classes alike, towards 1 the weights approach 1/n_c.

    Returns:
        [C], with sum C.
    """
    (counts,) = full_precision(torch.as_tensor(class_counts))
    weights = -1 / torch.expm1(counts * (math.log(beta) if beta else -math.inf))
    return len(counts) * weights / weights.sum()


def focal_losses(losses: Tensor, gamma: float, detach_modulator: bool = False) -> Tensor:
    """Cross-entropies `l` times the focal modulator, `(1 - exp(-l))^gamma l` (Lin et al., ICCV 2017).

    Args:
        losses: cross-entropies, [...].
        gamma: focusing exponent, not negative; 0 leaves the losses as they are.
        detach_modulator: stop the gradient at the modulator.

    Returns:
        [...].
    """
    # The floor keeps the slope of the power finite where the prediction is certain
    modulator = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny) ** gamma
    return (modulator.detach() if detach_modulator else modulator) * losses


def margin_logits(cosines: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Scaled cosines, with the label's own lowered by its margin: `s (cos_ij - [j = y_i] m_y)`.

    Args:
        cosines: [B, C].
        labels: class indices, [B].
        margins: of each class, [C].
        scale: of the logits.

    Returns:
        [B, C].
    """
    return scale * (cosines - F.one_hot(labels, cosines.shape[-1]) * margins)


# Contrastive losses of several methods


def contrast(scores: Tensor, positives: Tensor, multiplicity: Tensor | None = None) -> Tensor:
    """Weighted log-probabilities of the positives among all candidates of an anchor.

    `-sum_a p_ia (s_ia - ln sum_b m_ib exp(s_ib))`: InfoNCE, supervised contrastive losses and their balanced forms
    differ in the candidates, in the weights of the positives, and in how often a candidate counts as a competitor.

    Args:
        scores: similarities by temperature, [B, M].
        positives: weights of the log-probabilities, [B, M]; 0 where a candidate is no positive.
        multiplicity: how often a candidate counts in the sum, not negative, [B, M] or [M]; 0 leaves it out; once each
            when None. Carries no gradient.

    Returns:
        [B].
    """
    (scores,) = full_precision(scores)
    competing = scores if multiplicity is None else scores + multiplicity.to(scores.dtype).log()
    return -(positives * (scores - competing.logsumexp(-1, keepdim=True))).sum(-1)


def same_class(labels: Tensor, others: Tensor) -> Tensor:
    """Whether two pictures are of one class; [B], [M] -> [B, M], boolean."""
    return labels[:, None] == others


def share_evenly(positives: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of an anchor's positives that add up to 1, or are all 0 where there is none; boolean [B, M] -> [B, M]."""
    return positives.to(dtype) / positives.sum(-1, keepdim=True).clamp_min(1)


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss with the mean over positives outside the logarithm (Khosla et al. 2020, Eq. 2).

    Args:
        features: L2-normalised projections of V views, [V, B, P]; each is an anchor, and a candidate for the others.
        labels: class indices, [B].
        temperature: of the similarities.

    Returns:
        Mean over an image's V anchors, [B].
    """
    (anchors,) = full_precision(features.flatten(0, 1))
    labels = labels.repeat(len(features))
    others = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    positives = share_evenly(same_class(labels, labels) & others, anchors.dtype)
    losses = contrast(anchors @ anchors.T / temperature, positives, others)
    return losses.view(features.shape[:2]).mean(0)
