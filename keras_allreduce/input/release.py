"""Frees iterators in threads of their own.

Freeing an iterator of `tf.data` ends its threads. The one that tunes the
pipeline can miss its cancellation: it then sleeps out a wait that has grown
with the age of the iterator, to 60 seconds at most, and the thread that frees
the iterator waits for it. Freeing holds neither the GIL nor a lock of
TensorFlow's, so it can wait aside.

    iterator collected --> queue --> thread 0 (stays) ----> free
                             `-----> threads 1..7 (while needed)
"""

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

_MAX_THREADS = 8
_IDLE_SECONDS = 1.0
# How long the end of the process waits for iterators that are being freed.
_EXIT_SECONDS = 2.0


class Handles:
    """Iterators that are made when first asked for, once.

    Args:
        make: Makes them; returns a list.
        lock: Held while they are made.
    """

    def __init__(self, make: Callable[[], list[Any]], lock: Any):
        self._make: Callable[[], list[Any]] | None = make
        self._made: list[Any] | None = None
        self._lock = lock

    @property
    def are_made(self) -> bool:
        """Whether they have been made, and not freed."""
        return self._made is not None

    def make(self) -> bool:
        """Makes them if that is still to do; returns whether they were made."""
        with self._lock:
            if self._make is not None:
                self._made = self._make()
                self._make = None
            return self._made is not None

    def get(self) -> list[Any]:
        """The iterators.

        Raises:
            RuntimeError: If they were freed, at the end of the process.
        """
        if self._made is None and not self.make():
            raise RuntimeError(
                "An iterator can be read until the process ends. Received: a "
                "read after that. Read it before."
            )
        return self._made or []

    def free(self) -> None:
        """Frees them, which can take as long as a minute."""
        with self._lock:
            self._make = None
            made, self._made = self._made, None
        del made


class Releaser:
    """Frees handles in daemon threads, at most eight at a time."""

    def __init__(self) -> None:
        self._of_parent: tuple[Any, ...] = ()
        self._reset()

    def when_collected(self, owner: Any, handles: Handles) -> None:
        """Frees `handles` once Python has collected `owner`."""
        self._start_first_thread()
        self._live.add(handles)
        weakref.finalize(owner, self.free, handles).atexit = False

    def free(self, handles: Handles) -> None:
        """Has `handles` freed; returns at once."""
        self._pending.add(handles)
        self._queue.put(handles)

    @property
    def pending(self) -> int:
        """Handles that wait to be freed or are being freed."""
        return len(self._pending)

    def wait(self, timeout_seconds: float) -> bool:
        """Waits until nothing is pending; returns whether that came in time."""
        end = time.monotonic() + timeout_seconds
        while self.pending:
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def free_all(self, timeout_seconds: float = _EXIT_SECONDS) -> None:
        """Frees the iterators that are left at the end of the process.

        Iterators that are not freed in time end with the process.
        """
        if self._threads == 0:
            return
        for handles in list(self._live):
            self.free(handles)
        self.wait(timeout_seconds)

    def forked(self) -> None:
        """To be called in a forked child, which has none of the threads.

        The iterators that the parent was freeing are kept: it would wait for
        threads of TensorFlow that the child does not have either.
        """
        self._of_parent = self._queue, self._pending, list(self._live)
        self._reset()

    def _reset(self) -> None:
        # Its `put` may be called while Python collects garbage.
        self._queue: queue.SimpleQueue[Handles] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._busy = 0
        self._pending: set[Handles] = set()
        self._live: weakref.WeakSet[Handles] = weakref.WeakSet()

    def _start_first_thread(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._start()

    def _start(self) -> None:
        number, self._threads = self._threads, self._threads + 1
        threading.Thread(
            target=self._run,
            args=(number == 0,),
            name=f"keras_allreduce_release_{number}",
            daemon=True,
        ).start()

    def _run(self, stays: bool) -> None:
        while True:
            try:
                handles = self._queue.get(
                    timeout=None if stays else _IDLE_SECONDS
                )
            except queue.Empty:
                with self._lock:
                    self._threads -= 1
                return
            with self._lock:
                self._busy += 1
                if self._busy == self._threads < _MAX_THREADS:
                    self._start()
            try:
                handles.free()
            finally:
                self._pending.discard(handles)
                del handles
                with self._lock:
                    self._busy -= 1


RELEASER = Releaser()
atexit.register(RELEASER.free_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RELEASER.forked)
