"""One writer at a time for a folder; a lock whose owner died is free again."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from captum_concepts.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows, where every file system has locks
    fcntl = None  # type: ignore[assignment]

_NOTE = "process "
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class FolderLock:
    """Hold a folder for writing (a context manager).

    The operating system keeps the lock (``filelock``) and drops it when the process ends, however it ends. So a file
    left by a killed process never blocks, and no age has to be guessed. On a file system without locks the existence of
    the file is the lock, and the file of a process of this machine that is gone does not count.

    Args:
        path: the folder; it is created if it is missing.
        what: how the message calls it.
        name: of the lock, where parts of a folder are locked apart.
        wait: seconds to wait for another holder.

    Raises:
        ArtifactError: on entering, another process (or thread) holds the folder; or the lock is a link or foreign.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with FolderLock(folder), FolderLock(folder):  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
        ...
        captum_concepts.errors.ArtifactError: the folder ... is being written by process ... on ...; wait ...
    """

    def __init__(self, path: str | Path, what: str = "the folder", *, name: str = "lock", wait: float = 0) -> None:
        self.path = Path(path)
        self.what = what
        self._file = self.path / f".{name}"
        self._wait = wait
        # Not at once: another process that only looks whether this one holds it gets in the way for a moment.
        self._lock = FileLock(self._file, timeout=max(wait, 0.1), thread_local=False)

    def __enter__(self) -> FolderLock:
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_own()
        end = time.monotonic() + self._wait
        while (created := self._created_without_locks()) is None:  # somebody's, who may be dead
            if not self._holder_is_dead() and time.monotonic() >= end:
                raise ArtifactError(
                    f"{self._message()}. This file system has no locks, so the file of a killed process stays: if none "
                    f"writes there, remove {self._file}"
                )
            time.sleep(0.1)
        if not created:
            try:
                self._lock.acquire()
            except Timeout:
                raise ArtifactError(f"{self._message()}; wait for it to end, or write elsewhere") from None
        with contextlib.suppress(OSError):  # a full disk: the note is a courtesy, the lock is held
            file = os.open(self._file, os.O_WRONLY | os.O_TRUNC | _NO_LINKS)
            with os.fdopen(file, "w", encoding="utf-8") as note:
                note.write(f"{_NOTE}{os.getpid()} on {socket.gethostname()}")
        return self

    def _check_own(self) -> None:
        """Refuse a file that no lock has made: taking it would empty it, or what a link points to."""
        try:
            there = self._file.lstat()
        except FileNotFoundError:
            return
        own = stat.S_ISREG(there.st_mode) and there.st_nlink <= 1 and there.st_size < 1000
        if not own or self._note()[: len(_NOTE)] not in ("", _NOTE):
            raise ArtifactError(f"{self._file} is not a lock of this package; nothing was changed, move it away")

    def _created_without_locks(self) -> bool | None:
        """False where the file system has locks. Where it has none, the file itself is the lock: True if it was
        created here, None if it was there."""
        if fcntl is None:
            return False
        try:
            file, created = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o666), True
        except FileExistsError:
            try:
                file, created = os.open(self._file, os.O_RDONLY | _NO_LINKS), False
            except FileNotFoundError:  # removed in between
                return self._created_without_locks()
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return True if created else None
        finally:
            os.close(file)
        return False

    def _holder_is_dead(self) -> bool:
        """Whether the file names a process of this machine that is gone; then the file is removed."""
        found = re.fullmatch(rf"{_NOTE}(\d{{1,9}}) on (.*)", self._note())
        if found is None or found[2] != socket.gethostname():
            return False
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            self._file.unlink(missing_ok=True)
            return True
        except OSError:
            pass
        return False

    def _message(self) -> str:
        return f"{self.what} {self.path} is being written by {self._note() or 'another process'}"

    def _note(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8", errors="replace")[:200]
        except OSError:
            return ""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # While it is held: whoever takes the lock of a removed file and whoever creates a new one write the same bytes.
        with contextlib.suppress(OSError):  # the folder may not be writable any more
            self._file.unlink(missing_ok=True)
        self._lock.release()
