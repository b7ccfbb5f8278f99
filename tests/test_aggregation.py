"""How experts' logits become the ensemble's: weights, class by class too, and a router; stored, loaded, evaluated."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.aggregation import combine, routed_weights
from ecl_hf.evidence.evaluation import predict, summarise

COUNTS = [20, 9, 4]
ROUTER = {"choices": 2, "width": 5, "threshold": 0.5}
MASK = [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def ensemble(aggregation, share_stages=0, num_experts=3):
    config = ECLConfig(
        architecture="resnet20_cifar",
        num_experts=num_experts,
        share_stages=share_stages,
        class_counts=COUNTS,
        aggregation=aggregation,
    )
    return ECLForImageClassification(config).eval()


def undecided(model):
    """With a router that asks a second expert for half of the images."""
    with torch.no_grad():
        scores = model.router(*features_and_logits(model, images()))[:, 0].sort().values
        model.router.decide.bias.sub_(scores[3:5].mean())
        model.router.decide.weight.mul_(1000)
        model.router.decide.bias.mul_(1000)
    return model


def images(number=8):
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def features_and_logits(model, pixel_values):
    output = model(pixel_values, output_features=True)
    return output.features, output.expert_logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("aggregation", "shares"),
    [
        ("mean", [[1 / 3] * 3] * 3),
        ([3, 1, 0], [[0.75] * 3, [0.25] * 3, [0.0] * 3]),
        (MASK, [[1, 1 / 2, 1 / 3], [0, 1 / 2, 1 / 3], [0, 0, 1 / 3]]),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_weights_by_loop(aggregation, shares, flip):
    output = ensemble(aggregation)(images(2), flip=flip)
    for i, experts in enumerate(output.expert_logits.tolist()):
        expected = [sum(experts[k][c] * shares[k][c] for k in range(3)) for c in range(3)]
        assert_close(output.logits[i], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_router_takes_the_mean_of_the_first_experts():
    model = undecided(ensemble(ROUTER))
    output = model(images())
    scores = model.router(*features_and_logits(model, images()))
    numbers = set()
    for i, experts in enumerate(output.expert_logits):
        number = 1
        while number < 3 and scores[i, number - 1] > 0:
            number += 1
        assert_close(output.logits[i], experts[:number].mean(0))
        numbers.add(number)
    assert len(numbers) > 1


@pytest.mark.parametrize(("threshold", "number"), [(0.0, 3), (1.0, 1)])
def test_thresholds_that_ask_all_experts_or_one(threshold, number):
    logits = torch.randn(4, 3, 5)
    assert_close(combine(logits, routed_weights(torch.randn(4, 2), threshold)), logits[:, :number].mean(1))


def test_nobody_is_asked_after_the_one_who_is_sure():
    logits = torch.randn(1, 4, 5)
    assert_close(combine(logits, routed_weights(torch.tensor([[1.0, -1.0, 1.0]]), 0.5)), logits[:, :2].mean(1))


@torch.no_grad()
@pytest.mark.parametrize("share_stages", [0, 1])
@pytest.mark.parametrize("aggregation", [[3, 1, 0.5], MASK, ROUTER])
def test_a_stored_ensemble_combines_as_before(aggregation, share_stages, tmp_path):
    model = ensemble(aggregation, share_stages)
    model.save_pretrained(tmp_path)
    loaded = ECLForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.aggregation == aggregation
    assert_close(loaded(images()).logits, model(images()).logits, rtol=0, atol=0)
    assert_close(loaded(images()).expert_weights, model(images()).expert_weights, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("aggregation", "experts", "left"),
    [([3, 1, 0.5], [2, 0], [0.5, 3]), (ROUTER, [0, 1], "mean"), ("mean", [1], "mean")],
)
def test_some_of_the_experts(aggregation, experts, left, tmp_path):
    model = ensemble(aggregation)
    model.save_pretrained(tmp_path)
    some = ECLForImageClassification.from_pretrained(tmp_path, experts=experts).eval()
    assert some.config.aggregation == left
    weights = torch.tensor(left if isinstance(left, list) else [1.0] * len(experts))
    logits = model(images()).expert_logits[:, experts]
    assert_close(some(images()).logits, torch.einsum("k,bkc->bc", weights / weights.sum(), logits))


def test_experts_that_leave_a_class_to_others_are_refused(tmp_path):
    ensemble(MASK).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"for some class experts \[1, 2\] have no weight"):
        ECLForImageClassification.from_pretrained(tmp_path, experts=[1, 2])


def test_other_classes_have_no_use_for_the_old_weights(tmp_path):
    model = ensemble(MASK)
    model.config.logit_prior = [-1.0, -2.0, -3.0]
    model.config.weighted_on = "9 pictures"
    model.save_pretrained(tmp_path)
    other = ECLForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert (other.config.aggregation, other.config.logit_prior) == ("mean", "uniform")
    assert other.config.weighted_on is None


def test_no_file_of_an_expert_holds_the_router(tmp_path):
    ensemble(ROUTER).save_pretrained(tmp_path)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    of_experts = {file for key, file in where.items() if key.startswith("experts.")}
    of_router = {file for key, file in where.items() if key.startswith("router.")}
    assert len(of_experts) == 3
    assert not of_experts & of_router
    (file,) = of_router
    with safe_open(tmp_path / file, framework="pt") as tensors:
        assert {key.partition(".")[0] for key in tensors.keys()} == {"router"}  # noqa: SIM118  (not a mapping)


def test_an_absent_router_is_an_error(tmp_path):
    ensemble("mean").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"aggregation": ROUTER}))
    with pytest.raises(ValueError, match="router"):
        ECLForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("aggregation", ["mean", [3, 1, 0.5], MASK, ROUTER])
def test_evaluation_reports_what_the_ensemble_answers(aggregation):
    model = ensemble(aggregation)
    if model.router is not None:
        undecided(model)
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2, 0, 1, 2, -1, 0])}
    there = batch["labels"] >= 0
    predictions = predict(model, [batch, batch])
    with torch.no_grad():
        expected = {way: model(images(), flip=way == "flip").logits[there].repeat(2, 1) for way in ("plain", "flip")}
    for way, (combined, _) in predictions.ways.items():
        assert_close(combined, expected[way])
        right = (expected[way].argmax(-1) == predictions.labels).double().mean().item()
        assert summarise(predictions, COUNTS)[way]["ensemble"]["top1"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("aggregation", "message"),
    [
        ("median", "aggregation"),
        ([1.0, 2.0], "3 weights"),
        ([[1, 1], [1, 1], [1, 1]], "lists of 3"),
        ([1.0, [1.0, 1.0, 1.0], 1.0], "aggregation"),
        ([1.0, -1.0, 1.0], "weights in 0..1,000,000"),
        ([1.0, float("nan"), 1.0], "weights in 0..1,000,000"),
        ([0, 0, 0], "no expert a weight"),
        ([[1, 1, 0], [0, 1, 0], [0, 1, 0]], "no expert a weight"),
        ([], "3 weights"),
        ({"choices": 2}, "choices, width and threshold"),
        (ROUTER | {"choices": 4}, r"choices of the router must lie in 1\.\.3, got 4"),
        (ROUTER | {"width": 2.5}, "width of the router"),
        (ROUTER | {"threshold": 1.5}, r"threshold of the router must lie in 0\.\.1, got 1.5"),
        (ROUTER | {"threshold": None}, "threshold of the router"),
    ],
)
def test_refused(aggregation, message):
    with pytest.raises(StrictDataclassError, match=message):
        ECLConfig(num_experts=3, class_counts=COUNTS, aggregation=aggregation)


def test_a_router_needs_somebody_to_ask():
    with pytest.raises(StrictDataclassError, match="a router needs at least 2 experts"):
        ECLConfig(num_experts=1, class_counts=COUNTS, aggregation=ROUTER)
