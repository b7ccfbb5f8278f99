"""GCL: published values for given noise, and what the clouds leave alone."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.heads import ECLCosineHead
from ecl_hf.methods import gcl
from ecl_hf.methods.base import TaskOutputs
from tests.methods.comparing import agrees, tensors

# Strength, margin, scale, exponent of the focal modulator
STAGE_1 = {"strength": 0.5, "margin": 0.0, "scale": 30.0}, 0
STAGE_2 = {"strength": 0.5, "margin": 0.1, "scale": 20.0}, 1
MARGIN = {"strength": 1.0, "margin": 0.3, "scale": 30.0}, 0


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/gcl"))


def test_published_clouds(values):
    assert_close(gcl.cloud_sizes(values["class_counts"].double()), values["cloud_size"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("case", "constants"), [("stage1", STAGE_1), ("stage2", STAGE_2), ("margin", MARGIN)])
def test_published_losses(values, case, constants):
    arguments, gamma = constants
    sizes = gcl.cloud_sizes(values["class_counts"].double())

    def loss(cosines):
        images = gcl.gcl_losses(cosines, values["labels"], values["noise_before_clamp"], sizes, **arguments)
        return losses.focal_losses(images, gamma, detach_modulator=True).mean()

    agrees(loss, values["cosine"], values[f"loss_{case}"], values[f"grad_{case}"])


def test_no_cloud_on_the_largest_class_and_a_whole_one_on_the_rarest():
    cosines, noise = torch.zeros(4, 3), torch.tensor([[0.2], [-0.3], [5.0], [-5.0]]).expand(4, 3)
    clouded = gcl.clouded_cosines(cosines, noise, gcl.cloud_sizes(torch.tensor([8, 100, 2])), 0.5)
    assert_close(clouded[:, 1], torch.zeros(4))
    assert_close(clouded[:, 2], -0.5 * torch.tensor([0.2, 0.3, 1, 1]))


def test_classes_of_equal_size_have_no_clouds():
    cosines, labels = torch.rand(5, 3), torch.tensor([2, 0, 1, 1, 0])
    arguments = {"strength": 0.5, "margin": 0.2, "scale": 10.0}
    actual = gcl.gcl_losses(cosines, labels, torch.randn(5, 3), gcl.cloud_sizes(torch.tensor([7, 7, 7])), **arguments)
    expected = F.cross_entropy(10 * (cosines - 0.2 * F.one_hot(labels)), labels, reduction="none")
    assert_close(actual, expected)


def outputs(counts, head, labels, features):
    log_counts = torch.tensor(counts).float().log()
    return TaskOutputs(labels, head(features)[None], features[None], log_counts, log_counts, heads=(head,))


def test_terms_of_the_stages_without_clouds():
    torch.manual_seed(2)
    head, features, labels = ECLCosineHead(5, 3, scale=20.0, bias=False), torch.randn(4, 5), torch.tensor([0, 1, 2, 2])
    out, settings = outputs([9, 9, 9], head, labels, features), gcl.GCLSettings(margin=0.2, gamma=2.0)
    cosines = F.cosine_similarity(features[:, None], head.weight, dim=-1)
    first = F.cross_entropy(30 * cosines, labels, reduction="none")
    assert_close(gcl.CLOUDED.loss(out, settings).losses, first, rtol=1e-4, atol=1e-4)
    second = F.cross_entropy(20 * (cosines - 0.2 * F.one_hot(labels, 3)), labels, reduction="none")
    second = (1 - (-second).exp()) ** 2 * second
    assert_close(gcl.CLOUDED_FOCAL.loss(out, settings).losses, second, rtol=1e-4, atol=1e-4)


def test_every_call_has_noise_of_its_own():
    head, features, labels = ECLCosineHead(5, 3, scale=20.0, bias=False), torch.randn(4, 5), torch.tensor([0, 1, 2, 2])
    out = outputs([90, 9, 1], head, labels, features)
    first, second = (gcl.CLOUDED.loss(out, gcl.GCLSettings()).losses for _ in range(2))
    assert (first != second).any()
