"""One writer at a time for a folder; a lock whose owner died is free again."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from captum_concepts._artifacts import parse_json
from captum_concepts.errors import ArtifactError

_NAME = ".lock"


class FolderLock:
    """Hold a folder for writing (a context manager).

    The operating system keeps the lock (``flock``; over NFS too on Linux) and drops it when the process ends, however
    it ends. So a file left behind by a killed process never blocks, and no age has to be guessed. The file says who
    holds it, for the message of whoever comes second.

    Args:
        path: the folder; it is created if it is missing.
        what: how the message calls it.

    Raises:
        ArtifactError: on entering, another process (or thread) holds the folder.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with FolderLock(folder), FolderLock(folder):  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
        ...
        captum_concepts.errors.ArtifactError: the folder ... is being written by process ... on ...
    """

    def __init__(self, path: str | Path, what: str = "the folder") -> None:
        self.path = Path(path)
        self.what = what
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        self.path.mkdir(parents=True, exist_ok=True)
        name = self.path / _NAME
        while True:
            file = name.open("a+")
            if not _try_lock(file):
                holder = _holder(file)
                file.close()
                raise ArtifactError(
                    f"{self.what} {self.path} is being written by {holder}; wait for it to end, or write elsewhere"
                )
            # The holder before may have removed the file between our open and our lock: then we hold a file that
            # nobody else will look at.
            if name.exists() and name.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
            file.close()
        try:
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        except OSError:  # a full disk: the note is a courtesy, the lock is held
            pass
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                (self.path / _NAME).unlink(missing_ok=True)
                self._file.close()
            except OSError:  # closing may flush to a full disk; the descriptor is closed all the same
                pass
            self._file = None


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        note = parse_json(file.read())
        return f"process {note['pid']} on {note['host']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


def _try_lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:
        return _try_lock_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock_windows(file: Any) -> bool:
    import msvcrt

    locking: Any = vars(msvcrt)["locking"]
    try:
        file.seek(1 << 20)  # behind the note, which others may read
        locking(file.fileno(), vars(msvcrt)["LK_NBLCK"], 1)
    except OSError:
        return False
    return True
