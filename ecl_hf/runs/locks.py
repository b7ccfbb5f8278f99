"""One training to a run folder."""

import fcntl
import json
import os
import socket
import stat
from pathlib import Path


class FolderLock:
    """A file in a folder that one process holds; it says which one, for the others' message.

    The operating system releases it when the process ends, however that happens, so that no lock is ever left behind: a
    file without a holder is taken over. It reaches as far as POSIX locks do, which is all machines of an NFS or Lustre
    directory; where a file system has no locks, there is no protection.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; FileExistsError names host and process of its holder."""
        while self._descriptor is None:
            descriptor = self._open()
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.read(descriptor, 1000).decode(errors="replace").strip()
                os.close(descriptor)
                raise FileExistsError(
                    f"{self.file.parent} is written by another training ({holder}); if the two were meant to be one, "
                    "they were launched without a connection"
                ) from None
            except OSError:  # the file system has no locks
                os.close(descriptor)
                self.file.unlink(missing_ok=True)
                return
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # its holder deleted it between the two calls
                os.close(descriptor)
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())

    def _open(self) -> int:
        """Open the file itself: a link could lead to one that is precious."""
        try:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if self.file.is_symlink() or self.file.is_dir():
                raise FileExistsError(f"{self.file} is no lock but a link or directory; remove it") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileExistsError(f"{self.file} is no regular file; remove it")
        return descriptor

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is not None:
            self.file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False
