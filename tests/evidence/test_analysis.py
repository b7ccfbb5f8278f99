"""Arrays behind the figures, against loops and known answers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.evidence.analysis import (
    class_ranking,
    collect_transfer,
    embed_features,
    expert_pairs,
    pairwise_feature_distance,
    posthoc_accuracy,
    sample_features,
    shifted_accuracy,
    shifted_prior,
    transfer_by_class,
)
from ecl_hf.evidence.landscape import filter_normalised_direction, landscape
from ecl_hf.losses import transfer_weights

COUNTS = [10, 200, 3, 40]


def test_classes_are_ranked_by_size_and_ties_by_label():
    assert class_ranking([5, 9, 5, 20]).tolist() == [3, 1, 0, 2]


def test_shifted_priors_by_hand():
    forward, backward = shifted_prior(COUNTS, 8), shifted_prior(COUNTS, 8, backward=True)
    assert_close(forward, torch.tensor([2, 8, 1, 4], dtype=torch.double) / 15)
    assert_close(backward, torch.tensor([4, 1, 8, 2], dtype=torch.double) / 15)
    assert_close(shifted_prior(COUNTS, 1), torch.full((4,), 0.25, dtype=torch.double))


def test_shifted_accuracy_against_drawn_subsets():
    """The weighted accuracy is what many random long-tailed subsets of the test set give on average."""
    labels = torch.arange(4).repeat_interleave(64)
    logits = torch.randn(256, 4) + 1.5 * F.one_hot(labels, 4)
    rows = shifted_accuracy(logits, labels, COUNTS, [1] * 4, factors=(8,))
    assert [(row["direction"], row["factor"]) for row in rows] == [("forward", 8), ("uniform", 1), ("backward", 8)]
    correct = logits.argmax(-1) == labels
    sizes = {"forward": [16, 64, 8, 32], "backward": [32, 8, 64, 16]}
    for row in rows[::2]:
        prior = torch.tensor(sizes[row["direction"]]) / 120
        informed = (logits + prior.log()).argmax(-1) == labels
        for key, hits in (("top1", correct), ("top1_target_prior", informed)):
            drawn = []
            for _ in range(400):
                chosen = [64 * c + torch.randperm(64)[:size] for c, size in enumerate(sizes[row["direction"]])]
                drawn.append(hits[torch.cat(chosen)].double().mean().item())
            assert row[key] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 20)
        assert row["top1_target_prior"] > row["top1"]
    assert rows[1]["top1"] == rows[1]["top1_target_prior"] == pytest.approx(correct.double().mean().item())


@pytest.mark.parametrize("carried", [COUNTS, [n**0.5 for n in COUNTS], [1, 2, 3, 4]])
def test_target_prior_takes_the_carried_prior_out(carried):
    """Logits that carry a prior lose it before the target prior comes in."""
    labels = torch.arange(4).repeat_interleave(50)
    clean = torch.randn(200, 4) + F.one_hot(labels, 4)
    biased = clean + torch.tensor(carried).log()
    ours, theirs = (
        shifted_accuracy(logits, labels, COUNTS, prior) for logits, prior in ((clean, [1] * 4), (biased, carried))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["top1_target_prior"] == pytest.approx(b["top1_target_prior"])
    assert ours[5]["top1"] > theirs[5]["top1"]  # uniform


def test_classes_without_test_image_have_no_part_in_a_shifted_accuracy():
    labels = torch.tensor([0, 0, 1])
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 9, 0, 0]])
    rows = shifted_accuracy(logits, labels, COUNTS, [1] * 4, factors=(8,))
    assert rows[0]["top1"] == pytest.approx((2 * 0.5 + 8 * 1) / 10)


def test_posthoc_grid():
    labels = torch.arange(4).repeat_interleave(50)
    logits = torch.randn(200, 2, 4) + 2 * F.one_hot(labels, 4)[:, None] + torch.tensor(COUNTS).log()
    curves = posthoc_accuracy(logits, logits.mean(1), labels, COUNTS, [0.0, 1.0])
    assert curves["taus"] == [0.0, 1.0]
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    for k in range(2):
        for t, tau in enumerate((0.0, 1.0)):
            hits = [
                (row - tau * prior.log()).argmax() == label for row, label in zip(logits[:, k], labels, strict=True)
            ]
            assert curves["experts"][k][t] == pytest.approx(np.mean(hits))
    assert curves["ensemble"][1] > curves["ensemble"][0] + 0.1


def test_feature_distance_of_every_pair():
    features, labels = torch.randn(12, 3, 5), torch.arange(12) % 3
    distances = pairwise_feature_distance(features, labels, 4)
    assert expert_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert distances.shape == (3, 4)
    for row, (m, n) in zip(distances, expert_pairs(3), strict=True):
        for c in range(3):
            expected = [math.dist(features[i, m], features[i, n]) for i in range(12) if i % 3 == c]
            assert row[c].item() == pytest.approx(np.mean(expected), rel=1e-5)
        assert row[3].isnan()
    assert pairwise_feature_distance(features[:, :1], labels, 4).shape == (0, 4)


def test_embedding_keeps_clusters_apart_and_shows_few_classes():
    labels = torch.arange(12).repeat_interleave(15)
    features = 20 * F.one_hot(labels, 12).float() + torch.randn(180, 12)
    shown = sample_features(features, labels, list(range(12, 0, -1)), max_classes=3, per_class=10)
    assert shown["features"].shape == (30, 12)
    assert shown["labels"].tolist() == [0] * 10 + [6] * 10 + [11] * 10  # largest, middle, smallest
    assert np.array_equal(shown["features"][10:20], features[90:100].numpy())
    points = embed_features(shown["features"])
    assert points.shape == (30, 2)
    centres = {c: points[shown["labels"] == c].mean(0) for c in (0, 6, 11)}
    for point, label in zip(points, shown["labels"], strict=True):
        assert min(centres, key=lambda c: math.dist(centres[c], point)) == label


@pytest.mark.parametrize("weighted", [True, False])
def test_transfer_against_loops(weighted):
    cls, ref, labels = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.tensor([0, 1, 1, 2, 0, 1])
    w = transfer_weights(ref.double(), cls.double(), labels)
    expected = {name: torch.zeros(4, dtype=torch.double) for name in ("value", "loss", "weight", "images")}
    for i, label in enumerate(labels.tolist()):
        for q in range(3):
            expected["weight"][label] += w[q, i] / 3
            for k in range(3):
                if k != q:
                    weight = w[q, i] if weighted else 1.0
                    p, r = cls[k, i].double().softmax(-1), cls[q, i].double().softmax(-1)
                    expected["value"][label] += weight * cls[k, i, label] / 6
                    expected["loss"][label] += weight * (p * (p / r).log()).sum() / 6
        expected["images"][label] += 1
    assert_close(transfer_by_class(cls, ref, labels, 4, weighted), expected)
    assert "weight" not in transfer_by_class(cls, None, labels, 4, weighted=False)


class Features(nn.Module):
    """Pixels as the features of two experts, which a linear head classifies."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values, output_features=False):
        assert output_features
        features = torch.stack([pixel_values, 2 * pixel_values], dim=1)
        return SimpleNamespace(expert_logits=self.head(features), features=features)


