"""Names that others chose, of classes and files, as they can be shown: in a terminal, a figure, a card.

A name may hold anything: commands for the terminal, marks that turn the direction of writing, Markdown, HTML.
"""

import html
import re
import unicodedata
from collections.abc import Sequence

SHOWN, ON_PAGES = 80, 200
"""Characters of a name that are shown; on pages titles of papers and names of repositories have a place, too."""

JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Hindi and emoji need."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str, most: int = SHOWN) -> str:
    """A name on one line, without characters that do something or can't be encoded; a long one loses its middle."""
    shown = "".join(map(_shown, " ".join(text.split())))
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[len(shown) - (most - most // 2) :]}"


def _shown(character: str) -> str:
    if character.isascii():
        return character if character.isprintable() else REPLACEMENT
    # Control, format, surrogate, private use, unassigned; separators of lines and paragraphs
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return REPLACEMENT if hidden and character not in JOINERS else character


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first of several names, each of them `printable`."""
    return ", ".join(map(printable, names[:most])) + (", ..." if len(names) > most else "")


def visible(text: str) -> str:
    """A text of several lines in which names may stand, as it is but for characters that do something."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def readable(text: str, most: int = 4000) -> str:
    """A message of several lines in which names may stand: each line is `printable`, but as long as it is."""
    lines = [printable(line, most) if line.strip() else "" for line in text.split("\n")]
    return "\n".join(lines) if sum(map(len, lines)) <= most else "\n".join(lines)[: most - 1] + "…"


def in_markdown(text: str) -> str:
    """A name as plain text of a Markdown page, also within a table; no mark, link or tag comes out of it."""
    marks = re.sub(r"([\\`*_\[\]#!|~$])", r"\\\1", html.escape(printable(text, ON_PAGES), quote=False))
    return marks.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def in_code(text: str) -> str:
    """A name for a Markdown code span, whose end it can't be."""
    return printable(text, ON_PAGES).replace("`", "'").replace("|", "/")


def fenced(text: str, language: str) -> str:
    """A text of several lines as a Markdown block of code, whose end none of its lines can be."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def in_spreadsheet(text: str) -> str:
    """Text for a cell of a CSV file; what a spreadsheet would compute gets an apostrophe in front, but for numbers."""
    text = text.replace("\r", "\n")  # for which the csv module sets no quotation marks: the rest would be a new row
    number = re.fullmatch(r"[-+]?([\d.]+( ± [\d.]+)?)?", text)  # or a dash alone
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) and not number else text
