"""Checkpoints that are whole or do not count: sealed with checksums, published by renaming.

They are meant for the run folder that they were written in. What is in them is read by `safetensors`, `json` and
Accelerate's `torch.load(weights_only=True)`, which runs no code of a file; a stranger's could still hold any weights.
"""

import shutil
from pathlib import Path

from ecl_hf.files import CHECKSUMS, find_damaged, read_checksums, synchronise, write_checksums

MOST = 1 << 34
"""Bytes of a checkpoint's files, where nobody knows better: a sparse file may claim more than any disk has."""


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files and bring everything to the disk."""
    write_checksums(folder, list(folder.iterdir()))
    synchronise_folder(folder)


def synchronise_folder(folder: Path) -> None:
    """Bring a folder and all in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        synchronise(path)


def find_defect(folder: Path, most: int = MOST) -> str | None:
    """What is wrong with a sealed folder; None if every file is as it was written.

    Args:
        folder: of a checkpoint.
        most: bytes that its files may have in all.
    """
    try:
        expected = read_checksums(folder / CHECKSUMS).keys()
        found = {file.name for file in folder.iterdir()} - {CHECKSUMS}
        if missing := sorted(expected - found):
            return f"{missing[0]} is missing"
        if unknown := sorted(found - expected):
            return f"{unknown[0]} is not among its checksums"
        damaged = find_damaged(folder, most)
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError) as error:
        return f"it can't be read: {error}"
    return damaged and f"{damaged} is damaged"


def publish(partial: Path, target: Path) -> None:
    """Seal a folder and give it its name, also if another one has it; under that name is never a part of one."""
    seal(partial)
    discard(target)
    partial.rename(target)
    synchronise(target.parent)


def discard(folder: Path) -> None:
    """Delete a folder, which is gone for readers before the first of its files is; of a link, the link alone."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleted.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in a folder."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
