"""The equations of ECL one image at a time, in plain double precision: nested lists in, floats out.

Transcribed from the paper. Scores of one expert are `[B][C]`, those of all experts `[K][B][C]`.
"""

import math
from itertools import permutations

import numpy as np


def gradient(loss, x, step=1e-5):
    """Central differences of a function of nested lists."""
    x = np.array(x, dtype=np.float64)
    slopes = np.empty_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        slopes[index] = (loss((x + shift).tolist()) - loss((x - shift).tolist())) / (2 * step)
    return slopes.tolist()


def log_softmax(scores):
    top = max(scores)
    log_total = math.log(math.fsum(math.exp(score - top) for score in scores))
    return [score - top - log_total for score in scores]


def divergence(teacher, student, temperature=1.0):
    """KL(p || q) = sum_c p_c log(p_c / q_c) of the softmax of two score vectors, below Eq. 7."""
    p = log_softmax([score / temperature for score in teacher])
    q = log_softmax([score / temperature for score in student])
    return math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in zip(p, q, strict=True))


def prior_shift(class_counts, target_prior=None):
    """Statistical bias log p_s(y) - log p_t(y) of every class, below Eq. 2."""
    if target_prior is None:
        target_prior = [1 / len(class_counts)] * len(class_counts)
    total_count = sum(class_counts)
    return [math.log(n / total_count) - math.log(p) for n, p in zip(class_counts, target_prior, strict=True)]


def balanced_cross_entropy(logits, labels, class_counts, tau=1.0, target_prior=None):
    """Eq. 3, the mean over the images."""
    shift, loss = prior_shift(class_counts, target_prior), 0.0
    for z, y in zip(logits, labels, strict=True):
        loss -= log_softmax([z_j + tau * s_j for z_j, s_j in zip(z, shift, strict=True)])[y]
    return loss / len(labels)


def adjusted_probabilities(z, class_counts, tau=1.0, target_prior=None):
    """Eq. 4 for one image."""
    shift = prior_shift(class_counts, target_prior)
    return [math.exp(v) for v in log_softmax([z_j - tau * s_j for z_j, s_j in zip(z, shift, strict=True)])]


def standardised_log_prediction(z):
    """Logarithm of Eq. 5 for one image."""
    mean = math.fsum(z) / len(z)
    sigma = math.sqrt(math.fsum((z_j - mean) ** 2 for z_j in z) / len(z))
    return log_softmax([z_j / max(sigma, 1e-6) for z_j in z])


def transfer_weight(ref, cls, y):
    """Eq. 6 for one image: large where the cls head is less confident than the ref head."""
    h_ref = max(-standardised_log_prediction(ref)[y], 1e-4)
    h_cls = max(-standardised_log_prediction(cls)[y], 1e-4)
    return min(max(h_cls / h_ref, 0.1), 10.0)


def transfer_weights(ref_logits, cls_logits, labels):
    """Eq. 6 for every expert and image, [K][B]."""
    experts = zip(ref_logits, cls_logits, strict=True)
    return [[transfer_weight(r, c, y) for r, c, y in zip(ref, cls, labels, strict=True)] for ref, cls in experts]


def logit_distillation(logits, weights=None, temperature=1.0, teachers=None):
    """Eq. 7; `teachers` are logits to teach in place of `logits` themselves."""
    num_experts, num_images, loss = len(logits), len(logits[0]), 0.0
    for k, q in permutations(range(num_experts), 2):
        for i in range(num_images):
            w = 1.0 if weights is None else weights[q][i]
            loss += w * temperature**2 * divergence((teachers or logits)[k][i], logits[q][i], temperature)
    return loss / (num_images * num_experts * (num_experts - 1)) if num_experts > 1 else 0.0


def feature_distillation(features, temperature=1.0, teachers=None):
    """Eq. 8, and like Eq. 7 a mean over the images."""
    num_experts, num_images, loss = len(features), len(features[0]), 0.0
    for k, q in permutations(range(num_experts), 2):
        for i in range(num_images):
            loss += temperature**2 * divergence((teachers or features)[k][i], features[q][i], temperature)
    return loss / (num_experts * (num_experts - 1)) / num_images if num_experts > 1 else 0.0


def info_nce(query, key, queue, temperature):
    """Eq. 9 for one expert, the mean over the images; all vectors have unit length."""
    loss = 0.0
    for v, positive in zip(query, key, strict=True):
        similarity = [math.fsum(a * b for a, b in zip(v, other, strict=True)) for other in [positive, *queue]]
        loss -= log_softmax([s / temperature for s in similarity])[0]
    return loss / len(query)


def supervision(cls_logits, ref_logits, labels, class_counts, tau=1.0):
    """Eq. 10."""
    loss = 0.0
    for cls, ref in zip(cls_logits, ref_logits, strict=True):
        loss += balanced_cross_entropy(ref, labels, class_counts, tau)
        loss += balanced_cross_entropy(cls, labels, class_counts, tau)
    return loss / len(cls_logits)


def total(supervised, logit, feature, contrastive, alpha, beta):
    """Eq. 11."""
    return supervised + alpha * (logit + feature) + beta * contrastive


def ncl_hard_categories(z, y, num_hard):
    """NCL's hard categories of one image: its class and the others with the largest logits, `num_hard` in all."""
    others = sorted((j for j in range(len(z)) if j != y), key=lambda j: -z[j])
    return {y, *others[: num_hard - 1]}


def ncl_views(z, class_counts, hard):
    """NCL's full and partial view of one image's logits: log counts added; the other categories set to 0."""
    full = [z_j + math.log(n) for z_j, n in zip(z, class_counts, strict=True)]
    return full, [a if j in hard else 0.0 for j, a in enumerate(full)]


def ncl_cross_entropy(logits, labels, class_counts, num_hard):
    """NCL's cross-entropy over all and over hard categories, which expert 0 chooses; summed over the experts."""
    loss = 0.0
    for expert in logits:
        for i, y in enumerate(labels):
            hard = ncl_hard_categories(logits[0][i], y, num_hard)
            for view in ncl_views(expert[i], class_counts, hard):
                loss -= log_softmax(view)[y]
    return loss / len(labels)


def ncl_distillation(logits, labels, class_counts, num_hard):
    """NCL's nested online distillation: all pairs, all and hard categories, divided by K - 1."""
    num_experts, loss = len(logits), 0.0
    for k, q in permutations(range(num_experts), 2):
        for i, y in enumerate(labels):
            hard = ncl_hard_categories(logits[0][i], y, num_hard)
            teacher, student = ncl_views(logits[k][i], class_counts, hard), ncl_views(logits[q][i], class_counts, hard)
            loss += sum(divergence(p, s) for p, s in zip(teacher, student, strict=True))
    return loss / (num_experts - 1) / len(labels) if num_experts > 1 else 0.0


def balanced_likelihood(scores, labels, frequencies, temperature):
    """Negative log-likelihood for equally frequent classes, smoothed by the number of images."""
    weights = [1 / frequencies[label] for label in labels]
    share, losses = 2 / (len(labels) + 2), []
    for image, label, weight in zip(scores, labels, weights, strict=True):
        log_p = log_softmax([score / temperature for score in image])
        losses.append(-weight * ((1 - share) * log_p[label] + share * math.fsum(log_p) / len(log_p)))
    return math.fsum(losses) / math.fsum(weights)
