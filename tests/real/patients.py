"""Workers whose health is watched: functions that are importable and light, and commands that say how they are."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tests.house.source import ROOT


def speaker(code: str) -> tuple[str, ...]:
    """A command that runs lines of Python with `aelastic.worker` at hand."""
    prelude = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom aelastic.worker import *\n"
    return (sys.executable, "-I", "-S", "-c", prelude + code)


LONG = bool(os.environ.get("AELASTIC_TEST_LONG"))
METHODS = ("spawn", "fork", "forkserver") if LONG else ("spawn", "fork")
READY_THEN_RESTS = "ready()\nsignal.pause()"
"""Says that it is ready, and lives until it is stopped."""


def rest() -> None:
    """Live until a signal comes that ends it."""
    while True:
        signal.pause()


def be_ready_and_rest() -> None:
    from aelastic.worker import ready

    ready()
    rest()


def hold_interpreter(seconds_of_expires: float | None = None) -> None:
    """Be ready, then sit in a C call that never gives the GIL back."""
    import ctypes

    from aelastic.worker import expires, ready

    reading, _writing = os.pipe()
    ready()
    if seconds_of_expires is None:
        ctypes.PyDLL(None).read(reading, ctypes.create_string_buffer(1), 1)
        return
    with expires(seconds_of_expires):
        ctypes.PyDLL(None).read(reading, ctypes.create_string_buffer(1), 1)


def beat(interval: float, count: int) -> int:
    """Be ready, send so many heartbeats, and return."""
    import time

    from aelastic.worker import heartbeat, ready

    ready()
    for _ in range(count):
        time.sleep(interval)
        heartbeat()
    return count


def spend(cpu_seconds: float, memory_bytes: int) -> Any:
    """Use that much, be ready, rest."""
    import time

    from aelastic.worker import ready

    kept = b"x" * memory_bytes
    while time.process_time() < cpu_seconds:
        pass
    ready()
    rest()
    return kept
