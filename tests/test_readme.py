"""The README says what the code and the committed results say."""

import csv
import re
from pathlib import Path

import pytest

from ecl_hf.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_measured_rows_are_those_of_the_results():
    table = (ROOT / "training/results/cifar10_lt_small/table.md").read_text().splitlines()
    header = next(line for line in table if line.startswith("| method | model |"))
    lines = README.splitlines()
    first = lines.index(header) + 2
    rows = lines[first : lines.index("", first)]
    assert len(rows) > 5
    assert set(rows) < set(table)


def test_every_method_is_described():
    described = set(re.findall(r"`([a-z_]+)`", README))
    assert METHODS.keys() <= described


@pytest.mark.parametrize("name", sorted(set(re.findall(r"training/(?:recipes/)?\w+\.(?:yaml|py)", README))))
def test_named_files_exist(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize(
    ("name", "begin", "only"),
    [("table3", "| method | BKT |", {}), ("shared_stages", "| method | top1 |", {"model": "ensemble", "flip": "yes"})],
)
def test_rows_of_tables_are_those_of_the_results(name, begin, only):
    with (ROOT / f"training/results/cifar10_lt_small/{name}.csv").open(newline="") as file:
        measured = [row for row in csv.DictReader(file) if only.items() <= row.items()]
    lines = README.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(begin))
    columns = lines[first].strip("| ").split(" | ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first + 2 : lines.index("", first)]]
    assert rows == [[row[column] for column in columns] for row in measured]
