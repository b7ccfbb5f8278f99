"""What a stage trains and what it leaves alone; means over a whole step; optimisers and schedules."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.config import ModelConfig, OptimConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.optimiser import build_optimizer, learning_rate, set_learning_rate
from ecl_hf.learning.stages import begin_heads, check_stages, fold_heads, idle_keys
from ecl_hf.learning.task import CollaborativeTask, mean_loss
from ecl_hf.methods import METHODS, Method, Stage, Term
from ecl_hf.methods.base import BACKBONES, HEADS, PerImage, Trains
from ecl_hf.methods.ecl import CONTRASTIVE, SUPERVISION, BalancedSettings, ECLSettings

COUNTS = [9, 5, 2]


def build(*stages, stage=0, num_experts=2):
    config = ECLConfig(architecture="resnet20_cifar", num_experts=num_experts, class_counts=COUNTS, num_labels=3)
    method = Method(stages, ECLSettings)
    return CollaborativeTask(ECLForImageClassification(config), method, ECLSettings(queue_size=4), stage)


def step(task):
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(torch.randn(6, 3, 16, 16), torch.arange(6) % 3, torch.randn(6, 3, 16, 16))["loss"].backward()
    optimizer.step()
    task.follow()


# Means


@pytest.mark.parametrize("shared", [False, True])
def test_pieces_of_a_step_give_the_weighted_mean_of_the_whole(shared):
    logits, labels, weights = torch.randn(8, 3, dtype=torch.double), torch.arange(8) % 3, torch.rand(3).double()
    share = torch.rand(8).double() if shared else None
    losses = F.cross_entropy(logits, labels, reduction="none")
    counts = torch.bincount(labels, minlength=3) / 2
    pieces = [
        mean_loss(PerImage(losses[part], weights), labels[part], None if share is None else share[part], counts)
        for part in (slice(0, 3), slice(3, 8))
    ]
    if share is None:
        expected = F.cross_entropy(logits, labels, weights)
    else:
        numerator = sum(w * part * loss for w, part, loss in zip(weights[labels], share, losses, strict=True))
        expected = numerator / weights[labels].sum()
    assert_close(sum(pieces) / 2, expected)


def test_a_share_for_each_picture_needs_a_loss_for_each():
    with pytest.raises(ValueError, match="a loss for each picture"):
        mean_loss(torch.tensor(1.0), torch.tensor([0]), torch.tensor([0.5]))


def test_two_labels_with_their_share():
    task = build(Stage((SUPERVISION,), mixing=lambda batch, _: batch)).eval()
    images, labels, others = torch.randn(6, 3, 16, 16), torch.arange(6) % 3, torch.tensor([2, 2, 0, 1, 1, 0])
    first, second = (task(images, each)["loss"] for each in (labels, others))
    mixed = task(images, labels, mixed_labels=others, share=torch.tensor(0.3))["loss"]
    assert_close(mixed, 0.3 * first + 0.7 * second)


def test_mixing_needs_terms_that_take_two_labels():
    with pytest.raises(ValueError, match=r"stage 'x' mixes pictures of two classes, but its term 'contrastive'"):
        Stage((SUPERVISION, CONTRASTIVE), name="x", mixing=lambda batch, _: batch)


# What a stage trains


@pytest.mark.parametrize("count", [False, True])
def test_frozen_encoders_stay_bit_for_bit(count):
    task = build(Stage((SUPERVISION,), trains=Trains(HEADS.parameters, statistics=count))).train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    step(task)
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if ".head." in name} == {
        f"model.experts.{k}.head.{part}" for k in (0, 1) for part in ("weight", "bias")
    }
    rest = {name for name in moved if ".head." not in name}
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in rest)
    assert bool(rest) == count


def test_frozen_heads_stay():
    task = build(Stage((SUPERVISION,), trains=BACKBONES)).train()
    before = [expert.head.weight.clone() for expert in task.model.experts]
    step(task)
    assert all(torch.equal(expert.head.weight, old) for expert, old in zip(task.model.experts, before, strict=True))


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="trains no parameter"):
        build(Stage((SUPERVISION,), trains=Trains(lambda name: "nothing" in name)))


def test_train_only_modules_go_on_into_the_next_stage():
    stages = Stage((CONTRASTIVE, SUPERVISION), share=0.5), Stage((CONTRASTIVE, SUPERVISION), share=0.5)
    first = build(*stages)
    first.train()
    step(first)
    first.enqueue(torch.ones(3, 2, 64), torch.tensor([2, 0, 1]))
    second = CollaborativeTask(first.model, first.method, first.settings, 1)
    second.adopt(first)
    state = second.state_dict()
    assert first.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert not any(parameter.requires_grad for parameter in second.momentum.parameters())
    assert second.queue.labels.tolist() == [2, 0, 1, -1]


class Doubled(nn.Module):
    """Logits times a trained factor."""

    def __init__(self, head):
        super().__init__()
        self.head, self.factor = head, nn.Parameter(torch.tensor(2.0))
        self.in_features, self.weight = head.in_features, head.weight

    def forward(self, features):
        return self.factor * self.head(features)

    @torch.no_grad()
    def fold(self):
        self.head.weight.mul_(self.factor)
        self.head.bias.mul_(self.factor)
        return self.head


def test_wrapped_heads_are_folded():
    task = build(Stage((SUPERVISION,), heads=lambda head, _: Doubled(head))).eval()
    images = torch.randn(2, 3, 16, 16)
    plain = task.model(images).logits
    begin_heads(task.model, task.stage, task.settings)
    wrapped = task.model(images).logits
    assert_close(wrapped, 2 * plain)
    fold_heads(task.model)
    assert_close(task.model(images).logits, wrapped)
    assert type(task.model.experts[0].head).__name__ == "ECLHead"


def test_new_heads():
    task = build(Stage((SUPERVISION,), heads="new"))
    before = task.model.experts[1].head.weight.clone()
    begin_heads(task.model, task.stage, task.settings)
    assert not torch.equal(task.model.experts[1].head.weight, before)


# Methods


def test_shares_add_up():
    with pytest.raises(ValueError, match=r"must add up to 1, not 0\.9"):
        Method((Stage((SUPERVISION,), share=0.5), Stage((SUPERVISION,), share=0.4)))


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [([0.9, 0.1], 200, [180, 20]), ([0.9, 0.1], 3, [2, 1]), ([0.9, 0.1], 2, [1, 1]), ([0.5, 0.25, 0.25], 7, [4, 1, 2])],
)
def test_epochs_of_stages(shares, epochs, expected):
    method = Method(tuple(Stage((SUPERVISION,), share=share) for share in shares))
    assert method.stage_epochs(epochs) == expected
    with pytest.raises(ValueError, match=f"has {len(shares)} stages, but there are 1 epochs"):
        method.stage_epochs(1)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ({"sampler": lambda draw: draw.labels}, {"streaming": True}, "chooses its pictures itself"),
        (
            {"terms": (Term("x", SUPERVISION.loss, whole_batch=True),)},
            {"pieces": 2},
            "the term 'x' of m needs the batch in one piece: one process",
        ),
        (
            {"terms": (Term("x", SUPERVISION.loss, whole_batch=True, across_processes=True),)},
            {"pieces": 4, "processes": 2},
            "in one piece: train.gradient_accumulation_steps 1",
        ),
        ({}, {"teacher": "runs/bc"}, "m learns from no teacher"),
    ],
)
def test_what_can_not_be_carried_out_is_refused(stage, changes, message):
    method = Method((Stage(**{"terms": (SUPERVISION,)} | stage),))
    settings = {"streaming": False, "pieces": 1, "teacher": None, "name": "m"}
    check_stages(method, **settings | ({"teacher": None} if "teacher" in changes else {}))
    with pytest.raises(ValueError, match=message):
        check_stages(method, **settings | changes)


def test_terms_that_add_up_over_the_processes_may_have_several():
    method = Method((Stage((Term("x", SUPERVISION.loss, whole_batch=True, across_processes=True),)),))
    check_stages(method, streaming=False, pieces=2, processes=2, teacher=None, name="m")


def test_a_missing_teacher_is_told_how_to_make():
    method = Method((Stage((SUPERVISION,)),), teacher="bc")
    with pytest.raises(ValueError, match="train one with `--method bc` and name its run folder"):
        check_stages(method, streaming=False, pieces=1, teacher=None, name="m")


# Keys of another method's recipe


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("bc", []),
        ("ldam", ["model.classifier"]),
        ("crt", ["model.classifier"]),
        ("reslt", ["model.classifier", "model.head_init", "train.compile"]),
        ("tcl", ["model.classifier", "train.compile"]),
    ],
)
def test_keys_that_do_nothing_with_a_method_are_named(method, keys):
    config = ModelConfig(architecture="resnet20_cifar", classifier="cosine", head_init="class_means")
    model = initialise_model(config, METHODS[method], [9, 5, 2], ["a", "b", "c"], METHODS[method].settings())
    found = idle_keys(METHODS[method], method, config, model, compiled=True)
    assert [sentence.split()[0] for sentence in found] == keys
    assert all(method in sentence for sentence in found)
    plain = ModelConfig(architecture="resnet20_cifar")
    assert idle_keys(METHODS[method], method, plain, model, compiled=False) == []


# Optimisers


def gradients(task, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_textbook_sgd_by_groups(nesterov):
    """Nesterov's momentum, no decay on some parameters, a stage's own decay and factors, against float64."""
    stage = Stage(
        (SUPERVISION,),
        lr=0.5,
        weight_decay=lambda settings: 0.02,  # noqa: ARG005
        lr_factor=lambda name, settings, model: 0.1 if ".backbone." in name else 1.0,  # noqa: ARG005
    )
    task = build(stage, num_experts=1)
    config = OptimConfig(lr=0.2, momentum=0.8, nesterov=nesterov, no_decay=["norm", "head"])
    optimizer = build_optimizer(task, config, stage)
    names = {id(p): name for name, p in task.named_parameters()}
    weights = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    assert weights.keys() == {name for name, p in task.named_parameters() if p.requires_grad}
    expected = {name: p.detach().double() for name, p in weights.items()}
    speed = {name: torch.zeros_like(p) for name, p in expected.items()}
    for turn in range(3):
        gradients(task, turn)
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        for name, old in expected.items():
            spared = ".head." in name or "bn" in name or ("downsample.1" in name)
            gradient = weights[name].grad.double() + (0 if spared else 0.02) * old
            speed[name] = 0.8 * speed[name] + gradient
            change = gradient + 0.8 * speed[name] if nesterov else speed[name]
            expected[name] = old - 0.1 * (0.1 if ".backbone." in name else 1.0) * change
    for name, value in expected.items():
        assert_close(weights[name].detach().double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_an_optimizer_of_timms_is_pytorchs():
    """AdamW by timm's name moves the weights as PyTorch's own."""
    task, twin = build(Stage((SUPERVISION,)), num_experts=1), build(Stage((SUPERVISION,)), num_experts=1)
    twin.load_state_dict(task.state_dict())
    ours = build_optimizer(task, OptimConfig(name="adamw", lr=0.01, weight_decay=0.1), task.stage)
    theirs = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for turn in range(3):
        for each, optimizer in ((task, ours), (twin, theirs)):
            gradients(each, turn)
            optimizer.step()
    for a, b in zip(task.parameters(), twin.parameters(), strict=True):
        assert_close(a, b)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"optim\.name: timm has no optimizer 'addam'"):
        build_optimizer(build(Stage((SUPERVISION,))), OptimConfig(name="addam"), Stage((SUPERVISION,)))


def test_layer_decay_falls_towards_the_input():
    config = ECLConfig(architecture="test_vit", num_experts=1, class_counts=COUNTS, num_labels=3)
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["bc"], BalancedSettings())
    optimizer = build_optimizer(task, OptimConfig(name="adamw", layer_decay=0.5), task.stage)
    names = {id(p): name for name, p in task.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales["model.experts.0.head.weight"] == 1.0
    blocks = [scales[f"model.experts.0.backbone.blocks.{n}.attn.qkv.weight"] for n in range(2)]
    assert blocks[0] == 0.5 * blocks[1]
    assert scales["model.experts.0.backbone.patch_embed.proj.weight"] < blocks[0]


@pytest.mark.parametrize("warmup", [0, 2])
def test_schedules(warmup):
    cosine, steps, constant = (
        learning_rate(OptimConfig(schedule=name, warmup_epochs=warmup, milestones=[0.5, 0.75], step_factor=0.1), 10)
        for name in ("cosine", "step", "constant")
    )
    first = 10 * warmup
    assert [cosine(first, 100), constant(first, 100), constant(99, 100)] == [1.0, 1.0, 1.0]
    assert cosine(99, 100) == pytest.approx((1 + math.cos(math.pi * (99 - first) / (100 - first))) / 2)
    assert [steps(n, 100) for n in (49, 50, 74, 75)] == pytest.approx([1, 0.1, 0.1, 0.01])
    rises = [constant(n, 100) for n in range(first + 1)]
    assert rises == sorted(rises)
    assert rises[0] > 0
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs 2 is all of a stage of 20 steps"):
        learning_rate(OptimConfig(warmup_epochs=2), 10)(0, 20)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_a_course_of_the_stages_own_has_no_warm_up(schedule):
    of_recipe = learning_rate(OptimConfig(schedule=schedule, milestones=[0.5, 0.75]), 10)
    other = "cosine" if schedule == "constant" else "constant"
    own = learning_rate(OptimConfig(schedule=other, milestones=[0.5, 0.75], warmup_epochs=20), 10, schedule)
    assert [own(n, 100) for n in range(100)] == [of_recipe(n, 100) for n in range(100)]


def test_average_follows_the_weights():
    task = build(Stage((SUPERVISION,)), num_experts=1)
    task.keep_average(0.9)
    expected = {name: value.detach().clone() for name, value in task.model.named_parameters()}
    task.train()
    for _ in range(3):
        step(task)
        for name, value in task.model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach()
    for name, value in task.average.module.named_parameters():
        assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in task.average.parameters())
