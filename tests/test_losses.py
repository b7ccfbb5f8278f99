"""Every loss against the scalar loops of `reference`, and what must hold whatever the numbers are."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import ncl
from tests import reference

COUNTS = {2: [90, 10], 10: [500, 250, 120, 60, 33, 20, 9, 5, 2, 1]}
TARGETS = {2: [0.3, 0.7], 10: [0.05, 0.15] * 5}
LABELS = {2: [0, 1, 1, 0], 10: [0, 9, 4, 7]}
NUM_IMAGES = 4

classes = pytest.mark.parametrize("num_classes", [2, 10])
experts = pytest.mark.parametrize("num_experts", [1, 2, 3])
temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])


def draw(*shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.double)


def labels_of(num_classes):
    return torch.tensor(LABELS[num_classes])


def shift_of(counts, target=None):
    return torch.tensor(reference.prior_shift(counts, target), dtype=torch.double)


def agrees(actual, expected, rtol=1e-9, atol=1e-12):
    assert_close(actual, torch.tensor(expected, dtype=torch.double), rtol=rtol, atol=atol)


def gradient(loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*inputs), inputs)


def transfer_weights_by_loop(ref, cls, labels):
    return reference.transfer_weights(ref.tolist(), cls.tolist(), labels)


# Eq. 3 and 4


@classes
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("target", [None, TARGETS])
def test_balanced_cross_entropy(num_classes, tau, target):
    logits, counts = draw(NUM_IMAGES, num_classes), COUNTS[num_classes]
    target = target and target[num_classes]
    expected = reference.balanced_cross_entropy(logits.tolist(), LABELS[num_classes], counts, tau, target)
    labels = labels_of(num_classes)
    agrees(losses.balanced_cross_entropy(logits, labels, shift_of(counts, target), tau), expected)


@classes
def test_balanced_cross_entropy_takes_the_prior_whole_by_default(num_classes):
    logits, counts = draw(NUM_IMAGES, num_classes), COUNTS[num_classes]
    expected = reference.balanced_cross_entropy(logits.tolist(), LABELS[num_classes], counts, tau=1.0)
    agrees(losses.balanced_cross_entropy(logits, labels_of(num_classes), shift_of(counts)), expected)


@classes
@pytest.mark.parametrize(("uniform", "tau"), [(True, 1.0), (True, 2.0), (False, 0.0)])
def test_without_a_prior_to_correct_it_is_cross_entropy(num_classes, uniform, tau):
    logits, labels = draw(NUM_IMAGES, num_classes), labels_of(num_classes)
    shift = shift_of([7] * num_classes if uniform else COUNTS[num_classes])
    actual = losses.balanced_cross_entropy(logits, labels, shift, tau)
    assert_close(actual, F.cross_entropy(logits, labels), rtol=1e-12, atol=1e-12)


@classes
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_posthoc_adjust(num_classes, tau, leading):
    logits, counts, target = draw(*leading, num_classes), COUNTS[num_classes], TARGETS[num_classes]
    adjusted = losses.posthoc_adjust(logits, shift_of(counts, target), tau)
    assert adjusted.shape == logits.shape
    rows = logits.reshape(-1, num_classes).tolist()
    expected = [reference.adjusted_probabilities(z, counts, tau, target) for z in rows]
    agrees(adjusted.softmax(-1).reshape(-1, num_classes), expected)


@classes
def test_posthoc_adjust_takes_back_what_the_balanced_loss_adds(num_classes):
    logits, shift = draw(NUM_IMAGES, num_classes), shift_of(COUNTS[num_classes])
    assert_close(losses.posthoc_adjust(logits + shift, shift), logits)


# Eq. 5 and 6


@classes
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_transfer_weights(num_classes, scale):
    ref, cls = draw(2, 3, NUM_IMAGES, num_classes, scale=scale)
    weights = losses.transfer_weights(ref, cls, labels_of(num_classes))
    agrees(weights, transfer_weights_by_loop(ref, cls, LABELS[num_classes]))
    assert_close(losses.transfer_weights(ref[0], cls[0], labels_of(num_classes)), weights[0])
    assert weights.min() < 0.7
    assert weights.max() > 1.3


def test_less_confident_cls_head_weighs_more():
    confident, doubtful = torch.eye(10, dtype=torch.double)[:1], torch.tensor([[1.0, 0.9] + [0.0] * 8]).double()
    labels = torch.tensor([0])
    up = losses.transfer_weights(ref_logits=confident, cls_logits=doubtful, labels=labels)
    down = losses.transfer_weights(ref_logits=doubtful, cls_logits=confident, labels=labels)
    assert up > 1.5
    assert_close(up * down, torch.ones_like(up))
    assert_close(losses.transfer_weights(doubtful, doubtful, labels), torch.ones_like(up), rtol=0, atol=0)


@classes
def test_transfer_weights_see_standardised_logits(num_classes):
    ref, cls = draw(2, NUM_IMAGES, num_classes)
    labels = labels_of(num_classes)
    assert_close(losses.transfer_weights(5 * ref - 3, 0.2 * cls + 4, labels), losses.transfer_weights(ref, cls, labels))


def test_transfer_weights_are_clipped():
    right, wrong = torch.eye(10).double()[:2].split(1)  # entropies 0.28 and 3.6
    labels = torch.tensor([0])
    agrees(losses.transfer_weights(right, wrong, labels), [10.0], rtol=0)
    agrees(losses.transfer_weights(wrong, right, labels), [0.1], rtol=0)


def test_entropies_are_clamped_before_the_ratio():
    """With 1000 classes a confident head's entropy can be 1e-11, by which no ratio should be taken."""
    certain = torch.zeros(1, 1000, dtype=torch.double)
    sure = torch.tensor([[1.0, -1.0] * 500]).double()
    certain[0, 0] = sure[0, 0] = 18.0  # entropies 2e-11 and 2e-4
    labels = torch.tensor([0])
    up, down = losses.transfer_weights(certain, sure, labels), losses.transfer_weights(sure, certain, labels)
    agrees(up, [reference.transfer_weight(certain[0].tolist(), sure[0].tolist(), 0)])
    assert 1.5 < up < 3.0
    assert_close(up * down, torch.ones_like(up))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_logits_have_finite_weights(dtype):
    constant, varied = torch.full((3, 10), 3.3, dtype=dtype), torch.randn(3, 10).to(dtype)
    labels = torch.tensor([0, 5, 9])
    for ref, cls in [(constant, constant), (constant, varied), (varied, constant)]:
        expected = transfer_weights_by_loop(ref[None], cls[None], labels.tolist())[0]
        agrees(losses.transfer_weights(ref, cls, labels).double(), expected, rtol=1e-5)


