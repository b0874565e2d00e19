"""A bounded queue between threads that an interrupt cannot deadlock.

``queue.Queue``, ``threading.Event`` and futures take their locks in Python code. An interrupt that arrives there leaves
the lock taken, and the next thread blocks forever despite a timeout. ``queue.SimpleQueue`` takes its lock in C.
"""

from __future__ import annotations

import queue
from typing import Any, NamedTuple


class Stop:
    """A permanent stop flag, set by the first thread to end; channels that share it then pass no more items."""

    is_set: bool = False


class Failure(NamedTuple):
    """The error of the producing thread, in place of an item."""

    error: BaseException


class Channel:
    """A queue of at most ``size`` items between two threads.

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
        """Wait for room and add ``item``; False if stopped first."""
        found, _ = self._next(self._room)
        if found:
            self._items.put(item)
        return found

    def get(self) -> Any:
        """Wait for an item; None if stopped first."""
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
