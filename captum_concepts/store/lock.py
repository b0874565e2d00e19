"""One writer at a time for a folder; a lock whose owner died is free again."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from captum_concepts.errors import ArtifactError


class FolderLock:
    """Hold a folder for writing (a context manager).

    The operating system keeps the lock (``filelock``) and drops it when the process ends, however it ends. So a file
    left by a killed process never blocks, and no age has to be guessed.

    Args:
        path: the folder; it is created if it is missing.
        what: how the message calls it.
        name: of the lock, where parts of a folder are locked apart.
        wait: seconds to wait for another holder.

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
        captum_concepts.errors.ArtifactError: the folder ... is being written by process ... on ...; wait ...
    """

    def __init__(self, path: str | Path, what: str = "the folder", *, name: str = "lock", wait: float = 0) -> None:
        self.path = Path(path)
        self.what = what
        self._file = self.path / f".{name}"
        self._lock = FileLock(self._file, timeout=wait, thread_local=False)

    def __enter__(self) -> FolderLock:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ArtifactError(
                f"{self.what} {self.path} is being written by {self._holder()}; wait for it to end, or write elsewhere"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the note is a courtesy, the lock is held
            self._file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        return self

    def _holder(self) -> str:
        try:
            note = self._file.read_text(encoding="utf-8")[:200]
        except (OSError, ValueError):
            note = ""
        return note or "another process"

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # While it is held: whoever takes the lock of a removed file and whoever creates a new one write the same bytes.
        with contextlib.suppress(OSError):  # the folder may not be writable any more
            self._file.unlink(missing_ok=True)
        self._lock.release()
