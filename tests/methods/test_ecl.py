"""Methods and the collaborative task: which terms and branches, their values, and whom their gradients reach."""

from dataclasses import fields
from itertools import permutations, product

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS, Method, Stage, TaskOutputs, Term, ecl, ncl
from ecl_hf.methods.ecl import ECLSettings
from tests import reference

COUNTS = [60, 40, 25, 15, 10, 6, 4, 2, 1, 1]
LABELS = [0, 9, 3, 3, 1, 0]
# Unlike the defaults and each other, so that none can stand in for another
CONFIG = {
    "alpha_logit": 0.3,
    "alpha_feature": 0.7,
    "beta": 0.2,
    "tau": 1.2,
    "temperature": 2.0,
    "contrast_temperature": 0.3,
    "queue_size": 8,
    "projection_dim": 6,
}
WEIGHTS = {"supervision": 1.0, "reference": 1.0, "logit": 0.3, "feature": 0.7, "contrastive": 0.2}

# Term: key in the logs, parameters that its gradient reaches
TERMS = {
    "PLAIN": ("supervision", "encoder cls"),
    "SUPERVISION": ("supervision", "encoder cls"),
    "REFERENCE": ("reference", "encoder ref"),
    "UNWEIGHTED": ("logit", "encoder cls"),
    "BALANCED": ("logit", "encoder cls"),
    "SHUFFLED": ("logit", "encoder cls"),
    "INVERTED": ("logit", "encoder cls"),
    "BALANCED_DETACHED": ("logit", "encoder cls"),
    "FEATURE": ("feature", "encoder"),
    "FEATURE_DETACHED": ("feature", "encoder"),
    "CONTRASTIVE": ("contrastive", "encoder projector"),
    "ncl.SUPERVISION": ("supervision", "encoder cls"),
    "ncl.DISTILLATION": ("logit", "encoder cls"),
}
OWN = ecl.METHODS | ncl.METHODS


def find(term):
    """A term of ECL's file, or of NCL's."""
    return getattr(ncl, term[4:]) if term.startswith("ncl.") else getattr(ecl, term)


def build(method, num_experts=2, counts=COUNTS, **config):
    method = OWN[method] if isinstance(method, str) else method
    model = ECLConfig(architecture="resnet20_cifar", num_experts=num_experts, class_counts=counts, num_labels=10)
    return CollaborativeTask(
        ECLForImageClassification(model),
        method,
        method.settings(**{k: v for k, v in (CONFIG | config).items() if hasattr(method.settings, k)}),
    ).train()


def draw_batch(dtype=torch.float32):
    view, contrast = torch.randn(2, len(LABELS), 3, 16, 16, dtype=dtype)
    return {"pixel_values": view, "labels": torch.tensor(LABELS), "contrast_pixel_values": contrast}


def stage(*terms):
    return Method((Stage(terms),), ecl.ECLSettings)


def experts(method):
    return min(OWN[method].num_experts(None), 2)


@pytest.mark.parametrize("method", OWN)
def test_only_branches_that_a_term_needs(method):
    task = build(method, experts(method))
    branches = {name.partition(".")[0] for name, _ in task.named_parameters()} - {"model"}
    needs = task.stage.needs
    momentum = {"projectors", "momentum"} if "momentum" in needs else set()
    assert branches == momentum | ({"references"} if "reference" in needs else set())
    assert (task.queue is not None) == ("momentum" in needs)


@pytest.mark.parametrize("method", OWN)
def test_every_parameter_learns(method):
    task = build(method, experts(method))
    out = task(**draw_batch())
    out["loss"].backward()
    for name, parameter in task.named_parameters():
        if name.startswith("momentum."):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    task.follow()
    assert out["loss"].shape == ()
    assert (out["keys"] is None) == (task.queue is None)


@pytest.mark.parametrize("method", OWN)
def test_loss_is_the_weighted_sum_of_the_terms(method):
    out = build(method, experts(method))(**draw_batch())
    assert not any(term.requires_grad for term in out["terms"].values())
    assert_close(out["loss"].detach(), sum(WEIGHTS[name] * term for name, term in out["terms"].items()))


@pytest.mark.parametrize("weight", ["alpha_logit", "alpha_feature", "beta"])
def test_each_weight_has_its_own_term(weight):
    term = {"alpha_logit": "logit", "alpha_feature": "feature", "beta": "contrastive"}[weight]
    task, batch = build("ecl"), draw_batch()
    before = task(**batch)
    task.settings = ECLSettings(**CONFIG | {weight: CONFIG[weight] + 5.0})
    after = task(**batch)
    assert_close(after["loss"] - before["loss"], 5.0 * before["terms"][term])


