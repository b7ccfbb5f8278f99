"""Names that fit, and fonts that have their characters."""

import warnings

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from ecl_hf.evidence.plots import fonts
from ecl_hf.evidence.plots.style import columns_of, short, short_names


@pytest.mark.parametrize(
    ("text", "columns"), [("abc", 3), ("\u6d6e\u6e38", 4), ("e\u0301", 1), ("\ud55c", 2), ("\u05e4\u05dc", 2), ("", 0)]
)
def test_columns(text, columns):
    assert columns_of(text) == columns


@pytest.mark.parametrize("name", ["abcdefghijklmnopqrstuvwxyz", "\u6d6e" * 20, "a\u6d6e" * 10, "abc"])
@pytest.mark.parametrize("most", [5, 8, 18])
def test_short_names_keep_both_ends_and_fit(name, most):
    cut = short(name, most)
    assert columns_of(cut) <= most
    assert name.startswith(cut.partition("…")[0])
    assert name.endswith(cut.rpartition("…")[2])
    assert (cut == name) == (columns_of(name) <= most)


def test_names_that_would_become_the_same_stay_apart():
    names = ["x" * 9 + "middle" + "y" * 12, "x" * 9 + "centre" + "y" * 12, "z", "_legend"]
    cut = short_names(names)
    assert len(set(cut)) == 4
    assert [cut[0][:3], cut[1][:3], *cut[2:]] == ["0: ", "1: ", "z", " _legend"]


def test_fonts_are_found_by_their_characters(monkeypatch):
    sign = "\u6d6e"
    entry = font_manager.FontEntry(fname="/made/up.ttf", name="Made Up Sans", style="normal", weight=400)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [entry, *font_manager.fontManager.ttflist])
    own = fonts._characters
    monkeypatch.setattr(fonts, "_characters", lambda file: {ord(sign)} if "made" in file else own(file))
    fonts.find_fonts.cache_clear()
    with fonts.fonts_for([sign, "plain"]) as lost:
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "Made Up Sans"]
        assert not lost
    fonts.find_fonts.cache_clear()


def test_what_no_font_has_is_drawn_as_a_number_without_warnings(tmp_path):
    sign = "\U00013000"  # a hieroglyph
    names = ["plain", f"a{sign}", "ok"]
    with fonts.fonts_for(names) as lost, warnings.catch_warnings():
        assert lost <= {sign}
        assert fonts.drawable(names, frozenset(sign)) == ["plain", "class 1", "ok"]
        figure = Figure()
        figure.suptitle(names[1])
        figure.savefig(tmp_path / "figure.png")
