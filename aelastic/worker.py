"""For code that runs inside a worker: who am I, am I well, and `record`. Imports the standard library only.

Example:
    >>> import os
    >>> os.environ["AELASTIC_RANK"] = "3"
    >>> rank()
    3
    >>> del os.environ["AELASTIC_RANK"]
"""

from __future__ import annotations

import os

from ._child.notify import expires, heartbeat, ready
from ._child.record import ErrorHandler, record

__all__ = ["ErrorHandler", "attempt", "expires", "heartbeat", "rank", "ready", "record", "world_size"]


def rank() -> int:
    """This worker's index, 0 to `world_size() - 1`.

    Raises:
        RuntimeError: if this process is no worker of a run.
    """
    return _number("AELASTIC_RANK")


def world_size() -> int:
    """How many ranks the run has.

    Raises:
        RuntimeError: if this process is no worker of a run.
    """
    return _number("AELASTIC_WORLD_SIZE")


def attempt() -> int:
    """Which attempt this is; 0 for the first.

    Raises:
        RuntimeError: if this process is no worker of a run.
    """
    return _number("AELASTIC_ATTEMPT")


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise RuntimeError(
            f"{name} is {text!r}, so this process is no worker of an aelastic run: start it with start_processes"
        )
    return int(text)
