"""Virtual examples: published values, and what they are in closed form."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods.dive import virtual_example_losses
from tests.methods.comparing import agrees, tensors


def draw(*shape):
    return 2 * torch.randn(*shape, dtype=torch.double)


def test_published_values(published):
    values = tensors(published("features_and_teachers/dive"))
    cases = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
    assert cases
    for case in cases:
        power, temperature, alpha = (values[f"{case}_{key}"].item() for key in ("power", "T", "alpha"))

        def loss(student, power=power, temperature=temperature, alpha=alpha):
            distilled = virtual_example_losses(student, values["teacher"], temperature, power).mean()
            balanced = losses.balanced_cross_entropy(student, values["labels"], values["counts"].double().log())
            return (1 - alpha) * balanced + alpha * distilled

        agrees(loss, values["student"], values[f"{case}_loss"], values[f"{case}_grad_student"])


def test_the_targets_are_normalised_powers_of_probabilities():
    student, teacher = draw(6, 5), draw(6, 5)
    powers = (teacher / 3).softmax(-1) ** 0.4
    targets = powers / powers.sum(-1, keepdim=True)
    expected = 9 * F.kl_div((student / 3).log_softmax(-1), targets, reduction="none").sum(-1)
    assert_close(virtual_example_losses(student, teacher, 3.0, 0.4), expected)


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient():
    student = draw(6, 5).requires_grad_()
    loss = virtual_example_losses(student, student, 3.0).sum()
    assert_close(loss.item(), 0.0)
    assert_close(torch.autograd.grad(loss, student)[0], torch.zeros(6, 5).double())
