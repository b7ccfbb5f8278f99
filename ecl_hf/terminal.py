"""What scripts say: one sentence about input that does not fit; output that can't be written ends no training."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from ecl_hf.names import readable


@contextlib.contextmanager
def refusing(advice: str = "") -> Iterator[None]:
    """End the program with one sentence about input that does not fit, or about a package that is not there."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {readable(str(error))}{advice}")


class LastingStream:
    """A stream that goes on when its reader is gone or its disk is full: from then on, nothing is written."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        """Bring what was written to its place, if that is possible."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        if not self.broken:
            try:
                return action(*arguments)
            except (OSError, ValueError):  # a closed file
                self.broken = True
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
