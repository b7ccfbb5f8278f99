"""Batches of kept features."""

import numpy as np
import pytest
import torch

from ecl_hf.data.features import FeatureDataset, feature_loader
from ecl_hf.data.samplers import class_balanced, instance


def dataset(there=None):
    """Picture n has the feature n in its first view and n + 100 in the second."""
    features = torch.arange(12.0)[None, :, None] + torch.tensor([0.0, 100.0])[:, None, None]
    labels = np.arange(12) % 3
    return FeatureDataset(features, labels, torch.ones(12, dtype=torch.bool) if there is None else there, seed=4)


def test_batches_are_those_of_the_sampler_in_views_that_change():
    data = dataset()
    epochs = []
    for data.epoch in (0, 1, 0):
        batches = list(feature_loader(data, 4))
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 4]
        values = torch.cat([batch["pixel_values"][:, 0] for batch in batches])
        rows = torch.cat([batch["indices"] for batch in batches])
        assert sorted(rows.tolist()) == list(range(12))
        assert torch.equal(values % 100, rows.float())
        assert torch.equal(torch.cat([batch["labels"] for batch in batches]), rows % 3)
        epochs.append(values.tolist())
    assert epochs[0] == epochs[2] != epochs[1]
    assert {value >= 100 for value in epochs[0]} == {True, False}


def test_second_stream_and_further_views():
    data = dataset()
    data.views = {"pixel_values": None, "view_0": None}
    [batch] = feature_loader(data, 12, sampler=instance, partners=class_balanced(1.0))
    assert torch.equal(batch["view_0"] % 100, batch["pixel_values"] % 100)
    assert not torch.equal(batch["view_0"], batch["pixel_values"])
    assert torch.equal(batch["partner_pixel_values"][:, 0] % 100 % 3, batch["partner_labels"].float())


def test_next_picture_takes_the_place_of_a_broken_one():
    there = torch.ones(12, dtype=torch.bool)
    there[[3, 4, 11]] = False
    [batch] = feature_loader(dataset(there), 12)
    used = dict(zip(batch["indices"].tolist(), (batch["pixel_values"][:, 0] % 100).tolist(), strict=True))
    assert (used[3], used[4], used[11], used[6]) == (5, 5, 0, 6)
    assert torch.equal(batch["labels"].float(), batch["pixel_values"][:, 0] % 100 % 3)
    with pytest.raises(ValueError, match="none of the 12"):
        dataset(torch.zeros(12, dtype=torch.bool))
