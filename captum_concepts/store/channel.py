"""Items on their way from one thread to another, which an interrupt cannot leave locked.

``queue.Queue``, ``threading.Event`` and futures take their locks in Python code. An interrupt that arrives there leaves
the lock taken, and whoever asks for it next waits for ever, timeout or not. ``queue.SimpleQueue`` takes its lock in C.
"""

from __future__ import annotations

import queue
from typing import Any, NamedTuple


class Stop:
    """Set for good by whichever thread ends first; all channels that share it then give and take nothing more."""

    is_set: bool = False


class Failure(NamedTuple):
    """In place of an item: the error of the thread that should have made it."""

    error: BaseException


class Channel:
    """At most ``size`` items that wait for another thread.

    >>> channel = Channel(2, Stop())
    >>> channel.put("first"), channel.put("second")
    (True, True)
    >>> channel.get()
    'first'
    """

    def __init__(self, size: int, stop: Stop) -> None:
        self.stop = stop
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(size):
            self._room.put(None)

    def put(self, item: Any) -> bool:
        """Wait for room; False where all was stopped before there was any."""
        found, _ = self._next(self._room)
        if found:
            self._items.put(item)
        return found

    def get(self) -> Any:
        """Wait for an item; None where all was stopped before there was one."""
        found, item = self._next(self._items)
        if found:
            self._room.put(None)
        return item

    def _next(self, source: queue.SimpleQueue[Any]) -> tuple[bool, Any]:
        while not self.stop.is_set:
            try:
                return True, source.get(timeout=0.1)
            except queue.Empty:
                continue
        return False, None
