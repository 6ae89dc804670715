"""Descriptors that are kept for what must not fail for lack of them: finding a run's processes and ending them.

A host that has used up its descriptors would otherwise see an empty /proc. The reserve makes it unlikely, not
impossible (another thread may be quicker to take what is given up), so whoever looks also asks `procfs.shortages`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import final

KEPT = 4
"""Two jobs at once, each with a process and a file of /proc open."""


@final
class Reserve:
    """Some descriptors of /dev/null. May be spent in several threads at once.

    Raises:
        OSError: EMFILE or ENFILE, if they can't be had.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spending = 0
        self._fds: list[int] = []
        self._closed = False
        try:
            self._fill()
        except OSError:
            self._empty()
            raise

    @contextlib.contextmanager
    def spent(self) -> Iterator[None]:
        """Give them up for a while; what can't be had again at its end is missing from then on."""
        with self._lock:
            self._spending += 1
            self._empty()
        try:
            yield
        finally:
            with self._lock:
                self._spending -= 1
                if not self._spending and not self._closed:
                    with contextlib.suppress(OSError):
                        self._fill()

    def close(self) -> None:
        """Give them up for good; idempotent."""
        with self._lock:
            self._closed = True
            self._empty()

    def _fill(self) -> None:
        while len(self._fds) < KEPT:
            self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _empty(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
