"""CMO's boxes against its published code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.data.samplers import Draw
from ecl_hf.learning.task import CollaborativeTask, mean_loss
from ecl_hf.losses import log_class_prior
from ecl_hf.methods import METHODS, TaskOutputs
from ecl_hf.methods.base import MixingContext, Time
from ecl_hf.methods.cmo import (
    REWEIGHTED,
    CMOSettings,
    ReweightedSettings,
    background_share,
    paste_partners,
    pasted_box,
)


def test_published_boxes(published):
    """The code's x runs along the rows, and so does its centre's."""
    for size, share, row, column, top, left, bottom, right, adjusted in published("features_and_teachers/cmo")["boxes"]:
        side = int(size)
        box = pasted_box(side, side, share, int(row), int(column))
        assert box == (slice(int(top), int(bottom)), slice(int(left), int(right)))
        assert background_share(side, side, box) == pytest.approx(adjusted, abs=1e-12)


def test_box_of_an_oblong_picture():
    box = pasted_box(20, 40, 0.75, 10, 38)
    assert box == (slice(5, 15), slice(28, 40))
    assert background_share(20, 40, box) == 1 - 120 / 800
    assert background_share(20, 40, pasted_box(20, 40, 1.0, 3, 4)) == 1


@pytest.mark.parametrize(("size", "expected"), [(32, 0.30), (224, 0.32)])
def test_mean_area(size, expected):
    draw = np.random.RandomState(0)
    shares = [
        background_share(size, size, pasted_box(size, size, draw.beta(1, 1), *draw.randint(size, size=2)))
        for _ in range(4000)
    ]
    assert 1 - np.mean(shares) == pytest.approx(expected, abs=0.015)


def pasted(time, seed=0, **settings):
    """What becomes of a white batch with black partners."""
    context = MixingContext(
        CMOSettings(**settings), time, torch.Generator().manual_seed(seed), None, torch.tensor([9, 1])
    )
    batch = {
        "pixel_values": torch.ones(5, 3, 16, 16),
        "labels": torch.zeros(5, dtype=torch.long),
        "partner_pixel_values": torch.zeros(5, 3, 16, 16),
        "partner_labels": torch.ones(5, dtype=torch.long),
    }
    return paste_partners(batch, context)


def test_labels_share_by_area():
    shares = []
    for seed in range(40):
        batch = pasted(Time(5, 20), seed, mixed_batches=1.0)
        assert batch.keys() == {"pixel_values", "labels", "mixed_labels", "share"}
        shares.append(batch["share"].item())
        assert batch["pixel_values"].flatten(1).mean(1).tolist() == pytest.approx([shares[-1]] * 5)
        assert (batch["pixel_values"] == batch["pixel_values"][0, 0]).all()  # one box for all
        assert batch["mixed_labels"].all()
    assert len({*shares}) > 20


@pytest.mark.parametrize(("epoch", "mixes"), [(0, False), (3, False), (4, True), (16, True), (17, False), (19, False)])
def test_first_and_last_epochs_are_not_mixed(epoch, mixes):
    batch = pasted(Time(epoch, 20), mixed_batches=1.0)
    assert ("share" in batch) == mixes
    assert not any(name.startswith("partner_") for name in batch)


def test_half_of_the_batches_are_mixed():
    mixed = ["share" in pasted(Time(5, 20), seed) for seed in range(400)]
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.08)


def test_second_stream_has_the_published_class_masses(published):
    """The code's sampler weighs pictures; a draw's class follows from their sums."""
    values = published("features_and_teachers/cmo")
    counts, labels = values["counts"].astype(float), values["targets"]
    for power in (0.5, 1.0, 2.0):
        masses = np.bincount(labels, values[f"sample_weights_alpha{power:g}"])
        stage = METHODS["cmo"].stages[0]
        drawn = stage.partners(Draw(0, 0, labels, settings=ReweightedSettings(power=power), stream=1))
        assert len(drawn) == values[f"num_samples_alpha{power:g}"]
        shares = np.bincount(labels[drawn], minlength=len(counts)) / len(drawn)
        assert shares == pytest.approx(masses / masses.sum(), abs=6 * (masses.max() / masses.sum() / len(drawn)) ** 0.5)


def test_published_weights_of_the_last_epochs(published):
    counts = torch.from_numpy(published("features_and_teachers/cmo")["counts"]).double()
    out = TaskOutputs(torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, len(counts)), None, None, counts.log())
    settings = ReweightedSettings()
    for epoch, weighted in ((159, False), (160, True)):
        loss = REWEIGHTED.loss(replace(out, time=Time(epoch, 200)), settings)
        assert (loss.class_weights is not None) == weighted
    expected = torch.from_numpy(published("features_and_teachers/cmo")["drw_class_weights"])
    assert_close(loss.class_weights, expected, rtol=1e-5, atol=0)


def test_published_mixed_loss(published):
    """Balanced softmax of both labels, shared by the background's area."""
    values = {key: torch.from_numpy(value) for key, value in published("features_and_teachers/cmo").items()}
    logits = values["mix_logits"].requires_grad_()
    shift = log_class_prior(values["counts"].double())
    labels = values["mix_background_labels"], values["mix_patch_labels"]
    share = values["mix_lam"]
    out = TaskOutputs(labels[0], logits[None], None, shift, values["counts"].double().log())
    term = METHODS["cmo_bc"].stages[0].terms[0]
    loss = sum(
        mean_loss(term.loss(replace(out, labels=y), CMOSettings()), y, s)
        for y, s in zip(labels, (share, 1 - share), strict=True)
    )
    assert_close(loss, values["mix_loss"], rtol=1e-7, atol=0)
    assert_close(torch.autograd.grad(loss, logits)[0], values["mix_grad_logits"], rtol=1e-6, atol=1e-9)


def test_ride_loss_of_mixed_pictures_is_linear_in_the_label_and_pushes_once():
    config = ECLConfig(architecture="resnet20_cifar", num_labels=3, class_counts=[9, 4, 2], classifier="cosine")
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["cmo_ride"]).train()
    task.time = Time(9, 10)  # weights and class temperatures have set in
    pixels, labels, others = torch.randn(6, 3, 8, 8), torch.tensor([0, 0, 1, 2, 0, 1]), torch.tensor([1, 0, 2, 2, 0, 2])
    background, patch = task(pixels, labels), task(pixels, others)
    mixed = task(pixels, labels, mixed_labels=others, share=torch.tensor(0.3))
    assert_close(mixed["loss"], 0.3 * background["loss"] + 0.7 * patch["loss"])
    assert_close(mixed["terms"]["diversity"], background["terms"]["diversity"])
    assert background["terms"]["diversity"] > 0
    assert background["loss"] != patch["loss"]
