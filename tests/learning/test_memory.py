"""Gradients and running statistics are the same with fewer activations kept."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.memory import checkpoint_blocks, checkpoint_experts, counted_once
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.losses import balanced_cross_entropy, info_nce, transfer_weights
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings

COUNTS = [40, 20, 9, 2]
LOSS = ECLSettings(queue_size=12, projection_dim=5, beta=0.5)


def build(
    method: str = "ecl", num_experts: int = 3, architecture: str = "resnet20_cifar", **options
) -> CollaborativeTask:
    config = ECLConfig(architecture=architecture, num_experts=num_experts, class_counts=COUNTS, **options)
    return CollaborativeTask(ECLForImageClassification(config), METHODS[method], LOSS).double().train()


def draw_batch(size: int = 8) -> dict[str, torch.Tensor]:
    views = torch.randn(2, 6, 3, size, size, dtype=torch.double)
    return {"pixel_values": views[0], "contrast_pixel_values": views[1], "labels": torch.arange(6) % 4}


def step(task: CollaborativeTask, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, terms, keys, gradients and running statistics after one forward and backward."""
    out = task(**batch)
    with counted_once(task):
        out["loss"].backward()
    gradients = {f"gradient of {name}": p.grad for name, p in task.named_parameters() if p.requires_grad}
    return {
        "loss": out["loss"].detach(),
        "keys": out["keys"],
        **out["terms"],
        **gradients,
        **dict(task.named_buffers()),
    }


def both(model: ECLForImageClassification) -> None:
    checkpoint_blocks(model)
    checkpoint_experts(model)


MODES = [checkpoint_blocks, checkpoint_experts, both]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["ecl", "ecl_detached", "ncl"])
def test_step_is_the_same(method, mode):
    task, batch = build(method), draw_batch()
    other = copy.deepcopy(task)
    mode(other.model)
    for _ in range(2):  # the second meets the statistics that the first has left
        joint, sparing = step(task, batch), step(other, batch)
        assert_close(sparing, joint, rtol=1e-10, atol=1e-12)
    assert joint["model.experts.0.backbone.bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_step_is_the_same_with_random_depth(mode):
    """What the repeated forward draws is what the first one drew."""
    task = build("bkt", 2, "test_vit", model_args={"drop_path_rate": 0.5, "img_size": 32})
    batch, other = draw_batch(32), copy.deepcopy(task)
    mode(other.model)
    results = []
    for each in (task, other):
        torch.manual_seed(3)
        results.append(step(each, batch))
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def one_by_one(task: CollaborativeTask, batch: dict[str, torch.Tensor]) -> None:
    """Gradients of ECL with fixed teachers, each expert's loss written out and carried back by itself."""
    images, labels, shift = batch["pixel_values"], batch["labels"], task.log_prior_shift
    with torch.no_grad():
        features, logits = map(torch.stack, zip(*(expert(images) for expert in task.model.experts), strict=True))
    experts = range(len(features))
    pairs = len(features) * (len(features) - 1)
    for k in experts:
        v, z = task.model.experts[k](images)
        ref = task.references[k](v)
        query = F.normalize(task.projectors[k](v), dim=-1)
        loss = balanced_cross_entropy(z, labels, shift) + balanced_cross_entropy(ref, labels, shift)
        loss = loss / len(features)
        loss = loss + LOSS.beta * info_nce(
            query, task.momentum[k](batch["contrast_pixel_values"]), task.queue.keys[k], 0.2
        )
        weight = transfer_weights(ref, z, labels)
        for teacher in experts:
            if teacher != k:
                for mine, theirs, w in ((z, logits[teacher], weight), (v, features[teacher], torch.ones_like(weight))):
                    kl = F.kl_div(mine.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
                    loss = loss + 0.6 * (w * kl).mean() / pairs
        loss.backward()


def test_experts_one_by_one_are_those_with_fixed_teachers():
    """Where the teachers are fixed, an expert's gradient needs nothing but the others' outputs."""
    task, batch = build("ecl_detached"), draw_batch()
    alone = copy.deepcopy(task)
    checkpoint_experts(task.model)
    step(task, batch)
    one_by_one(alone, batch)
    for (name, ours), theirs in zip(task.named_parameters(), alone.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def kept(task: CollaborativeTask, batch: dict[str, torch.Tensor]) -> int:
    """Numbers in the activations that a forward keeps for backward."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in (*task.parameters(), *task.buffers(), *batch.values())}

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        out = task(**batch)
    assert out["loss"].requires_grad
    return sum(storages.values())


def test_fewer_activations_are_kept():
    tasks = {mode: build("bkt") for mode in (None, *MODES)}
    for mode, task in tasks.items():
        if mode:
            mode(task.model)
    numbers = {mode: kept(task, draw_batch(16)) for mode, task in tasks.items()}
    assert numbers[checkpoint_blocks] < 0.5 * numbers[None]
    assert numbers[checkpoint_experts] == numbers[both] < 0.1 * numbers[None]


def test_one_expert_is_repeated_at_a_time():
    task, order = build("bkt"), []
    checkpoint_experts(task.model)
    for k, expert in enumerate(task.model.experts):
        expert.backbone.register_forward_hook(lambda *_, k=k: order.append(f"forward {k}"))
        expert.backbone.conv1.weight.register_post_accumulate_grad_hook(lambda _, k=k: order.append(f"backward {k}"))
    step(task, draw_batch())
    assert order[:3] == ["forward 0", "forward 1", "forward 2"]
    assert order[3:] == ["forward 2", "backward 2", "forward 1", "backward 1", "forward 0", "backward 0"]


def test_without_counted_once_a_batch_counts_twice():
    task = build("bc", 1)
    checkpoint_experts(task.model)
    task(**draw_batch())["loss"].backward()
    assert task.model.experts[0].backbone.bn1.num_batches_tracked == 2


def test_architecture_without_checkpointing_is_refused():
    model = build(num_experts=1, architecture="pit_ti_224").model
    with pytest.raises(
        ValueError, match=r"train\.gradient_checkpointing: timm has none for pit_ti_224; train\.experts"
    ):
        checkpoint_blocks(model)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_stays_with_the_process():
    code = """
import re, torch
from ecl_hf.learning.memory import keep_freed_memory

def kept():
    resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
    before = resident()
    torch.ones(50, 2**20).sum()
    return (resident() - before) // 1024 > 150  # of 200 megabytes

print(kept(), keep_freed_memory() or kept())
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "True"]
