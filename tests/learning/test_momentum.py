"""The momentum branch: key encoders that start as copies and follow, and queues that are rings."""

from collections import deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.momentum import KeyQueue, MomentumEncoder
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings

BRANCHES = ["encoder", "projector"]


def query_side():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return encoder.double(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5)).double()


def draw_images(num_images=6, dtype=torch.double):
    return torch.randn(num_images, 3, 16, 16, dtype=dtype)


@torch.no_grad()
def move(module):
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter))


def values(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def build_task(method="ecl", **config):
    model = ECLConfig(architecture="resnet20_cifar", num_experts=2, class_counts=[9, 5, 2, 1])
    config = {"queue_size": 7, "projection_dim": 5} | config
    return CollaborativeTask(ECLForImageClassification(model), METHODS[method], ECLSettings(**config)).train()


def draw_batch():
    images = draw_images(4, torch.float32), draw_images(4, torch.float32)
    return {"pixel_values": images[0], "labels": torch.arange(4), "contrast_pixel_values": images[1]}


# Key encoders


def test_key_side_starts_as_a_copy_of_its_own():
    query = query_side()
    query[0](draw_images())  # so that the running statistics are not the initial ones
    key = MomentumEncoder(*query)
    for branch, original in zip(BRANCHES, query, strict=True):
        copy = getattr(key, branch)
        assert_close(copy.state_dict(), original.state_dict(), rtol=0, atol=0)
        assert not any(p.requires_grad for p in copy.parameters())
        assert all(p.requires_grad for p in original.parameters())
        before = values(copy.named_parameters())
        move(original)
        assert_close(values(copy.named_parameters()), before, rtol=0, atol=0)


def test_first_keys_are_the_normalised_query_projections():
    encoder, projector = query_side()
    images = draw_images().requires_grad_()
    queries, keys = F.normalize(projector(encoder(images)), dim=-1), MomentumEncoder(encoder, projector)(images)
    assert_close(keys, queries.detach())
    assert queries.requires_grad
    assert not keys.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_follow_is_the_moving_average_of_every_parameter(momentum):
    query = query_side()
    key = MomentumEncoder(*query)
    for _ in range(2):
        for part in query:
            move(part)
        old, new = (
            [values(part.named_parameters()) for part in side] for side in ((key.encoder, key.projector), query)
        )
        key.follow(*query, momentum)
        for i, part in enumerate((key.encoder, key.projector)):
            for name, parameter in part.named_parameters():
                expected = momentum * old[i][name] + (1 - momentum) * new[i][name]
                assert_close(parameter, expected, rtol=1e-12, atol=1e-14)
                assert not parameter.requires_grad
            assert_close(values(query[i].named_parameters()), new[i], rtol=0, atol=0)


def test_batch_norm_keeps_its_own_statistics():
    encoder, projector = query_side()
    key = MomentumEncoder(encoder, projector)
    before = values(key.named_buffers())
    encoder(draw_images())
    key.follow(encoder, projector, 0.5)
    assert_close(values(key.named_buffers()), before, rtol=0, atol=0)

    of_query, images = values(encoder.named_buffers()), draw_images() + 3.0
    key(images)
    assert_close(values(encoder.named_buffers()), of_query, rtol=0, atol=0)
    maps = key.encoder[0](images)
    statistics = key.encoder[1]
    assert_close(statistics.running_mean, 0.1 * maps.mean((0, 2, 3)))  # from 0 with BatchNorm's momentum 0.1
    assert_close(statistics.running_var, 0.9 + 0.1 * maps.var((0, 2, 3)))
    assert statistics.num_batches_tracked == 1


def test_each_expert_has_its_own_key_side():
    task = build_task(key_momentum=0.25)
    for k, (expert, projector) in enumerate(zip(task.model.experts, task.projectors, strict=True)):
        assert_close(task.momentum[k].encoder.state_dict(), expert.backbone.state_dict(), rtol=0, atol=0)
        assert_close(task.momentum[k].projector.state_dict(), projector.state_dict(), rtol=0, atol=0)
    old = values(task.momentum.named_parameters())
    move(task.model)
    move(task.projectors)
    task.follow()
    followed = set()
    for k, (expert, projector) in enumerate(zip(task.model.experts, task.projectors, strict=True)):
        for branch, query in zip(BRANCHES, (expert.backbone, projector), strict=True):
            for name, parameter in query.named_parameters():
                name = f"{k}.{branch}.{name}"
                followed.add(name)
                expected = 0.25 * old[name] + 0.75 * parameter.detach()
                assert_close(task.momentum.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6)
    assert followed == old.keys()


def test_projectors_are_those_of_moco_v2():
    task = build_task()
    width = task.model.experts[0].head.in_features
    for projector in task.projectors:
        first, activation, second = projector
        assert isinstance(activation, nn.ReLU)
        assert (first.weight.shape, second.weight.shape) == ((width, width), (5, width))
        assert first.bias is not None
        assert second.bias is not None


def test_forward_leaves_queues_and_momentum_parameters_alone():
    task = build_task()
    task.enqueue(task(**draw_batch())["keys"], torch.arange(4))
    before = values(task.queue.named_buffers()) | values(task.momentum.named_parameters())
    out = task(**draw_batch())
    out["loss"].backward()
    assert_close(values(task.queue.named_buffers()) | values(task.momentum.named_parameters()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in task.momentum.parameters())
    assert not out["keys"].requires_grad


def test_keys_of_a_batch_are_negatives_of_the_next():
    task, batch = build_task("cpt"), draw_batch()
    first = task(**batch)
    task.enqueue(first["keys"], torch.arange(4))
    second = task(**batch)
    for k in range(2):
        assert_close(task.queue.keys[k, :4], first["keys"][:, k])
    # The positive stands among the negatives now
    assert second["terms"]["contrastive"] > first["terms"]["contrastive"]


def test_follow_without_a_momentum_branch_changes_nothing():
    task = build_task("bkt")
    before = values(task.named_parameters())
    task.follow()
    assert_close(values(task.named_parameters()), before, rtol=0, atol=0)


# Queues

SIZES = {
    "no multiple": [3] * 12,
    "the size": [7, 7, 7],
    "more than the size": [8, 20, 7 * 4, 9],
    "single keys": [1] * 30,
    "a short last batch": [4, 4, 4, 1, 4, 4, 4, 1],
    "anything": [2, 15, 1, 7, 6, 0, 8, 5, 14, 3],
}


def draw_keys(num_keys, num_experts=2):
    return F.normalize(torch.randn(num_keys, num_experts, 5), dim=-1)


def oldest_first(queue):
    return torch.roll(queue.keys, -int(queue.cursor), dims=1)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("num_experts", [1, 2])
def test_queue_is_a_ring(sizes, num_experts):
    queue = KeyQueue(num_experts, size=7, dim=5)
    model = deque(queue.keys.transpose(0, 1).clone(), maxlen=7)
    for size in sizes:
        keys = draw_keys(size, num_experts)
        queue.enqueue(keys, torch.arange(len(keys)))
        model.extend(keys)
        assert 0 <= queue.cursor < 7
        assert_close(oldest_first(queue), torch.stack(list(model), dim=1), rtol=0, atol=0)


def test_keys_are_replaced_in_place():
    """Only as many slots change as keys arrive: a ring, not a shift."""
    queue = KeyQueue(2, size=7, dim=5)
    queue.enqueue(draw_keys(5), torch.arange(5))
    before = queue.keys.clone()
    queue.enqueue(draw_keys(4), torch.arange(4))
    changed = (queue.keys != before).any(-1)
    assert changed.tolist() == [[True, True, False, False, False, True, True]] * 2


def test_new_queues_hold_different_unit_vectors():
    queue = KeyQueue(3, size=50, dim=5)
    assert_close(queue.keys.norm(dim=-1), torch.ones(3, 50))
    assert len(queue.keys.flatten(0, 1).unique(dim=0)) == 150
    assert queue.keys.mean((0, 1)).abs().max() < 0.2
    assert not list(queue.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_queue_keeps_its_dtype(dtype):
    queue, keys = KeyQueue(2, size=7, dim=5), draw_keys(3).to(dtype)
    queue.enqueue(keys, torch.arange(len(keys)))
    assert_close(queue.keys[:, :3], keys.transpose(0, 1).float(), rtol=0, atol=0)


def test_queue_keeps_no_graph():
    queue = KeyQueue(2, size=7, dim=5)
    queue.enqueue(draw_keys(3).requires_grad_(), torch.arange(3))
    assert not queue.keys.requires_grad


def test_queue_survives_its_state_dict():
    queue, copy = KeyQueue(2, size=7, dim=5), KeyQueue(2, size=7, dim=5)
    queue.enqueue(draw_keys(10), torch.arange(10))
    copy.load_state_dict(queue.state_dict())
    keys = draw_keys(3)
    queue.enqueue(keys, torch.arange(len(keys)))
    copy.enqueue(keys, torch.arange(len(keys)))
    assert_close(oldest_first(copy), oldest_first(queue), rtol=0, atol=0)
    assert copy.cursor == queue.cursor == 6


def test_task_survives_its_state_dict():
    task, other = build_task(key_momentum=0.5), build_task(key_momentum=0.5)
    task.enqueue(task(**draw_batch())["keys"], torch.arange(4))
    move(task.model)
    task.follow()
    other.load_state_dict(task.state_dict())
    batch = draw_batch()
    ours, theirs = task(**batch), other(**batch)
    assert_close(ours, theirs, rtol=0, atol=0)
    for each, out in ((task, ours), (other, theirs)):
        each.enqueue(out["keys"], torch.arange(4))
        each.follow()
    assert_close(other.state_dict(), task.state_dict(), rtol=0, atol=0)
