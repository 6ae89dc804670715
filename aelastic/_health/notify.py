"""The socket that a rank talks to: systemd's `sd_notify` protocol, one datagram socket a rank.

Who speaks is told by the socket alone, never by the sender's pid: whoever was given the address speaks for the rank.
What is said is judged in `monitor`.

Source: sd_notify(3), unix(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from typing import final

from .._descriptors import close_socket, open_datagram_socket

DATAGRAM_BYTES = 1 << 16
MOST_DESCRIPTORS = 253
"""SCM_MAX_FD of unix(7)."""
MOST_AT_ONCE = 20
"""Datagrams of one rank that are read before the loop's other tasks have a turn; the kernel queues 10 by default."""
CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

Notice = Mapping[str, str]
"""The assignments of one datagram."""


def parse(datagram: bytes) -> Notice:
    r"""Read a datagram; what is no assignment is left out.

    Example:
        >>> parse(b"READY=1\nSTATUS=up = yes\n\xff\n")
        {'READY': '1', 'STATUS': 'up = yes'}
    """
    lines = datagram.decode("utf-8", "replace").split("\n")
    return {name: value for name, mark, value in (line.partition("=") for line in lines) if mark}


@final
class NotifySocket:
    """The receiving end of one rank's `NOTIFY_SOCKET`. Belongs to the running loop.

    Args:
        heard: called with each datagram; one that brings descriptors has been answered then: they are closed, which
            is all that `BARRIER=1` waits for (sd_notify_barrier(3)).

    Raises:
        OSError: if no descriptor is left.
    """

    def __init__(self, heard: Callable[[Notice], None]) -> None:
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._folder = ""
        self._socket = open_datagram_socket()
        try:
            self._socket.setblocking(False)  # noqa: FBT003  # positional only
            self.address = self._bind()
        except OSError:
            self.close()
            raise

    def _bind(self) -> str:
        """Take an abstract address, which needs no file and no permission; a path where there are none (macOS)."""
        name = f"aelastic/{secrets.token_hex(16)}"
        with contextlib.suppress(OSError):
            self._socket.bind(f"\0{name}")
            return f"@{name}"
        self._folder = tempfile.mkdtemp(prefix="aelastic_")
        path = os.path.join(self._folder, "notify")
        self._socket.bind(path)
        os.chmod(self._folder, 0o711)  # noqa: S103  # the worker may be another user
        os.chmod(path, 0o666)  # noqa: S103
        return path

    def listen(self) -> None:
        """Begin to hear."""
        self._loop.add_reader(self._socket.fileno(), self.look)

    def look(self) -> None:
        """Hear what has been said by now."""
        for _ in range(MOST_AT_ONCE):
            try:
                said, fds, flags, _ = socket.recv_fds(self._socket, DATAGRAM_BYTES, MOST_DESCRIPTORS, CLOSE_ON_EXEC)
            except BlockingIOError:
                return
            except OSError:
                return  # closed by what was heard before
            for fd in fds:
                os.close(fd)
            if flags & socket.MSG_TRUNC:
                said = said.rpartition(b"\n")[0]  # the last word was cut in the middle
            self._heard(parse(said))

    def close(self) -> None:
        """Hear nothing more; idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            close_socket(self._socket)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""
