"""What scripts say: it does nothing to a terminal, and output that can't be written ends no training."""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ecl_hf.names import readable, visible

PACKAGE = Path(__file__).parent

UP = "\x1b[A"
"""Moves the cursor up a line, as progress bars do that stand above each other."""


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Around a script's `main`: what it prints is `visible`, and goes on when nobody can take it.

    A reader that has gone (`| head`) is no error. Where the disk is full, say, the script comes to its end, and then
    says that not all of its output was written. A warning of this package is a sentence, without the line of code.
    """
    formatted = warnings.formatwarning
    warnings.formatwarning = functools.partial(_sentence, formatted)
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr, bars=True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    except SystemExit as end:
        if isinstance(end.code, str):
            end.code = readable(end.code)
        raise
    finally:
        warnings.formatwarning = formatted
        out.settle()
        err.settle()
    if out.error and not isinstance(out.error, BrokenPipeError):
        sys.exit(f"error: not all output could be written: {out.error}; the files that were written are whole")


@contextlib.contextmanager
def refusing(advice: str = "") -> Iterator[None]:
    """End the program with one sentence about input that does not fit, or about a package that is not there."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}{advice}")


def _sentence(others: Callable[..., str], message: object, category: type, filename: str, *where: Any) -> str:
    if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
        return f"warning: {message}\n"
    return others(message, category, filename, *where)


class LastingStream:
    """A stream whose writing never fails; what has no place in it is left out.

    Args:
        stream: to write to; None, as for a program without a terminal, takes nothing.
        bars: whether progress bars are drawn on it.
    """

    def __init__(self, stream: TextIO | None, bars: bool = False) -> None:
        self.stream = stream
        self.bars = bars
        self.error: OSError | ValueError | None = None
        """Why something could not be written; None if all was."""

    def write(self, text: str) -> int:
        """Write what is `visible` of a text, if that is possible; an encoding without a character gets `?`."""
        if not (self.bars and not text.replace(UP, "").strip("\n")):
            start = "\r" if self.bars and text.startswith("\r") else ""
            text = start + visible(text.removeprefix(start))
        if self.stream is not None:
            self._try(self._write, text)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.stream.write(text.encode(encoding, "replace").decode(encoding))

    def flush(self) -> None:
        """Bring what was written to its place, if that is possible."""
        if self.stream is not None:
            self._try(self.stream.flush)

    def settle(self) -> None:
        """Flush for the last time; what has no place is thrown away, or the interpreter would fail at its own end."""
        failed, self.error = self.error, None
        self.flush()
        if self.error:
            with contextlib.suppress(OSError, ValueError):  # not a file, or closed
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
        self.error = failed or self.error

    def _try(self, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: of a closed file
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
