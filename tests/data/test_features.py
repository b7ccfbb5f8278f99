"""Batches of kept features."""

import datasets
import numpy as np
import pytest
import torch

from ecl_hf.data import features
from ecl_hf.data.features import FeatureDataset, digest_pictures, feature_loader
from ecl_hf.data.folders import pictures
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


def test_next_picture_of_the_class_takes_the_place_of_a_broken_one():
    there = torch.ones(12, dtype=torch.bool)
    there[[3, 4, 11]] = False
    [batch] = feature_loader(dataset(there), 12)
    used = dict(zip(batch["indices"].tolist(), (batch["pixel_values"][:, 0] % 100).tolist(), strict=True))
    assert (used[3], used[4], used[11], used[6]) == (6, 7, 2, 6)
    assert batch["labels"].bincount().tolist() == [4, 4, 4]
    assert torch.equal(batch["labels"].float(), batch["pixel_values"][:, 0] % 100 % 3)
    there[1::3] = False  # the whole class 1
    [batch] = feature_loader(dataset(there), 12)
    used = dict(zip(batch["indices"].tolist(), (batch["pixel_values"][:, 0] % 100).tolist(), strict=True))
    assert (used[1], used[7], used[10]) == (2, 8, 0)
    assert torch.equal(batch["labels"].float(), batch["pixel_values"][:, 0] % 100 % 3)
    with pytest.raises(ValueError, match="none of the 12"):
        dataset(torch.zeros(12, dtype=torch.bool))


def folder(root, contents=(b"ab", b"cd", b"ef", b"gh")):
    """Two classes of two pictures each."""
    files = [root / f"c{n // 2}" / f"{n}.png" for n in range(4)]
    for file, content in zip(files, contents, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return pictures([str(file) for file in files], np.arange(4) // 2, ["c0", "c1"])


def table(contents=(b"ab", b"cd", b"ef", b"gh")):
    columns = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0, 0, 1, 1]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_pictures_are_known_again_in_another_place(tmp_path, monkeypatch):
    whole = digest_pictures(folder(tmp_path / "a" / "here"))
    assert digest_pictures(folder(tmp_path / "b" / "there")) == whole
    monkeypatch.chdir(tmp_path / "a")
    assert digest_pictures(folder((tmp_path / "a" / "here").relative_to(tmp_path / "a"))) == whole
    assert digest_pictures(table()) == digest_pictures(table())


@pytest.mark.parametrize("make", [folder, lambda _, *contents: table(*contents)], ids=["folder", "table"])
def test_other_pictures_of_the_same_labels_are_told_apart(make, tmp_path):
    whole = make(tmp_path / "whole")
    replaced = make(tmp_path / "replaced", (b"ab", b"cd", b"XY", b"gh"))
    longer = make(tmp_path / "longer", (b"ab", b"cd", b"efg", b"gh"))
    sets = [whole, replaced, longer, *(whole.select(rows) for rows in ([0, 2], [1, 2], [2, 0], [1, 0, 2, 3]))]
    assert len({digest_pictures(each) for each in sets}) == len(sets)


def test_of_a_large_set_names_and_sizes_of_all_count_and_some_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MOST_READ", 1)
    contents = [b"ab", b"cd", b"ef", b"gh"]
    whole, same = digest_pictures(folder(tmp_path / "whole", contents)), []
    for n in range(4):
        other = [*contents[:n], b"XY", *contents[n + 1 :]]
        same.append(digest_pictures(folder(tmp_path / "other", other)) == whole)
        other[n] += b"Z"
        assert digest_pictures(folder(tmp_path / "longer", other)) != whole
    assert sorted(same) == [False, True, True, True]


def test_files_that_are_not_there_don_t_stand_in_the_way(tmp_path):
    whole = folder(tmp_path)
    before = digest_pictures(whole)
    (tmp_path / "c0" / "1.png").unlink()
    assert digest_pictures(whole) != before
    assert digest_pictures(table([None] * 4)) != digest_pictures(table())
