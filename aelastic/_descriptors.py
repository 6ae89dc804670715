"""The supervisor's own descriptors: what a worker that was forked from it must not keep.

An exec closes them by itself. A fork copies them, and a copied end of a pipe keeps the pipe's other readers and writers
waiting for as long as the worker lives. So the pipes and sockets between us and our processes are counted here. Files
are not: a copy of them holds nobody up.
"""

from __future__ import annotations

import os
import socket

_owned: set[int] = set()
os.register_at_fork(after_in_child=_owned.clear)  # they are the parent's, and their numbers free for others


def open_pipe() -> tuple[int, int]:
    """Make a pipe that is ours: its reading and its writing end.

    Raises:
        OSError: if no descriptor is left.
    """
    ends = os.pipe()
    _owned.update(ends)
    return ends


def open_socketpair() -> tuple[socket.socket, socket.socket]:
    """Make a pair of connected sockets that are ours; each is closed with `close_socket`.

    Raises:
        OSError: if no descriptor is left.
    """
    ends = socket.socketpair()
    _owned.update(end.fileno() for end in ends)
    return ends


def open_datagram_socket() -> socket.socket:
    """Make a datagram socket of this host that is ours; it is closed with `close_socket`.

    Raises:
        OSError: if no descriptor is left.
    """
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    _owned.add(end.fileno())
    return end


def close_fd(fd: int) -> None:
    """Close what `open_pipe` gave."""
    _owned.discard(fd)  # first: its number may be another's as soon as it is closed
    os.close(fd)


def close_socket(end: socket.socket) -> None:
    """Close what `open_socketpair` or `open_datagram_socket` gave; idempotent."""
    _owned.discard(end.fileno())
    end.close()


def owned() -> frozenset[int]:
    """Those that are open now."""
    return frozenset(_owned.copy())
