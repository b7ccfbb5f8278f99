"""What the tests of scripts share."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def quickly_drawn_cards(request, monkeypatch):
    """Cards of the hundreds of trainings here get an empty picture: drawing the true one takes a third of a second."""
    if request.path.name != "test_report.py":
        blank = Figure(figsize=(1, 1))
        monkeypatch.setattr("ecl_hf.evidence.plots.plot_class_histogram", lambda *_: blank)
