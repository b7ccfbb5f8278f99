"""The documents say what the code and the committed results say, and lead to where they point."""

import contextlib
import csv
import importlib
import io
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import ecl_hf
from ecl_hf.cli import COMMANDS, launcher
from ecl_hf.methods import METHODS
from ecl_hf.runs.recipe_files import find_recipe, recipe_folder

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "benchmarks", "ecl_hf/methods", "training", "training/results")
PAGES = {str(path.relative_to(ROOT)): path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob("*.md")}
RESULTS = PAGES["training/results/README.md"]


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", PAGES[page]):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def shell_lines(page: str) -> list[str]:
    """Commands of a page's shell blocks, without comments; continued lines as one."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.partition(" #")[0].strip() for line in lines) if line]


def known_flags(command: str) -> set[str]:
    """Flags that a command's help shows."""
    main, *more = command.split()
    script = importlib.import_module(f"ecl_hf.training.{main}")
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        script.main([*more, "--help"])
    launch = launcher().format_help() if main in ("train", "evaluate") else ""
    return set(re.findall(r"--[a-z][\w.]*", said.getvalue() + launch))


OURS = {
    line: page
    for page, text in PAGES.items()
    for line in shell_lines(text)
    if re.match(r"(ecl-hf|python training/\w+\.py) (?!--help)", line)
}


@pytest.mark.parametrize("line", OURS, ids=str)
def test_commands_exist_with_their_flags(line):
    command, *words = shlex.split(line.removeprefix("ecl-hf ").removeprefix("python training/").replace(".py ", " ", 1))
    assert command in COMMANDS
    if command in ("data", "reproduce"):
        command, words = f"{command} {words[0]}", words[1:]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert flags <= known_flags(command)
    for flag, value in pairwise(words):
        if flag == "--recipe" and value != "...":
            assert find_recipe(value if "/" not in value else ROOT / value)


def test_every_recipe_is_described():
    described = set(re.findall(r"^\| (`[^|]*`) \|", PAGES["training/README.md"], re.M))
    assert {path.stem for path in recipe_folder().glob("*.yaml")} <= set(re.findall(r"`(\w+)`", " ".join(described)))


def test_every_method_is_described():
    described = set(re.findall(r"`([a-z0-9_]+)`", PAGES["ecl_hf/methods/README.md"]))
    assert METHODS.keys() <= described


def test_version_is_the_same_everywhere():
    assert re.search(r"^## (\S+)", PAGES["CHANGELOG.md"], re.M).group(1) == ecl_hf.__version__
    assert f"\nversion: {ecl_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_measured_rows_are_those_of_the_results():
    table = (ROOT / "training/results/cifar10_lt_small_large_decay/table.md").read_text().splitlines()
    header = next(line for line in table if line.startswith("| method | model |"))
    lines = RESULTS.splitlines()
    first = lines.index(header) + 2
    rows = lines[first : lines.index("", first)]
    assert len(rows) > 5
    assert set(rows) < set(table)


@pytest.mark.parametrize(
    ("name", "begin", "only"),
    [
        ("cifar10_lt_small_large_decay/table3", "| method | BKT |", {}),
        (
            "cifar10_lt_small_large_decay/shared_stages",
            "| method | top1 | many | medium | few | ece | parameters |",
            {"model": "ensemble", "flip": "yes"},
        ),
        ("cifar10_lt_small/methods", "| method | top1 | many | medium | few | ece | device |", {}),
        ("cifar100_lt_features/methods", "| method | top1 | many | medium | few | ece | training, min |", {}),
    ],
)
def test_rows_of_tables_are_those_of_the_results(name, begin, only):
    with (ROOT / f"training/results/{name}.csv").open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if only.items() <= row.items()]
    lines = RESULTS.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(begin))
    columns = lines[first].strip("| ").split(" | ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first + 2 : lines.index("", first)]]
    assert rows == [[row[column] for column in columns] for row in measured]