def test_transfer_of_a_data_set_is_the_mean_over_its_images():
    model, references = Features(), [nn.Linear(4, 3), nn.Linear(4, 3)]
    images, labels = torch.randn(7, 4), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    batches = [{"pixel_values": images[:4], "labels": labels[:4]}, {"pixel_values": images[4:], "labels": labels[4:]}]
    collected = collect_transfer(model, references, batches, weighted=True)
    with torch.no_grad():
        cls = model(images, output_features=True).expert_logits.transpose(0, 1)
        ref = torch.stack([references[0](images), references[1](2 * images)])
    whole = transfer_by_class(cls, ref, labels, 3, weighted=True)
    for name in ("value", "loss", "weight"):
        assert collected[name][:2] == pytest.approx((whole[name] / whole["images"])[:2].numpy(), rel=1e-5)
        assert math.isnan(collected[name][2])


class Net(nn.Module):
    """A tiny network with everything that a direction treats differently."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(self.norm(self.conv(pixel_values)).relu().mean((2, 3))))


def test_direction_has_the_norm_of_each_filter():
    parameters = {name: p.detach() for name, p in Net().named_parameters()}
    direction = filter_normalised_direction(parameters, seed=3)
    assert direction.keys() == parameters.keys()
    for name in ("conv.weight", "head.weight"):
        for noise, weight in zip(direction[name], parameters[name], strict=True):
            assert noise.norm().item() == pytest.approx(weight.norm().item(), rel=1e-5)
            assert abs(F.cosine_similarity(noise.flatten(), weight.flatten(), dim=0)) < 0.95
    assert all(not direction[name].any() for name in ("conv.bias", "norm.weight", "norm.bias", "head.bias"))
    again, other = (filter_normalised_direction(parameters, seed=seed) for seed in (3, 4))
    assert torch.equal(again["conv.weight"], direction["conv.weight"])
    assert not torch.equal(other["conv.weight"], direction["conv.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_landscape_is_the_model_itself_at_zero_and_moves_nothing(training):
    net = Net().train(training)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [{"pixel_values": torch.randn(n, 3, 6, 6), "labels": torch.randint(3, (n,))} for n in (5, 2)]
    result = landscape(net, batches, magnitudes=[-0.5, 0.0, 1.0], seeds=[0, 7])
    assert net.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))

    # The same points by moving a copy's weights in place
    direction = filter_normalised_direction(dict(net.named_parameters()), seed=7)
    for m, magnitude in enumerate((-0.5, 0.0, 1.0)):
        moved = Net().eval()
        moved.load_state_dict(before)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += magnitude * direction[name]
            logits = moved(images).logits
        assert result["loss"][1, m].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert result["accuracy"][1, m].item() == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert result["loss"][0, 1] == result["loss"][1, 1]
    assert result["loss"][0, 2] != result["loss"][1, 2]
