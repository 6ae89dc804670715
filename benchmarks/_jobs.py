"""What the functions of the benchmarks do: importable, and light, because every worker imports it."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any


def quick(value: int) -> int:
    """Do nothing, where only the way there and back is measured."""
    return value + 1


def large(size: int, peak_file: str) -> bytes:
    """Make a large value; the most memory that its process had while it was sent is written at the end."""
    forget_peak()
    before = peak_bytes()
    atexit.register(lambda: Path(peak_file).write_text(str(peak_bytes() - before)))
    return b"x" * size


def answer(connection: Any, function: Any, args: tuple[Any, ...]) -> None:
    """Call a function and send what it returns, as a bare process does."""
    connection.send(function(*args))


def forget_peak() -> None:
    """Count the most memory from here on (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
