"""Class-balanced distillation: values of its equation, and what must hold whatever the features are."""

import numpy as np
import torch
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods.cbd import feature_losses
from tests.methods.comparing import agrees, tensors


def draw(*shape):
    return torch.randn(*shape, dtype=torch.double)


def test_published_values(published):
    values = tensors(published("features_and_teachers/cbd"))
    teachers = torch.stack([values[f"teacher_{j}"] for j in range(2)])
    alpha, beta = values["alpha"].item(), values["beta"].item()
    assert_close(feature_losses(values["student"], teachers).mean(), values["feature_loss"])

    def loss_of_features(student):
        supervised = losses.cross_entropies(values["logits"], values["labels"]).mean()
        return (1 - alpha) * supervised + alpha * beta * feature_losses(student, teachers).mean()

    def loss_of_logits(logits):
        distilled = feature_losses(values["student"], teachers).mean()
        return (1 - alpha) * losses.cross_entropies(logits, values["labels"]).mean() + alpha * beta * distilled

    agrees(loss_of_features, values["student"], values["loss"], values["grad_student"])
    agrees(loss_of_logits, values["logits"], values["loss"], values["grad_logits"])


def test_expected_draws_are_the_published_ones(published):
    """Pictures drawn with weight 1 / n_c come as often as those of the published stream of copies."""
    values = published("features_and_teachers/cbd")
    counts = values["class_counts"]
    share = 1 / counts / len(counts)  # of the draws, for one picture of a class
    np.testing.assert_allclose(counts.sum() * share, values["expected_copies"])
    kept = np.minimum(values["expected_copies"], values["keep_probability"])
    np.testing.assert_allclose(kept, values["keep_probability"])


def test_gradient_leaves_the_length_of_the_features():
    student = draw(5, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(feature_losses(student, draw(2, 5, 4)).sum(), student)
    assert_close((gradient * student).sum(-1), torch.zeros(5).double())


def test_neither_scale_nor_repetition_of_teachers_matters():
    student, teacher = draw(5, 4), draw(5, 4)
    alone = feature_losses(student, teacher[None])
    assert_close(feature_losses(student, 3 * teacher[None]), alone)
    assert_close(feature_losses(torch.cat([student, student], dim=-1), torch.stack([teacher, 2 * teacher])), alone)
    assert_close(feature_losses(7 * teacher, teacher[None]), torch.zeros(5).double())
