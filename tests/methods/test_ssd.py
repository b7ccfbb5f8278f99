"""Self-supervision to distillation: published values, and the contrastive task in closed form."""

import math

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.heads import ECLHead
from ecl_hf.methods.decoupling import ScaledHead
from ecl_hf.methods.ssd import other_class_contrast
from tests.methods.comparing import agrees, tensors


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def test_published_contrast(published):
    values = tensors(published("features_and_teachers/ssd"))

    def loss(query):
        keys = values["k"], values["queue"]
        return other_class_contrast(query, *keys, values["labels"], values["queue_labels"], values["T"].item()).mean()

    agrees(loss, values["q"], values["contrast_loss"], values["contrast_grad_q"])


def test_published_distillation(published):
    values = tensors(published("features_and_teachers/ssd"))

    def loss(student):
        return losses.soft_label_losses(student, values["kd_teacher"], values["kd_T"].item()).mean()

    agrees(loss, values["kd_student"], values["kd_loss"], values["kd_grad_student"])


def test_published_scales(published):
    values = tensors(published("features_and_teachers/ssd"))
    weight = values["lws_weight"]
    head = ScaledHead(ECLHead(weight.shape[1], weight.shape[0]).double())
    head.load_state_dict({"head.weight": weight, "head.bias": values["lws_bias"], "scales": values["lws_scales"]})
    assert_close(head(values["lws_input"]), values["lws_output"])


def test_gradient_of_the_distillation_in_closed_form():
    student, teacher = torch.randn(2, 6, 5, dtype=torch.double)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.soft_label_losses(student, teacher, 3.0).mean(), student)
    assert_close(gradient, 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 6)


def test_without_keys_of_other_classes_there_is_no_loss():
    labels = torch.tensor([2, 2, 2])
    loss = other_class_contrast(unit(3, 4), unit(3, 4), unit(6, 4), labels, torch.tensor([2] * 6), 0.2)
    assert_close(loss, torch.zeros(3).double())


def test_without_similarity_the_keys_of_other_classes_are_counted():
    queue_labels = torch.tensor([0, 0, 0, 1, 1, -1])  # an empty slot is of no class
    loss = other_class_contrast(unit(3, 4), unit(3, 4), unit(6, 4), torch.tensor([0, 1, 2]), queue_labels, 1e9)
    assert_close(loss, torch.tensor([math.log(1 + n) for n in (3, 4, 6)]).double(), rtol=1e-6, atol=0)