@pytest.mark.parametrize(("num_experts", "method"), [(1, "ecl"), (1, "ncl"), (3, "ecl"), (3, "ncl")])
def test_any_number_of_experts(num_experts, method):
    out = build(method, num_experts)(**draw_batch())
    out["loss"].backward()
    assert out["keys"].shape == (len(LABELS), num_experts, CONFIG["projection_dim"])
    assert (out["terms"]["logit"] == 0) == (num_experts == 1)


@pytest.mark.parametrize("method", ["ce", "bc"])
@pytest.mark.parametrize("num_experts", [2, 3])
def test_methods_for_one_expert_refuse_more(method, num_experts):
    with pytest.raises(ValueError, match=f"trains 1 expert, but the model has {num_experts}"):
        build(method, num_experts)


@pytest.mark.parametrize("method", ["ce", "ecl"])
def test_unknown_class_counts_are_refused(method):
    with pytest.raises(ValueError, match="class_counts"):
        build(method, 1, counts=None)


@pytest.mark.parametrize("method", ["ecl", "ncl"])
def test_a_class_without_images_counts_as_one(method):
    with pytest.warns(UserWarning, match="1 classes have no training image") as caught:
        task = build(method, counts=[*COUNTS[:9], 0])
    assert len(caught) == 1
    other = build(method, counts=[*COUNTS[:9], 1])
    other.load_state_dict(task.state_dict())
    batch = draw_batch()
    assert_close(task(**batch)["loss"], other(**batch)["loss"])


