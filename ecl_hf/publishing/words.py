"""How cards, leaderboards and configurations speak of a run's pictures, from the section `data` of its recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def data_name(data: Mapping[str, Any], dataset: str | None = None) -> str:
    """What the pictures are called: by the name that is given, a published list, their folder, or their repository.

    Of a folder's path only the last part is told: those above it are nobody's business.
    """
    published_list = "/" not in data["source"] and data["source"] != "digits"  # such as imagenet_lt, over any folder
    return dataset or (last_name(data["path"]) if data["path"] and not published_list else data["source"])


def last_name(path: str) -> str:
    """A path without the folders above."""
    return Path(path).resolve().name or "local pictures"


def tested_part(data: Mapping[str, Any]) -> str:
    """Which of the pictures are the test pictures."""
    if data.get("test_fraction"):
        return f"a held-out part of the split {data['train_split']}"
    return f"the split {data['test_split']}"


def tested_epoch(results: Mapping[str, Any]) -> str:
    """After which epoch the published model was taken, from the content of `results.json`."""
    chosen = results["recipe"].get("data", {}).get("val_fraction") and results.get("finished", True)
    return "the epoch that was the best on validation pictures" if chosen else "the last epoch"
