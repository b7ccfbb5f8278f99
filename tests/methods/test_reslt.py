"""Residual branches: published values, the extremes of their weight, and the single classifier that they become."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification, losses
from ecl_hf.heads import ECLHead
from ecl_hf.learning.stages import begin_heads, fold_heads
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.reslt import ResLTSettings, branch_losses, folded_classifier, nested_classes
from tests.methods.comparing import agrees, tensors


@pytest.fixture
def values(published):
    return tensors(published("experts/reslt"))


def total_loss(logits, labels, classes, beta):
    own = losses.weighted_mean(branch_losses(logits, labels, classes), classes.sum(0)[labels])
    return beta * own + (1 - beta) * losses.cross_entropies(logits.sum(0), labels).mean()


def test_published_values(values):
    betas = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
    assert betas
    num_classes = len(values["class_counts"])
    sizes = [num_classes - int(values[key]) for key in ("from_medium", "from_tail")]
    classes = nested_classes(values["class_counts"], *sizes)
    for beta in betas:

        def loss(logits, beta=beta):
            return total_loss(logits, values["labels"], classes, float(beta.removeprefix("beta")))

        agrees(loss, values["logits"], values[f"{beta}_loss"], values[f"{beta}_grad"])


def test_classes_of_the_branches_in_any_order():
    counts = torch.tensor([5, 90, 5, 30, 400, 2])
    classes = nested_classes(counts, 4, 2)
    assert classes.tolist() == [
        [True] * 6,
        [True, False, True, True, False, True],
        [False, False, True, False, False, True],  # of two classes with 5 pictures the second counts as the rarer
    ]


def test_branches_that_learn_from_all_classes_are_three_classifiers():
    logits, labels = torch.randn(3, 8, 5, dtype=torch.double), torch.tensor([0, 1, 2, 3, 4, 4, 0, 2])
    classes = nested_classes(torch.tensor([9, 7, 5, 3, 1]), 5, 5)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.repeat(3))
    assert_close(branch_losses(logits, labels, classes).mean(), expected, rtol=1e-5, atol=0)  # but for the 1e-7


def test_a_hopeless_prediction_has_a_finite_loss():
    logits = torch.tensor([[[300.0, 0.0]]]).half().expand(3, 1, 2)
    loss = branch_losses(logits, torch.tensor([1]), torch.ones(3, 2).bool())
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor([-math.log(1e-7)]))


def test_folded_classifier_is_the_sum_of_the_branches():
    norms = [nn.BatchNorm2d(4).double().eval() for _ in range(3)]
    for norm in norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    maps = torch.randn(6, 4, 3, 3, dtype=torch.double)
    classifier = nn.Linear(4, 5).double()
    expected = sum(classifier(norm(maps).mean((-2, -1))) for norm in norms)
    scales = torch.stack([norm.weight / (norm.running_var + norm.eps).sqrt() for norm in norms])
    offsets = torch.stack([norm.bias - norm.running_mean * g for norm, g in zip(norms, scales, strict=True)])
    weight, bias = folded_classifier(classifier.weight, classifier.bias, scales, offsets)
    assert_close(F.linear(maps.mean((-2, -1)), weight, bias), expected)


def build(architecture="resnet20_cifar"):
    config = ECLConfig(architecture=architecture, num_experts=1, class_counts=[9, 5, 2])
    model = ECLForImageClassification(config)
    begin_heads(model, METHODS["reslt"].stages[0], ResLTSettings())
    return model


def test_branches_normalise_the_last_map_and_count_it_once():
    """The loss of a training step, by hand; then the folded head gives what the branches' sum gave."""
    model = build()
    task = CollaborativeTask(
        model, METHODS["reslt"], ResLTSettings(branch_weight=0.7, medium=2 / 3, tail=1 / 3)
    ).train()
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 0, 0, 1, 1, 2])
    loss = task(images, labels)["loss"]
    head, norms = model.experts[0].head.head, model.experts[0].head.norms
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1]
    maps = model.experts[0].backbone.forward_features(images)
    logits = torch.stack([head(norm(maps).mean((-2, -1))) for norm in norms])
    classes = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    assert_close(loss, total_loss(logits, labels, classes, 0.7))

    model.eval()
    with torch.no_grad():
        maps = model.experts[0].backbone.forward_features(images)
        expected = model.experts[0].head.branches(maps).sum(0)
        assert_close(model(images).logits, expected)
        fold_heads(model)
        assert type(model.experts[0].head) is ECLHead
        assert_close(model(images).logits, expected)


def test_an_encoder_that_averages_no_map_is_refused():
    with pytest.raises(ValueError, match="test_vit averages none"):
        build("test_vit")
