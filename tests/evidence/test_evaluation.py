"""From model and batches to the reported summary, on models whose answers are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ecl_hf.evidence.evaluation import (
    Predictions,
    format_table,
    measure_speed,
    predict,
    score,
    score_for_training_prior,
    summarise,
)

EXPERTS, CLASSES, SIDE = 3, 4, 5
COUNTS = [300, 100, 20, 3]


class PixelModel(nn.Module):
    """Logits that are linear in the pixels and differ between an image and its mirror image."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm = nn.BatchNorm1d(EXPERTS * CLASSES)
        self.weight = nn.Parameter(torch.randn(3 * SIDE * SIDE, EXPERTS * CLASSES))
        self.modes = []
        self.to(dtype)

    def forward(self, pixel_values):
        self.modes.append(self.training)
        logits = self.norm(pixel_values.flatten(1) @ self.weight)
        return SimpleNamespace(expert_logits=logits.unflatten(1, (EXPERTS, CLASSES)), expert_weights=None)


def make_batches(sizes, dtype=torch.float32):
    return [
        {"pixel_values": torch.randn(size, 3, SIDE, SIDE, dtype=dtype), "labels": torch.randint(CLASSES, (size,))}
        for size in sizes
    ]


def predictions_of(expert_logits, flipped_logits, labels):
    tensors = [torch.as_tensor(logits, dtype=torch.float32) for logits in (expert_logits, flipped_logits)]
    return Predictions(torch.tensor(labels), *tensors)


def test_predict_keeps_the_order_and_mirrors_the_images():
    model, batches = PixelModel().eval(), make_batches([4, 4, 3])
    result = predict(model, batches)
    images = torch.cat([batch["pixel_values"] for batch in batches])
    mirrored = torch.stack([images[..., SIDE - 1 - column] for column in range(SIDE)], dim=-1)
    assert torch.equal(result.labels, torch.cat([batch["labels"] for batch in batches]))
    assert result.expert_logits.shape == (11, EXPERTS, CLASSES)
    assert_close(result.expert_logits, model(images).expert_logits.detach())
    assert_close(result.flipped_logits, model(mirrored).expert_logits.detach())
    assert (result.flipped_logits - result.expert_logits).abs().max() > 1


@pytest.mark.parametrize("training", [True, False])
def test_predict_evaluates_and_restores_the_mode(training):
    model = PixelModel().train(training)
    statistics = model.norm.running_mean.clone()
    result = predict(model, make_batches([4, 3]))
    assert model.modes == [False] * 4
    assert all(module.training is training for module in model.modules())
    assert torch.equal(model.norm.running_mean, statistics)
    assert not result.expert_logits.requires_grad


def test_predict_returns_float32_of_a_half_precision_model():
    result = predict(PixelModel(torch.bfloat16), make_batches([4], torch.bfloat16))
    assert result.expert_logits.dtype == result.flipped_logits.dtype == torch.float32


def test_predict_joins_what_gather_returns():
    """A gather that drops the padding of the last batch drops it everywhere."""
    model, batches = PixelModel(), make_batches([4, 4])
    remaining = [4, 1]

    def gather(tensors):
        keep = remaining.pop(0)
        return tuple(tensor[:keep] for tensor in tensors)

    whole, cut = predict(model, batches), predict(model, batches, gather)
    assert remaining == []
    for name in ("labels", "expert_logits", "flipped_logits"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[:5])


def test_score_by_hand():
    logits = torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 1.0, 0], [1.0, 0, 0, 0]])
    result = score(logits, torch.tensor([0, 1, 0, 2]), COUNTS)
    assert {name: value for name, value in result.items() if name != "ece"} == {
        "top1": 0.5,
        "balanced": 0.5,
        "macro_f1": 0.5,
        "many": 0.5,
        "medium": 0.5,
        "few": None,
        "top5": None,
    }
    # confidences e^z / (e^z + 3): 0.870 hit, 0.711 hit, and twice 0.475 missed; three of 15 bins
    first, second, third = (torch.tensor(z).double().exp() / (torch.tensor(z).double().exp() + 3) for z in (3, 2, 1))
    assert result["ece"] == pytest.approx(((1 - first) + (1 - second) + 2 * third).item() / 4)


def test_ensemble_is_the_mean_of_raw_logits():
    """One sure expert outvotes two others in the mean of logits, not in the mean of probabilities or in a vote."""
    logits = [[[20.0, 0], [0, 6.0], [0, 6.0]]]
    assert torch.tensor(logits).softmax(-1).mean(1).argmax() == 1
    summary = summarise(predictions_of(logits, logits, [0]), [30, 30])["plain"]
    assert summary["ensemble"]["top1"] == 1
    assert [expert["top1"] for expert in summary["experts"]] == [1, 0, 0]
    assert summary["expert_mean"]["top1"] == pytest.approx(1 / 3)


def test_flip_is_the_mean_of_both_logits():
    plain, flipped = [[[0.0, 1.0]], [[5.0, 0.0]]], [[[3.0, 0.0]], [[0.0, 4.0]]]
    summary = summarise(predictions_of(plain, flipped, [0, 0]), [30, 30])
    assert summary["plain"]["ensemble"]["top1"] == 0.5  # hits: second
    assert summary["flip"]["ensemble"]["top1"] == 1.0  # means [1.5, 0.5] and [2.5, 2.0]


