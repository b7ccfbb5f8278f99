"""Files that may be a stranger's: only regular ones are opened, of a bounded size, and errors name them."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUMS = "SHA256SUMS"
"""File with the checksums of those beside it, as `sha256sum --check` reads them."""

MAX_TEXT = 1 << 26
"""Bytes of a text file, where nobody knows better."""


@contextmanager
def opening(path: str | Path, most: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a link may lead to it.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it can't be opened.
        ValueError: it is a directory, pipe, device or socket, or larger; the message names it.
    """
    # Without O_NONBLOCK the opening of a pipe that nobody writes to would wait for ever
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # before a file is made of it, whose error would not name a directory
            raise ValueError(f"{path} is no regular file")
        if most is not None and found.st_size > most:
            raise ValueError(f"{path} has {found.st_size} bytes; more than {most} are not read")
    except ValueError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def check_regular(path: str | Path) -> None:
    """Refuse what `opening` refuses, before a library opens it."""
    with opening(path):
        pass


def read_bytes(path: str | Path, most: int) -> bytes:
    """Content of a regular file of at most so many bytes; errors are those of `opening`."""
    with opening(path, most) as file:
        return file.read()


def read_text(path: str | Path, most: int = MAX_TEXT) -> str:
    """Content of a UTF-8 file; ValueError names what is none, or is larger."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file in UTF-8: {error}") from error


def read_json(path: str | Path, most: int = MAX_TEXT) -> Any:
    """Content of a JSON file; ValueError names what is none, is larger, or is nested too deeply."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}") from error


def read_object(path: str | Path, most: int = MAX_TEXT) -> dict[str, Any]:
    """Content of a JSON file that holds an object; ValueError names what does not."""
    content = read_json(path, most)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object, but {type(content).__name__}")
    return content


def read_entries(path: str | Path, entries: Mapping[str, type | tuple[type, ...]], what: str) -> dict[str, Any]:
    """Content of a JSON file that holds an object with these entries, and perhaps others.

    Args:
        path: of the file.
        entries: their dotted names with their types; `object` for one that may be null.
        what: the file should be, for the message.

    Raises:
        OSError: it can't be opened.
        ValueError: it is none; the message names the file and the entry.
    """
    content = read_object(path)
    for name, kind in entries.items():
        value: Any = content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{path} is no {what}: it lacks {name}")
            value = value[key]
        if not isinstance(value, kind):
            raise ValueError(f"{path} is no {what}: {name} can't be {repr(value)[:80]}")
    return content


def checksum(path: str | Path, most: int | None = None) -> str:
    """SHA-256 of a regular file, of at most so many bytes; errors are those of `opening`."""
    digest = hashlib.sha256()
    with opening(path, most) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path, files: list[Path]) -> None:
    """List these files of a folder, but for the list itself, with their checksums in it."""
    lines = [f"{checksum(file)}  {file.name}\n" for file in sorted(files) if file.name != CHECKSUMS]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def read_checksums(path: str | Path) -> dict[str, str]:
    """Names of files beside the list, with their checksums; ValueError if it names none, or one elsewhere."""
    lines = read_text(path).splitlines()
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not found:
        raise ValueError(f"{path} is empty")
    if strange := [name for name in found if not name or Path(name).name != name]:
        raise ValueError(f"{path} names {strange[0][:80]!r}, which is no file beside it")
    return found


def find_damaged(folder: Path, most: int) -> str | None:
    """The first file of a list of checksums that is not as it was written; None if all are.

    Args:
        folder: with the list.
        most: bytes that all of them may have.

    Raises:
        OSError: one can't be opened.
        ValueError: one is no regular file, or they have more bytes; the message names it.
    """
    expected = read_checksums(folder / CHECKSUMS)
    total = sum((folder / name).stat().st_size for name in expected)
    if total > most:
        raise ValueError(f"the files of {folder} have {total} bytes; more than {most} are not read")
    return next((name for name, digest in expected.items() if checksum(folder / name, most) != digest), None)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new name beside a path to write a file under, which then takes the path's place.

    A reader sees the old or the new content, never a part. A link at the path is replaced: what it leads to may be
    precious.

    Raises:
        OSError: it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # what was left half-written, or a link
    try:
        yield temporary
        synchronise(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def synchronise(path: str | Path) -> None:
    """Wait until a file or a directory is on the disk, so that a power failure can't take it back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
