"""Stages that train no encoder: what moves in them, what their losses are, and that folded heads compute the same."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.heads import ECLDisAlignHead, ECLHead, ECLNormalisedHead
from ecl_hf.learning.config import OptimConfig
from ecl_hf.learning.optimiser import build_optimizer
from ecl_hf.learning.stages import begin_heads, fold_heads, published_copy
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import EpochContext, FinishContext, Time

COUNTS = [30, 12, 5, 2]
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 0, 2])

# Method: parameters of the classifier that the second stage moves
MOVES = {
    "crt": {"weight", "bias"},
    "lws": {"scales"},
    "mislas": {"scales", "head.weight", "head.bias"},
    "disalign": {"logit_scale", "logit_bias", "confidence_weight", "confidence_bias"},
    "weight_balancing": {"weight", "bias"},
    "ckt": {"retrained.weight"},
}


def make_model(method, **config):
    head = METHODS[method].head
    return ECLForImageClassification(
        ECLConfig(
            architecture="resnet20_cifar",
            num_experts=1,
            class_counts=COUNTS,
            classifier=head.kind,
            classifier_bias=head.bias,
            classifier_chunks=head.chunks,
            **config,
        )
    )


def make_task(method, stage=1, **settings):
    """The task of a stage as a run begins it."""
    settings = METHODS[method].settings(**settings)
    model = make_model(method)
    begin_heads(model, METHODS[method].stages[stage], settings)
    return CollaborativeTask(model, METHODS[method], settings, stage).train()


def draw_batch():
    return {"pixel_values": torch.randn(len(LABELS), 3, 16, 16), "labels": LABELS}


def take_steps(task, count=2, lr=0.5):
    optimizer = build_optimizer(task, OptimConfig(lr=lr), task.stage, task.settings, fused=False)
    for _ in range(count):
        task(**draw_batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def context(task, features=None, labels=None, epoch=0):
    def predict():
        logits = task.model.experts[0].head.eval()(features).detach()[:, None]
        return labels, logits, features[:, None]

    counts = torch.tensor(COUNTS)
    return EpochContext(Time(epoch, 3), task.model, task.settings, counts, predict)


@pytest.mark.parametrize(("method", "shift"), [(method, shift) for method in MOVES for shift in (True, False)][:-1])
def test_what_moves(method, shift):
    """The classifier's own parameters, and the encoder's running statistics where they shall."""
    task = make_task(method, **({} if method == "ckt" else {"shift_statistics": shift}))
    expert = task.model.experts[0]
    before = state_of(expert)
    take_steps(task)
    moved = {name for name, tensor in expert.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.removeprefix("head.") for name in moved if name.startswith("head.")} == MOVES[method]
    encoder = {name for name in moved if name.startswith("backbone.")}
    assert bool(encoder) == (shift and method != "ckt")
    assert all(name.rpartition(".")[2].startswith(("running_", "num_batches")) for name in encoder)


@pytest.mark.parametrize("method", ["lws", "mislas", "ckt"])
def test_folded_heads_compute_the_same(method):
    task = make_task(method)
    take_steps(task)
    x = torch.randn(3, 3, 16, 16)
    before = task.model.eval()(x).logits.detach()
    fold_heads(task.model)
    after = task.model(x).logits.detach()
    assert_close(after, before, rtol=1e-5, atol=1e-5)
    kind = ECLNormalisedHead if method == "ckt" else ECLHead
    assert type(task.model.experts[0].head) is kind
    assert task.model.config.classifier == ("normalised" if method == "ckt" else "linear")


@pytest.mark.parametrize(("method", "stage"), [("lws", 1), ("disalign", 1), ("ckt", 1), ("tde", 0)])
def test_what_is_uploaded_within_a_stage_is_a_published_model(method, stage, tmp_path):
    task = make_task(method, stage)
    take_steps(task)
    before = state_of(task)
    published_copy(task.model).save_pretrained(tmp_path)
    x = torch.randn(3, 3, 16, 16)
    loaded = ECLForImageClassification.from_pretrained(tmp_path)
    assert_close(loaded(x).logits, task.model.eval()(x).logits, rtol=1e-5, atol=1e-5)
    after = task.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_whole_loss_of_each_second_stage():
    """Cross-entropies of the logits that the head gives in training, one image at a time."""
    effective = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS])
    effective *= len(COUNTS) / effective.sum()
    power = torch.tensor([(n / sum(COUNTS)) ** -1.2 for n in COUNTS])
    for method in MOVES:
        task = make_task(method)
        batch = draw_batch()
        loss = task(**batch)["loss"]
        logits = task.model(batch["pixel_values"]).expert_logits[:, 0].detach()
        each = F.cross_entropy(logits, LABELS, reduction="none")
        if method == "disalign":
            expected = (power[LABELS] * each).sum() / power[LABELS].sum()
        elif method == "mislas":
            rank = (torch.tensor(COUNTS) - 2)[LABELS] / 28
            eps = 0.1 + 0.3 * torch.sin(torch.pi / 2 * rank)
            expected = ((1 - eps) * each - eps * logits.log_softmax(-1).mean(-1)).mean()
        elif method == "weight_balancing":
            target = F.one_hot(LABELS, len(COUNTS)).float()
            wrong = -(target * logits.softmax(-1).log() + (1 - target) * (1 - logits.softmax(-1)).log())
            expected = (effective[LABELS] * wrong.mean(-1)).mean()
        else:
            expected = each.mean()
        assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_mislas_trains_classifier_and_scales_at_their_own_rates():
    task = make_task("mislas", classifier_lr=0.3)
    groups = build_optimizer(task, OptimConfig(), task.stage, task.settings).param_groups
    scales = {group["lr_scale"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert scales == {1.0: len(COUNTS), 0.3: len(COUNTS) * 65}


def test_weight_balancing_decays_the_classifier_alone():
    task = make_task("weight_balancing", head_weight_decay=0.3)
    groups = build_optimizer(task, OptimConfig(), task.stage, task.settings).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3]
    first = make_task("weight_balancing", stage=0, head_weight_decay=0.3)
    groups = build_optimizer(first, OptimConfig(), first.stage, first.settings).param_groups
    assert [group["weight_decay"] for group in groups] == [0.005]


def test_maxnorm_cuts_rows_to_the_length_of_the_beginning():
    task = make_task("weight_balancing", norm_share=0.25)
    head = task.model.experts[0].head
    norms = head.weight.detach().norm(dim=-1)
    limit = norms.min() + 0.25 * (norms.max() - norms.min())
    head.weight.data.mul_(torch.tensor([5.0, 1.0, 0.1, 2.0])[:, None])
    direction = F.normalize(head.weight.detach(), dim=-1)
    expected = head.weight.detach().norm(dim=-1).clamp_max(limit)
    again = make_task("weight_balancing", norm_share=0.25)  # as a run that goes on: other rows at first
    again.load_state_dict(task.state_dict())
    again.parts["supervision"].after_epoch(context(again))
    rows = again.model.experts[0].head.weight.detach()
    assert_close(rows.norm(dim=-1), expected)
    assert_close(F.normalize(rows, dim=-1), direction)


def test_disalign_begins_with_the_classifier_of_the_run():
    model = make_model("disalign")
    weight, bias = (tensor.clone() for tensor in model.experts[0].head.state_dict().values())
    begin_heads(model, METHODS["disalign"].stages[1], METHODS["disalign"].settings())
    head = model.experts[0].head
    assert type(head) is ECLDisAlignHead
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)


def test_crt_forgets_the_classifier_of_the_run():
    model = make_model("crt")
    model.experts[0].head.weight.data.fill_(7.0)
    begin_heads(model, METHODS["crt"].stages[1], METHODS["crt"].settings())
    assert model.experts[0].head.weight.abs().max() < 1


def finish(method, features, labels, **settings):
    """The head before and after a method's last step."""
    model, settings = make_model(method), METHODS[method].settings(**settings)
    torch.nn.init.normal_(model.experts[0].head.bias)
    before = state_of(model.experts[0].head)

    def predict():
        return labels, None, features[:, None]

    for step in METHODS[method].finish:
        step(FinishContext(model, settings, torch.tensor(COUNTS), predict))
    fold_heads(model)
    return before, model


def test_tau_norm_at_the_end():
    before, model = finish("tau_norm", torch.randn(8, 64), LABELS, tau=0.5)
    features = torch.randn(3, 64)
    rows = torch.stack([row / row.norm() ** 0.5 for row in before["weight"]])
    assert_close(model.experts[0].head(features).detach(), features @ rows.T)


@pytest.mark.parametrize("kind", ["raw", "normalised", "centred"])
def test_nearest_mean_at_the_end(kind):
    features, labels = torch.randn(9, 64), torch.cat([LABELS, torch.tensor([-1])])  # the last could not be decoded
    _, model = finish("ncm", features, labels, kind=kind)
    seen = features[:-1] - features[:-1].mean(0) if kind == "centred" else features[:-1]
    seen = seen if kind == "raw" else F.normalize(seen, dim=-1)
    means = torch.stack([seen[c == LABELS].mean(0) for c in range(len(COUNTS))])
    nearest = torch.cdist(seen, means).argmin(-1)
    assert torch.equal(model.experts[0].head(features[:-1]).argmax(-1), nearest)
    assert model.config.classifier == ("linear" if kind == "raw" else "normalised")