def test_summary_against_scores_of_each_part():
    labels = torch.randint(CLASSES, (200,))
    plain, flipped = 3 * torch.randn(2, 200, EXPERTS, CLASSES)
    hint = 2 * nn.functional.one_hot(labels, CLASSES)[:, None]
    plain, flipped = plain + hint, flipped + hint
    summary = summarise(Predictions(labels, plain, flipped), COUNTS)
    assert list(summary) == ["plain", "flip"]
    for name, logits in (("plain", plain.numpy()), ("flip", (plain.numpy() + flipped.numpy()) / 2)):
        part = summary[name]
        assert part.keys() == {"ensemble", "experts", "expert_mean", "expert_best"}
        experts = [score(torch.tensor(logits[:, k]), labels, COUNTS) for k in range(EXPERTS)]
        assert part["experts"] == experts
        ensemble = score(torch.tensor(sum(logits[:, k] for k in range(EXPERTS)) / EXPERTS), labels, COUNTS)
        assert part["ensemble"] == pytest.approx(ensemble, abs=1e-5)
        for key in ("top1", "many", "medium", "few", "ece"):
            assert part["expert_mean"][key] == pytest.approx(sum(expert[key] for expert in experts) / EXPERTS)
        assert ensemble["top1"] > part["expert_mean"]["top1"]
        assert part["expert_best"] in experts
        assert part["expert_best"]["top1"] == max(expert["top1"] for expert in experts)


def test_empty_group_stays_none_and_is_printed():
    logits = [[[5.0, 0], [0, 1.0]], [[0, 5.0], [0, 1.0]]]
    summary = summarise(predictions_of(logits, logits, [0, 1]), [500, 200])
    for part in summary.values():
        for row in (part["ensemble"], *part["experts"], part["expert_mean"]):
            assert row["many"] is not None
            assert row["medium"] is row["few"] is None
    lines = format_table(summary["plain"]).splitlines()
    assert lines[0].split() == ["top1", "balanced", "macro_f1", "many", "medium", "few", "ece"]
    assert [line.split()[:-1] for line in lines[1:]] == [
        ["ensemble", "100.0", "100.0", "100.0", "100.0", "none", "none"],
        ["expert", "0", "100.0", "100.0", "100.0", "100.0", "none", "none"],
        ["expert", "1", "50.0", "50.0", "33.3", "50.0", "none", "none"],
    ]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_logits_that_carry_a_uniform_prior_are_moved_to_that_of_the_training_set():
    counts, labels = [60, 30, 10], torch.tensor([0, 1, 2, 0])
    logits = torch.randn(4, 2, 3)
    predictions = Predictions(labels, logits, logits.roll(1, 0))
    moved = score_for_training_prior(predictions, counts, torch.ones(3))
    for name, found in (("plain", logits), ("flip", (logits + logits.roll(1, 0)) / 2)):
        probabilities = found.mean(1).softmax(-1) * torch.tensor([0.6, 0.3, 0.1])
        assert moved[name] == pytest.approx(score(probabilities.log(), labels, counts), abs=1e-6)
    same = score_for_training_prior(predictions, counts, torch.tensor(counts))
    assert same["plain"] == pytest.approx(score(logits.mean(1), labels, counts), abs=1e-6)


def test_table_of_a_single_expert_has_one_row():
    logits = [[[5.0, 0]]]
    summary = summarise(predictions_of(logits, logits, [1]), [500, 3])
    _, row = format_table(summary["plain"]).splitlines()
    assert row.split()[:-1] == ["expert", "0", "0.0", "0.0", "0.0", "none", "none", "0.0"]


class FeatureModel(PixelModel):
    def forward(self, pixel_values, output_features=False):
        output = super().forward(pixel_values)
        output.features = pixel_values[:, :, 0, :2].double() if output_features else None  # [B, K = 3, D = 2]
        return output


def test_features_are_those_of_the_images_as_they_are():
    model, batches = FeatureModel(), make_batches([4, 3])
    result = predict(model, batches, with_features=True)
    images = torch.cat([batch["pixel_values"] for batch in batches])
    assert_close(result.features, images[:, :, 0, :2])
    assert predict(model, batches).features is None
    assert_close(result.both_logits, (result.expert_logits + result.flipped_logits) / 2)


def test_top5_of_many_classes_is_reported():
    logits = torch.eye(8)[:, None].repeat(1, 2, 1)  # image i names class i first, then 0, 1, 2, ...
    logits -= torch.arange(8) / 100
    labels = torch.tensor([0, 1, 2, 3, 3, 4, 7, 7])  # second choice of images 4 and 5: classes 0, 1, 2, 3, 4 follow
    summary = summarise(Predictions(labels, logits, logits), [50] * 8)["plain"]
    assert summary["ensemble"]["top1"] == 5 / 8
    assert summary["ensemble"]["top5"] == pytest.approx(6 / 8)  # image 5's five are 5, 0, 1, 2, 3; image 6's lack 7


def test_speed_leaves_the_model_as_it_was():
    model = PixelModel().train()
    statistics = model.norm.running_mean.clone()
    assert measure_speed(model, torch.randn(4, 3, SIDE, SIDE), repeats=2) > 0
    assert model.modes == [False] * 3
    assert model.training
    assert torch.equal(model.norm.running_mean, statistics)
