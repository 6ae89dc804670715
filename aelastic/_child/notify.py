"""Tell the supervisor how this worker is: ready, alive, inside a block that must end in time.

It speaks systemd's protocol to `NOTIFY_SOCKET`, so it works under systemd too, but for `expires`. Without that
variable, and when nobody listens any more, nothing happens: a worker never fails because of its supervisor.

Source: sd_notify(3).
"""

from __future__ import annotations

import itertools
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_blocks = itertools.count()


def ready(status: str = "") -> None:
    """Say that this worker is ready (`HealthPolicy(ready=Notify())`); it counts as its first heartbeat.

    Args:
        status: one line for people; shown when something goes wrong later.
    """
    _say("READY=1", *([f"STATUS={' '.join(status.split())}"] if status else []))


def heartbeat() -> None:
    """Say that this worker is alive; due within `HealthPolicy.watchdog` seconds of the last one. Never waits."""
    _say("WATCHDOG=1", waits=False)


class expires:  # noqa: N801  # read as a verb: with expires(30): ...
    """A block that must end within some seconds, or the supervisor kills this worker (failure `watchdog`).

    Unlike a timer of the worker's own, this works while C code holds the interpreter. Blocks may be nested, and run in
    several threads and tasks at once. The supervisor must have been given a `HealthPolicy`.

    Example:
        >>> with expires(30.0):
        ...     pass

    Source: `torch.distributed.elastic.timer.expires`.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"expires needs a number of seconds above 0, not {seconds!r}")
        self._seconds = seconds
        self._name = ""

    def __enter__(self) -> None:
        self._name = f"{os.getpid()}.{next(_blocks)}"
        _say(f"X_AELASTIC_BLOCK={self._name}", f"X_AELASTIC_USEC={max(int(self._seconds * 1_000_000), 1)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _say(f"X_AELASTIC_BLOCK={self._name}")


def _say(*assignments: str, waits: bool = True) -> None:
    """Send one datagram.

    Args:
        waits: whether to wait while the supervisor has not read the ones before.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    import socket  # 5 ms, for those who talk

    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.setblocking(waits)
            speaker.sendto("\n".join(assignments).encode(errors="replace"), address)
    except OSError:
        return  # nobody listens any more, or (heartbeat) there is one in the queue that was not read yet
