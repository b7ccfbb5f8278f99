"""What of a model moves, and how heads start."""

import os

import pytest
import torch

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.heads import ECLCosineHead, ECLHead
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.stages import begin_heads
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.learning.tuning import (
    bootstrap,
    encode,
    read_features,
    start_at_class_means,
    takes_class_means,
    write_features,
)
from ecl_hf.methods import METHODS


def make_task(tune):
    config = ECLConfig(architecture="resnet20_cifar", num_experts=2, share_stages=1, class_counts=[9, 5, 2])
    return CollaborativeTask(ECLForImageClassification(config), METHODS["bkt"], tune=tune)


@pytest.mark.parametrize("tune", ["all", "norm_bias", "head"])
def test_an_optimiser_step_moves_what_is_tuned_and_nothing_else(tune):
    task = make_task(tune)
    before = {name: parameter.clone() for name, parameter in task.named_parameters()}
    optimizer = torch.optim.SGD([weight for weight in task.parameters() if weight.requires_grad], lr=0.1)
    task(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))["loss"].backward()
    optimizer.step()
    moved = {name for name, parameter in task.named_parameters() if not torch.equal(before[name], parameter)}
    encoder = {name for name in before if "backbone" in name}
    norms = {name for name in encoder if ".bn" in name}  # this network has no other biases
    assert moved == before.keys() - (encoder - {"all": encoder, "norm_bias": norms, "head": set()}[tune])


def test_head_at_class_means_is_the_nearest_direction():
    head = ECLCosineHead(5, 3, scale=4.0)
    untouched = head.weight[2].detach().clone()
    features, labels = 3 * torch.rand(8, 5), torch.tensor([0, 1, 0, 1, 1, 0, 0, 0])
    start_at_class_means(head, features, labels, 4.0)
    for c in range(2):
        mean = torch.stack([row / row.norm() for row, label in zip(features, labels, strict=True) if label == c]).mean(
            0
        )
        torch.testing.assert_close(head.weight[c], mean / mean.norm())
    torch.testing.assert_close(head.weight[2], untouched / untouched.norm())


def test_linear_head_at_class_means_starts_as_a_cosine_one():
    linear, cosine = ECLHead(5, 3), ECLCosineHead(5, 3, scale=4.0)
    cosine.load_state_dict(linear.state_dict())  # the third class has no picture: it keeps its direction
    features, labels = 3 * torch.rand(8, 5), torch.tensor([0, 1, 0, 1, 1, 0, 0, 0])
    for head in (linear, cosine):
        start_at_class_means(head, features, labels, 4.0)
    norms = features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(linear(features), cosine(features) * norms / norms.mean())


METHODS_TO_START = {"bc": True, "crt": True, "ldam": True, "cb_focal": False, "reslt": False, "tde": False}


@pytest.mark.parametrize(("method", "takes"), METHODS_TO_START.items())
def test_heads_with_a_start_of_their_own_keep_it(method, takes):
    """The bias of cb_focal's answers every class by no; reslt's and tde's heads have parts before the classifier."""
    config = ModelConfig(architecture="resnet20_cifar", classifier="cosine")
    model = initialise_model(config, METHODS[method], [9, 5, 2], ["a", "b", "c"], METHODS[method].settings())
    stage = METHODS[method].stages[0]
    begin_heads(model, stage, METHODS[method].settings())
    assert takes_class_means(model.experts[0].head, stage) == takes


def test_bootstrap_draws_as_many_pictures_of_each_class():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 0, 0, 2, 4])
    drawn = bootstrap(labels, 3)
    assert sorted(labels[drawn].tolist()) == sorted(labels.tolist())
    assert torch.equal(drawn, bootstrap(labels, 3))
    assert not torch.equal(drawn, bootstrap(labels, 4))
    counts = torch.zeros(len(labels))
    for seed in range(2000):
        counts += torch.bincount(bootstrap(labels, seed), minlength=len(labels))
    torch.testing.assert_close(counts / 2000, torch.ones(len(labels)), rtol=0, atol=0.1)  # each picture once on average
    assert counts[2] == counts[9] == 2000  # the only ones of their classes


def test_kept_features_are_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "features.safetensors"
    assert read_features(file, "a") is None
    batches = [{"pixel_values": torch.randn(2, 3, 4, 4), "labels": torch.tensor([1, -1])} for _ in range(2)]
    tensors = encode(lambda pixels: pixels[:, :, 0, 0], batches, mirrored=True)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert torch.equal(tensors["features"], torch.stack([pixels[:, :, 0, 0], pixels[:, :, 0, -1]]))
    assert tensors["there"].tolist() == [True, False, True, False]
    write_features(file, tensors, "a")
    assert torch.equal(read_features(file, "a")["features"], tensors["features"])
    assert read_features(file, "b") is None  # other pictures, or another encoder
    file.write_bytes(file.read_bytes()[:-9])
    assert read_features(file, "a") is None


@pytest.mark.parametrize(
    "odd",
    [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: (path.touch(), os.truncate(path, 1 << 40))],
)
def test_what_is_no_file_of_features_gives_way_to_one(odd, tmp_path):
    file = tmp_path / "features.safetensors"
    odd(file)
    assert read_features(file, "a") is None
    write_features(file, {"features": torch.ones(2)}, "a")
    assert torch.equal(read_features(file, "a")["features"], torch.ones(2))


def test_features_that_are_not_finite_are_refused():
    batch = {"pixel_values": torch.full((1, 3, 4, 4), torch.inf), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match="not finite"):
        encode(lambda pixels: pixels[:, :, 0, 0], [batch], mirrored=False)
