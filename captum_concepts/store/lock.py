"""A folder lock for one writer at a time, released when its owner dies."""

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
    """A context manager that locks a folder for writing.

    The operating system keeps the lock (``filelock``) and releases it when the process ends, so a file left by a killed
    process never blocks. On a file system without locks the existence of the file is the lock, and a file left by a
    dead process of this machine is ignored.

    Args:
        path: the folder; created if missing.
        what: name of the folder in the message.
        name: of the lock, if parts of a folder are locked separately.
        wait: seconds to wait for another holder.

    Raises:
        ArtifactError: on entering, another process (or thread) holds the lock, or the lock is a link or foreign.
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
        # Not zero: another process that only tests the lock holds it for a moment.
        self._lock = FileLock(self._file, timeout=max(wait, 0.1), thread_local=False)

    def __enter__(self) -> FolderLock:
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_own()
        end = time.monotonic() + self._wait
        while (created := self._created_without_locks()) is None:  # held by a process that may be dead
            if not self._holder_is_dead() and time.monotonic() >= end:
                raise ArtifactError(
                    f"{self._message()}. This file system does not support locks, so the lock file of a killed "
                    f"process remains; if no process is writing, remove {self._file}"
                )
            time.sleep(0.1)
        if not created:
            try:
                self._lock.acquire()
            except Timeout:
                raise ArtifactError(f"{self._message()}; wait for it to end, or use another folder") from None
        with contextlib.suppress(OSError):  # on a full disk the note is missing, but the lock is held
            file = os.open(self._file, os.O_WRONLY | os.O_TRUNC | _NO_LINKS)
            with os.fdopen(file, "w", encoding="utf-8") as note:
                note.write(f"{_NOTE}{os.getpid()} on {socket.gethostname()}")
        return self

    def _check_own(self) -> None:
        """Refuse a file that is not a lock, because locking would truncate it or the target of a link."""
        try:
            there = self._file.lstat()
        except FileNotFoundError:
            return
        own = stat.S_ISREG(there.st_mode) and there.st_nlink <= 1 and there.st_size < 1000
        if not own or self._note()[: len(_NOTE)] not in ("", _NOTE):
            raise ArtifactError(
                f"{self._file} is not a lock file of this package, so nothing was changed; move it away"
            )

    def _created_without_locks(self) -> bool | None:
        """False if the file system has locks. Otherwise the file itself is the lock: True if it was created here, None
        if it already existed."""
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
        """Whether the file names a dead process of this machine; if so, the file is removed."""
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
        # Remove it while locked: a holder of the removed file and one of a new file would write the same bytes.
        with contextlib.suppress(OSError):  # the folder may no longer be writable
            self._file.unlink(missing_ok=True)
        self._lock.release()