def test_transfer_weights_carry_no_gradient():
    ref, cls = draw(2, 3, NUM_IMAGES, 10).requires_grad_()
    assert not losses.transfer_weights(ref, cls, labels_of(10)).requires_grad


# Shifts of the experts' logits


@classes
def test_shifted_cross_entropy_by_loop(num_classes):
    logits, strengths = draw(3, NUM_IMAGES, num_classes), [-0.5, 0.0, 2.0]
    counts = torch.tensor(COUNTS[num_classes], dtype=torch.double)
    expected = [
        [
            reference.balanced_cross_entropy([row], [y], COUNTS[num_classes], tau)
            for row, y in zip(rows, LABELS[num_classes], strict=True)
        ]
        for rows, tau in zip(logits.tolist(), strengths, strict=True)
    ]
    shifts = losses.prior_shifts(counts, strengths)
    agrees(losses.shifted_cross_entropy(logits, labels_of(num_classes), shifts), expected)


@pytest.mark.parametrize(("strengths", "exponent"), [([0, 1, 2], 0.0), ([1], 0.0), ([0, 0], 1.0), ([0, 1, 3], -1 / 3)])
def test_mean_logits_carry_what_the_shifts_leave_of_the_prior(strengths, exponent):
    counts = torch.tensor(COUNTS[10], dtype=torch.double)
    weights = [n**exponent for n in COUNTS[10]]
    expected = [math.log(w / sum(weights)) for w in weights]
    agrees(losses.carried_log_prior(counts, losses.prior_shifts(counts, strengths)), expected)


def test_a_class_without_images_counts_as_one_image_in_priors():
    empty, single = torch.tensor([9.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 1.0])
    assert_close(losses.log_class_prior(empty), losses.log_class_prior(single), rtol=0, atol=0)


# Eq. 7 and 8


@experts
@classes
@temperatures
@pytest.mark.parametrize("weighted", [False, True])
def test_logit_distillation(num_experts, num_classes, temperature, weighted):
    logits = draw(num_experts, NUM_IMAGES, num_classes)
    weights = torch.rand(num_experts, NUM_IMAGES, dtype=torch.double) * 3 if weighted else None
    expected = reference.logit_distillation(logits.tolist(), weights.tolist() if weighted else None, temperature)
    agrees(losses.logit_distillation(logits, weights, temperature), expected)


@experts
@classes
@temperatures
def test_feature_distillation(num_experts, num_classes, temperature):
    features = draw(num_experts, NUM_IMAGES, num_classes)
    expected = reference.feature_distillation(features.tolist(), temperature)
    agrees(losses.feature_distillation(features, temperature), expected)