@pytest.mark.parametrize("method", OWN)
def test_autocast_leaves_the_loss_in_float32(method):
    task, batch = build(method, experts(method)), draw_batch()
    exact = task(**batch)["terms"]
    with torch.autocast("cpu", torch.bfloat16):
        assert task.model.experts[0].backbone(batch["pixel_values"]).dtype == torch.bfloat16
        out = task(**batch)
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32
    assert out["loss"].isfinite()
    assert out["keys"] is None or out["keys"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    for name in exact.keys() - {"logit"}:
        assert_close(out["terms"][name], exact[name], rtol=0.02, atol=0.02)


def test_terms_are_computed_outside_autocast():
    seen = []

    def spy(out, config):
        seen.append((torch.is_autocast_enabled("cpu"), out.queries.dtype, out.keys.dtype, out.queues.dtype))
        return out.cls_logits.sum()

    task = build(stage(Term("spy", spy, needs=frozenset({"momentum"}))))
    with torch.autocast("cpu", torch.bfloat16):
        task(**draw_batch())
    assert seen == [(False, torch.float32, torch.float32, torch.float32)]


def test_the_second_view_serves_the_keys_alone():
    task, batch = build("ecl"), draw_batch()
    first, second = task(**batch), task(**draw_batch() | {"pixel_values": batch["pixel_values"]})
    changed = {name for name, term in first["terms"].items() if term != second["terms"][name]}
    assert changed == {"contrastive"}
    assert not first["keys"].requires_grad
    assert_close(first["keys"].norm(dim=-1), torch.ones(len(LABELS), 2))


# Whom the gradient of a single term reaches


@pytest.mark.parametrize("term", TERMS)
def test_reach_of_a_term(term):
    task = build(stage(Term("branches", ecl.CONTRASTIVE.loss, needs=frozenset({"reference", "momentum"}))))
    task.stage = Stage((find(term),))  # with all branches, of which the term may use any
    task.queue.keys.requires_grad_()
    task(**draw_batch())["loss"].backward()
    reached = set()
    for k, expert in enumerate(task.model.experts):
        parts = {"encoder": expert.backbone, "cls": expert.head, "ref": task.references[k]}
        parts |= {"projector": task.projectors[k], "momentum": task.momentum[k]}
        for name, part in parts.items():
            gradients = [p.grad is not None and p.grad.any() for p in part.parameters()]
            assert any(gradients) == all(gradients), name
            reached |= {(k, name)} if all(gradients) else set()
    assert reached == set(product(range(2), TERMS[term][1].split()))
    assert task.queue.keys.grad is None


# Values of the terms on drawn outputs


def draw_outputs(num_experts, num_images=6):
    cls, ref, features = 2 * torch.randn(3, num_experts, num_images, 10, dtype=torch.double)
    queries, keys = F.normalize(torch.randn(2, num_experts, num_images, 4, dtype=torch.double), dim=-1)
    return TaskOutputs(
        labels=torch.tensor(LABELS[:num_images]),
        cls_logits=cls,
        ref_logits=ref,
        features=features[..., :7],
        log_prior_shift=torch.tensor(reference.prior_shift(COUNTS), dtype=torch.double),
        log_class_counts=torch.tensor(COUNTS, dtype=torch.double).log(),
        queries=queries,
        keys=keys,
        queues=F.normalize(torch.randn(num_experts, 5, 4, dtype=torch.double), dim=-1),
    )


def transfer_weights(out):
    return reference.transfer_weights(out.ref_logits.tolist(), out.cls_logits.tolist(), out.labels.tolist())


def inverted_weights(out):
    """The printed middle term of Eq. 6."""
    return reference.transfer_weights(out.cls_logits.tolist(), out.ref_logits.tolist(), out.labels.tolist())


def mean_supervision(logits, out, tau):
    losses = [reference.balanced_cross_entropy(z, out.labels.tolist(), COUNTS, tau) for z in logits.tolist()]
    return sum(losses) / len(losses)


def distillation(out, weights=None):
    return reference.logit_distillation(out.cls_logits.tolist(), weights, CONFIG["temperature"])


def contrastive(out):
    experts = zip(out.queries.tolist(), out.keys.tolist(), out.queues.tolist(), strict=True)
    return sum(reference.info_nce(*expert, CONFIG["contrast_temperature"]) for expert in experts)


BY_LOOP = {
    "PLAIN": lambda out: mean_supervision(out.cls_logits, out, 0.0),
    "SUPERVISION": lambda out: mean_supervision(out.cls_logits, out, CONFIG["tau"]),
    "REFERENCE": lambda out: mean_supervision(out.ref_logits, out, CONFIG["tau"]),
    "UNWEIGHTED": distillation,
    "BALANCED": lambda out: distillation(out, transfer_weights(out)),
    "BALANCED_DETACHED": lambda out: distillation(out, transfer_weights(out)),
    "INVERTED": lambda out: distillation(out, inverted_weights(out)),
    "FEATURE": lambda out: reference.feature_distillation(out.features.tolist(), CONFIG["temperature"]),
    "FEATURE_DETACHED": lambda out: reference.feature_distillation(out.features.tolist(), CONFIG["temperature"]),
    "CONTRASTIVE": contrastive,
    "ncl.SUPERVISION": lambda out: reference.ncl_cross_entropy(out.cls_logits.tolist(), LABELS, COUNTS, 3),
    "ncl.DISTILLATION": lambda out: reference.ncl_distillation(out.cls_logits.tolist(), LABELS, COUNTS, 3),
}


@pytest.mark.parametrize("term", BY_LOOP)
@pytest.mark.parametrize("num_experts", [1, 3])
def test_value_of_a_term(term, num_experts):
    out = draw_outputs(num_experts)
    actual = find(term).loss(out, ECLSettings(**CONFIG))
    assert_close(actual, torch.tensor(BY_LOOP[term](out), dtype=torch.double), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("num_classes", "hard"), [(2, 1), (10, 3), (100, 30), (8142, 2442)])
def test_ncl_mines_three_tenths_of_the_classes(num_classes, hard):
    logits, labels = torch.randn(1, 1, num_classes, dtype=torch.double), torch.zeros(1, dtype=torch.long)
    counts = [9] * num_classes
    log_counts = torch.tensor(counts, dtype=torch.double).log()
    out = TaskOutputs(labels, logits, logits, torch.zeros_like(log_counts), log_counts)
    expected = reference.ncl_cross_entropy(logits.tolist(), [0], counts, hard)
    actual = ncl.SUPERVISION.loss(out, ECLSettings())
    assert_close(actual, torch.tensor(expected, dtype=torch.double), rtol=1e-9, atol=0)


def test_shuffled_weights_are_a_permutation_within_the_batch():
    out, orders = draw_outputs(2, num_images=3), list(permutations(range(3)))
    weights = transfer_weights(out)
    possible = [
        distillation(out, [[w[i] for i in order] for w, order in zip(weights, chosen, strict=True)])
        for chosen in product(orders, repeat=2)
    ]
    seen = {ecl.SHUFFLED.loss(out, ECLSettings(**CONFIG)).item() for _ in range(20)}
    assert all(min(abs(value - p) for p in possible) < 1e-12 for value in seen)
    assert len(seen) > 3


@pytest.mark.parametrize("kind", ["BALANCED", "FEATURE"])
def test_detached_terms_teach_without_learning(kind):
    out = draw_outputs(2, num_images=1)
    scores = (out.cls_logits if kind == "BALANCED" else out.features).requires_grad_()
    both, student = (
        torch.autograd.grad(getattr(ecl, name).loss(out, ECLSettings(**CONFIG)), scores)[0]
        for name in (kind, f"{kind}_DETACHED")
    )
    fixed, weights, temperature = scores.tolist(), transfer_weights(out), CONFIG["temperature"]
    of_students = {
        "BALANCED": lambda z: reference.logit_distillation(z, weights, temperature, teachers=fixed),
        "FEATURE": lambda v: reference.feature_distillation(v, temperature, teachers=fixed),
    }
    expected = reference.gradient(of_students[kind], fixed)
    assert_close(student, torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-8)
    assert (both - student).abs().max() > 1e-3


@pytest.mark.parametrize("term", ["SUPERVISION", "REFERENCE"])
def test_summed_supervision(term):
    out, loss = draw_outputs(3), find(term).loss
    mean, summed = (loss(out, ECLSettings(**CONFIG, sup_reduction=name)) for name in ("mean", "sum"))
    assert_close(summed, 3 * mean)


@pytest.mark.parametrize("method", ["ecl", "ncl"])
def test_sup_reduction_is_for_the_supervision_of_eq_10(method):
    task, batch = build(method), draw_batch()
    mean = task(**batch)["terms"]
    task.settings.sup_reduction = "sum"
    summed = task(**batch)["terms"]
    for name, term in mean.items():
        times = 2 if name in ("supervision", "reference") and method == "ecl" else 1
        assert_close(summed[name], times * term)


# The whole loss


def parts_of(task, pixel_values, contrast_pixel_values):
    """Logits, features, queries and keys of a task, [K, ...], expert by expert."""
    parts = []
    for k, expert in enumerate(task.model.experts):
        v = expert.backbone(pixel_values)
        query, key = task.projectors[k](v), task.momentum[k].projector(task.momentum[k].encoder(contrast_pixel_values))
        ref = task.references[k](v) if task.references is not None else torch.zeros(0)
        parts.append([expert.head(v), ref, v, F.normalize(query, dim=-1), F.normalize(key, dim=-1)])
    return [torch.stack(part).tolist() for part in zip(*parts, strict=True)]


def moved_task(method):
    """A task in float64 whose momentum encoders are no longer the experts."""
    task = build(method, 3, alpha_logit=0.6, alpha_feature=0.6).double()
    with torch.no_grad():
        for parameter in (p for p in task.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return task


def test_ecl_is_eq_11():
    task, batch = moved_task("ecl"), draw_batch(torch.double)
    cls, ref, features, query, key = parts_of(task, batch["pixel_values"], batch["contrast_pixel_values"])
    weights = reference.transfer_weights(ref, cls, LABELS)
    expected = reference.total(
        reference.supervision(cls, ref, LABELS, COUNTS, tau=1.2),
        reference.logit_distillation(cls, weights, temperature=2.0),
        reference.feature_distillation(features, temperature=2.0),
        sum(reference.info_nce(q, k, n, 0.3) for q, k, n in zip(query, key, task.queue.keys.tolist(), strict=True)),
        alpha=0.6,
        beta=0.2,
    )
    out = task(**batch)
    # The class prior is kept in float32
    assert_close(out["loss"].item(), expected, rtol=1e-6, atol=0)
    assert_close(out["keys"], torch.tensor(key, dtype=torch.double).transpose(0, 1))


def test_ncl_is_as_published():
    task, batch = moved_task("ncl"), draw_batch(torch.double)
    cls, _, _, query, key = parts_of(task, batch["pixel_values"], batch["contrast_pixel_values"])
    queues = task.queue.keys.tolist()
    expected = reference.ncl_cross_entropy(cls, LABELS, COUNTS, 3)
    expected += 0.6 * reference.ncl_distillation(cls, LABELS, COUNTS, 3)
    expected += 0.2 * sum(reference.info_nce(q, k, n, 0.3) for q, k, n in zip(query, key, queues, strict=True))
    assert_close(task(**batch)["loss"].item(), expected, rtol=1e-6, atol=0)


def test_paper_values_by_default():
    config = ECLSettings()
    assert (config.alpha_logit, config.alpha_feature, config.beta, config.tau) == (0.6, 0.6, 1.0, 1.0)
    assert (config.queue_size, config.projection_dim, config.contrast_temperature) == (1024, 64, 0.2)
    assert (config.key_momentum, config.sup_reduction, config.temperature) == (0.999, "mean", 1.0)


@pytest.mark.parametrize("method", ["ncl", "ncl_plain", "fld", "cpt", "kd", "bkt"])
def test_methods_beside_ecl_have_no_setting_that_they_do_not_read(method):
    read = set()

    class Noted:
        def __getattr__(self, name):
            read.add(name)
            return getattr(METHODS[method].settings(), name)

    config = ECLConfig(architecture="resnet20_cifar", num_experts=2, class_counts=[9, 5, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS[method], Noted())
    task(torch.randn(4, 3, 8, 8), torch.arange(4) % 3, torch.randn(4, 3, 8, 8))
    task.follow()
    assert read == {item.name for item in fields(METHODS[method].settings)}
