"""What ends a training before its last step, and the one sentence that it leaves."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

STOPPED = 75
"""Exit code of a training that was asked to stop and can go on with --resume (EX_TEMPFAIL of sysexits.h)."""

PATIENCE = 2.0
"""Seconds within which a second signal is taken for the first one: terminals and launchers both send it."""


class StopRequest:
    """Within this context SIGTERM and Ctrl-C end the program with the exit code `STOPPED`.

    While `deferred` is true, they only set `asked`, for a loop that ends after its running step; a second Ctrl-C does
    not wait for that.
    """

    def __init__(self) -> None:
        self.asked = False
        self.deferred = False
        self._at_once = False
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._at_once:  # not in the handler, which may have interrupted another writer
            sys.stderr.write("stopped; --resume goes on from the last checkpoint, if there is one\n")

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        impatient = number == signal.SIGINT and time.monotonic() - self._since > PATIENCE
        if impatient or not self.deferred:
            self._at_once = True
            sys.exit(STOPPED)


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with one sentence when the disk, the numbers, a data worker or another process fails.

    What went wrong in all processes alike is said by the first one only. The sentence has a line of its own, below that
    of a progress bar.
    """
    try:
        yield
    except FloatingPointError as error:
        sys.exit(f"\nerror: {error}" if int(os.environ.get("RANK", "0")) == 0 else 1)
    except OSError as error:
        sys.exit(f"\nerror: {describe(error)}; what was saved before is kept, continue with --resume")
    except RuntimeError as error:
        if sentence := explain(error):
            sys.exit(f"\nerror: {sentence}; continue with --resume")
        raise


def describe(error: OSError) -> str:
    """An error of the file system as a person would say it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{f': {error.filename}' if error.filename else ''}"
    return str(error)


def explain(error: RuntimeError) -> str | None:
    """What an error of PyTorch means, if a data worker or another process is its cause; else None."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"a data-loading process was killed, perhaps for lack of memory ({text.splitlines()[0]})"
    if isinstance(error, torch.distributed.DistError) or any(
        name in text for name in ("gloo", "NCCL", "closed by peer")
    ):
        return "another process of this training has ended or does not answer; what it says comes first"
    return None


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Errors of serialisers, which are of all kinds, as an OSError that names what was being written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"can't write {what}: {describe(error)}") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and explain(error):
            raise
        full = "os error 28" in str(error) or "file write failed" in str(error)
        raise OSError(f"can't write {what}: {'the disk is full' if full else error}") from error
