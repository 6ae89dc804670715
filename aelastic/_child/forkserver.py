"""The program of a run's fork server: `bootstrap.py serve CONTROL_FD SETTINGS`.

For each message on the control socket it forks a worker; the message is one byte, the descriptors that come with it
say the rest. It answers with the pid, and later with the wait status. It ends with the socket.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import selectors
import signal
import socket
import struct
import sys

from . import forked
from .function import load, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO, NoReturn

ANSWER = struct.Struct("<cqq")
"""What happened, the pid, and a number: b"S" started, b"X" exited (wait status), b"E" not started (errno)."""
STARTED, EXITED, REFUSED = b"S", b"X", b"E"
MOST_DESCRIPTORS = 253
"""SCM_MAX_FD of unix(7)."""
OWN_DESCRIPTORS = 6
"""stdin, stdout, stderr, payload, result, status; what the arguments share follows."""


def serve(control_fd: int, settings: str) -> int:
    """Serve until the supervisor closes the socket.

    Args:
        control_fd: a connected unix stream socket.
        settings: JSON: `sys_path`, and the modules to `preload`.
    """
    chosen = json.loads(settings)
    sys.path[:] = chosen["sys_path"]
    for name in chosen["preload"]:
        _preload(name)
    os.set_inheritable(control_fd, False)  # noqa: FBT003  # positional only
    with socket.socket(fileno=control_fd) as control:
        Server(control).run()
    return 0


def _preload(name: str) -> None:
    """Import a module; what can't be imported is told, and a worker that needs it fails by itself."""
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a module may raise anything
        sys.stderr.write(f"aelastic: forkserver_preload: {name} can't be imported: {type(error).__name__}: {error}\n")


class Server:
    """Forks, and collects what it forked."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wake_r, self._wake_w = os.pipe()
        for fd in (self._wake_r, self._wake_w):
            os.set_blocking(fd, False)  # positional only
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the wake-up descriptor is written to
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the socket is closed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake_r, selectors.EVENT_READ)
            self._selector = selector
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._wake_r in ready:
                    self._collect()
                if self._control in ready and not self._fork_one():
                    return

    def _fork_one(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, 1, MOST_DESCRIPTORS)
        except ConnectionResetError:  # the supervisor was killed before it had read all answers
            return False
        if not message:
            return False
        try:
            pid = self._fork(fds)
        except OSError as error:
            self._answer(REFUSED, 0, error.errno or 0)
        else:
            self._answer(STARTED, pid, 0)
        for fd in fds:
            os.close(fd)
        return True

    def _fork(self, fds: list[int]) -> int:
        pid = forked.fork_apart()
        if pid == 0:
            try:
                self._selector.close()
                run_one(fds, unwanted=(self._control.detach(), self._wake_r, self._wake_w))
            finally:
                os._exit(forked.NOT_STARTED)
        return pid

    def _collect(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 65536)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._answer(EXITED, pid, status)

    def _answer(self, what: bytes, pid: int, number: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next select sees the end
            self._control.sendall(ANSWER.pack(what, pid, number))


def run_one(fds: list[int], unwanted: tuple[int, ...]) -> NoReturn:
    """In the child: read who it is to be from its payload, and be it."""
    stdin, stdout, stderr, payload_fd, result_fd, status_fd, *shared = fds
    payload = open(payload_fd, "rb")  # noqa: SIM115  # read on in `receive`
    header: dict[str, Any] = pickle.load(payload)  # noqa: S301  # our supervisor wrote it
    header["tracker_fd"] = shared.pop() if header["tracker_fd"] is not None else None
    header["descriptors"] = shared
    forked.run(
        lambda: _receive(payload, header),
        streams=(stdin, stdout, stderr),
        result_fd=result_fd,
        status_fd=status_fd,
        settings=header["settings"],
        unwanted=unwanted,
    )


def _receive(payload: BinaryIO, header: dict[str, Any]) -> Any:
    with payload:
        prepare(header)
        return load(payload, header)