@temperatures
def test_pairwise_kl_of_other_teachers_than_students(temperature):
    teachers, students = draw(2, NUM_IMAGES, 10), draw(3, NUM_IMAGES, 10)
    found = losses.pairwise_kl(teachers, students, temperature)
    assert found.shape == (2, 3, NUM_IMAGES)
    for j, k in itertools.product(range(2), range(3)):
        log_q, p = (students[k] / temperature).log_softmax(-1), (teachers[j] / temperature).softmax(-1)
        assert_close(found[j, k], F.kl_div(log_q, p, reduction="none").sum(-1))


def test_pairwise_kl_with_a_temperature_for_each_class():
    teachers, students, temperatures = draw(2, NUM_IMAGES, 3), draw(1, NUM_IMAGES, 3), [0.5, 1.5, 4.0]
    cooled = [
        [[[z / t for z, t in zip(row, temperatures, strict=True)] for row in rows] for rows in scores.tolist()]
        for scores in (teachers, students)
    ]
    expected = [
        [[reference.divergence(p, q) for p, q in zip(teacher, cooled[1][0], strict=True)]] for teacher in cooled[0]
    ]
    agrees(losses.pairwise_kl(teachers, students, torch.tensor(temperatures, dtype=torch.double)), expected)


@pytest.mark.parametrize("distil", [losses.logit_distillation, losses.feature_distillation])
def test_distillation_at_temperature_1_by_default(distil):
    scores = draw(3, NUM_IMAGES, 5)
    agrees(distil(scores), reference.logit_distillation(scores.tolist(), temperature=1.0))


