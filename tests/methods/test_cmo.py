"""CMO's boxes against its published code."""

import numpy as np
import pytest

from ecl_hf.methods.cmo import background_share, pasted_box


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
