"""Fonts for names in any script: those of this machine, by the characters that they have."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEFAULT = "DejaVu Sans"
"""The font that comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic."""


@cache
def _characters(file: str) -> frozenset[int]:
    """The characters that a font file has; none if it can't be read, as fonts of coloured emoji."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def find_fonts(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have characters which the default font lacks, and those characters that no font here has.

    Upright fonts without serifs come first.
    """
    families, left = [], {ord(character) for character in missing}

    def order(font: font_manager.FontEntry) -> tuple:
        return font.style != "normal", "sans" not in font.name.lower(), font.weight != 400, font.name, font.fname

    for font in sorted(font_manager.fontManager.ttflist, key=order):
        if not left:
            break
        if "Last Resort" in font.name:  # comes with matplotlib, and has a box for each character
            continue
        if font.name not in families and (found := left & _characters(font.fname)):
            families.append(font.name)
            left -= found
    return tuple(families), frozenset(map(chr, left))


@contextmanager
def fonts_for(texts: Sequence[str]) -> Iterator[frozenset[str]]:
    """Within, figures are drawn with fonts that have the characters of these texts.

    Yields:
        The characters that no font of this machine has.
    """
    default = _characters(font_manager.findfont(DEFAULT))
    missing = frozenset(character for text in texts for character in text if ord(character) not in default)
    families, lost = find_fonts(missing) if missing else ((), frozenset())
    with matplotlib.rc_context({"font.family": [DEFAULT, *families]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing", UserWarning)  # once in a sentence of the caller's
        yield lost


def drawable(names: Sequence[str], lost: frozenset[str], what: str = "class") -> list[str]:
    """The names; one with a lost character becomes its position, as in `class 12`."""
    return [f"{what} {place}" if lost & set(name) else name for place, name in enumerate(names)]