@pytest.mark.parametrize("detach_teacher", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_single_expert_has_nobody_to_learn_from(weighted, detach_teacher):
    logits = draw(1, NUM_IMAGES, 10).requires_grad_()
    weights = torch.full((1, NUM_IMAGES), 3.0, dtype=torch.double) if weighted else None
    loss = losses.logit_distillation(logits, weights, detach_teacher=detach_teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


@experts
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_experts_have_nothing_to_learn(num_experts, weighted):
    scores = draw(1, NUM_IMAGES, 10).repeat(num_experts, 1, 1)
    weights = torch.rand(num_experts, NUM_IMAGES, dtype=torch.double) if weighted else None
    agrees(losses.logit_distillation(scores, weights), 0.0)
    agrees(losses.feature_distillation(scores), 0.0)


@pytest.mark.parametrize("student", [0, 1])
def test_a_pair_has_the_weight_of_its_student(student):
    logits = draw(2, 1, 10)
    weights = torch.zeros(2, 1, dtype=torch.double)
    weights[student] = 1.0
    rows = logits[:, 0].tolist()
    expected = reference.divergence(rows[1 - student], rows[student], 1.0) / 2
    assert reference.divergence(rows[student], rows[1 - student], 1.0) / 2 != pytest.approx(expected, rel=0.01)
    agrees(losses.logit_distillation(logits, weights), expected)


@pytest.mark.parametrize("distil", [losses.logit_distillation, losses.feature_distillation])
def test_distillation_does_not_grow_with_the_batch(distil):
    scores = draw(3, NUM_IMAGES, 10)
    assert_close(distil(scores.repeat(1, 5, 1)), distil(scores))


@pytest.mark.parametrize("detach_teacher", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_logit_distillation(detach_teacher, temperature):
    logits, weights = draw(3, 2, 4), torch.rand(3, 2, dtype=torch.double)
    (actual,) = gradient(lambda z: losses.logit_distillation(z, weights, temperature, detach_teacher), logits)
    fixed = logits.tolist() if detach_teacher else None
    expected = reference.gradient(
        lambda z: reference.logit_distillation(z, weights.tolist(), temperature, fixed), logits.tolist()
    )
    agrees(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("detach_teacher", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_feature_distillation(detach_teacher, temperature):
    features = draw(3, 2, 4)
    (actual,) = gradient(lambda v: losses.feature_distillation(v, temperature, detach_teacher), features)
    fixed = features.tolist() if detach_teacher else None
    expected = reference.gradient(lambda v: reference.feature_distillation(v, temperature, fixed), features.tolist())
    agrees(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distil", [losses.logit_distillation, losses.feature_distillation])
def test_teachers_learn_too_unless_told_otherwise(distil):
    scores = draw(3, 2, 4)
    default, both, student = (
        gradient(lambda z, options=options: distil(z, **options), scores)[0]
        for options in ({}, {"detach_teacher": False}, {"detach_teacher": True})
    )
    assert_close(default, both, rtol=0, atol=0)
    assert (default - student).abs().max() > 1e-3


def test_weights_act_as_constants():
    ref, cls = draw(2, 2, 2, 4)
    labels = [3, 1]
    weights = transfer_weights_by_loop(ref, cls, labels)

    def loss(ref, cls):
        return losses.logit_distillation(cls, losses.transfer_weights(ref, cls, torch.tensor(labels))) + 0 * ref.sum()

    of_ref, of_cls = gradient(loss, ref, cls)
    assert not of_ref.any()
    expected = reference.gradient(lambda z: reference.logit_distillation(z, weights), cls.tolist())
    agrees(of_cls, expected, rtol=1e-6, atol=1e-8)


# Eq. 9


def unit(*shape):
    return F.normalize(draw(*shape), dim=-1)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("queue_size", [1, 7])
def test_info_nce(temperature, queue_size):
    query, key, queue = unit(NUM_IMAGES, 6), unit(NUM_IMAGES, 6), unit(queue_size, 6)
    expected = reference.info_nce(query.tolist(), key.tolist(), queue.tolist(), temperature)
    agrees(losses.info_nce(query, key, queue, temperature), expected)


def test_info_nce_moves_the_query_only():
    query, key, queue = (x.requires_grad_() for x in (unit(2, 3), unit(2, 3), unit(5, 3)))
    losses.info_nce(query, key, queue, 0.2).backward()
    assert key.grad is None
    assert queue.grad is None
    fixed = key.tolist(), queue.tolist()
    expected = reference.gradient(lambda q: reference.info_nce(q, *fixed, 0.2), query.detach().tolist())
    agrees(query.grad, expected, rtol=1e-6, atol=1e-8)


# Many classes, few bits: each loss as a function of scores [3, B, C]; float64 is what was tested above


def hard_of(z, y):
    return ncl.hard_categories(z[0], y, max(1, z.shape[-1] // 3))


LOSSES = {
    "balanced_cross_entropy": lambda z, y, shift: losses.balanced_cross_entropy(z[0], y, shift),
    "logit_distillation": lambda z, y, _s: losses.logit_distillation(z, losses.transfer_weights(z.flip(0), z, y), 2.0),
    "logit_distillation_detached": lambda z, _y, _s: losses.logit_distillation(z, detach_teacher=True),
    "feature_distillation": lambda z, _y, _s: losses.feature_distillation(z, 0.5),
    "info_nce": lambda z, _y, _s: losses.info_nce(*z, 0.2),
    "nested_cross_entropy": lambda z, y, shift: ncl.nested_cross_entropy(z, y, shift, hard_of(z, y)),
    "nested_distillation": lambda z, y, shift: ncl.nested_distillation(z, shift, hard_of(z, y)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_8142_classes(name, scale):
    scores, labels = scale * torch.randn(3, 2, 8142), torch.tensor([0, 8141])
    shift = shift_of([max(1, int(1000 * 0.999**i)) for i in range(8142)])
    (exact,) = gradient(lambda z: LOSSES[name](z, labels, shift), scores.double())
    (actual,) = gradient(lambda z: LOSSES[name](z, labels, shift.float()), scores)
    assert_close(actual.double(), exact, rtol=1e-3, atol=1e-5)
    loss = LOSSES[name](scores, labels, shift.float())
    assert math.isfinite(loss)
    assert_close(loss.double(), LOSSES[name](scores.double(), labels, shift), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_weights_of_8142_classes(scale):
    ref, cls = scale * torch.randn(2, 2, 3, 8142)
    ref[..., 1] += 17 * scale  # confident where the label is 1
    labels = torch.tensor([0, 1, 8141])
    weights = losses.transfer_weights(ref, cls, labels)
    expected = transfer_weights_by_loop(ref, cls, labels.tolist())
    assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_half_precision(name, dtype, scale):
    scores, labels = (scale * torch.randn(3, NUM_IMAGES, 10)).to(dtype), labels_of(10)
    shift = shift_of(COUNTS[10])
    exact = scores.double()
    loss = LOSSES[name](scores, labels, shift.float())
    assert loss.dtype == torch.float32
    assert_close(loss.double(), LOSSES[name](exact, labels, shift), rtol=1e-5, atol=1e-5)
    (slopes,) = gradient(lambda z: LOSSES[name](z, labels, shift.float()), scores)
    assert slopes.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_half_precision_without_reduction(dtype, scale):
    ref, cls = (scale * torch.randn(2, 3, NUM_IMAGES, 10)).to(dtype)
    weights = losses.transfer_weights(ref, cls, labels_of(10))
    assert_close(weights, torch.tensor(transfer_weights_by_loop(ref, cls, LABELS[10])), rtol=1e-5, atol=0)
    adjusted = losses.posthoc_adjust(cls, shift_of(COUNTS[10]).float())
    assert_close(adjusted, cls.float() - shift_of(COUNTS[10]).float(), rtol=1e-6, atol=1e-6)
