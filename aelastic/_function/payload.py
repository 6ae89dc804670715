"""Pickle a call for a worker: function, arguments, and what its interpreter needs to load them.

Plain pickle with multiprocessing's reducers carries most; cloudpickle takes over for closures, lambdas and what is
defined in a main module that no worker can import. Blocks (it runs the user's reducers), so it is called in a thread.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import context, process, reduction, resource_tracker
from types import MappingProxyType
from typing import Any, final

import cloudpickle

from aelastic._child.function import InheritedDescriptor, with_reducers

STOCK_TYPES = (types.MethodType, types.MethodDescriptorType, types.WrapperDescriptorType, functools.partial)
"""What multiprocessing reduces in its own way and pickle knows how to: left to pickle, so that no worker has to
import multiprocessing for a partial."""

MainModule = tuple[str, str]
"""("module", name) or ("path", path), as a worker can run it again."""


@final
@dataclass(slots=True)
class Payload:
    """One rank's call, ready to be sent. Owns its descriptors until `close`."""

    body: bytes
    header: Mapping[str, Any]
    descriptors: tuple[int, ...]
    """Duplicates of what the arguments share by descriptor; the worker gets them in this order."""
    tracker_fd: int | None
    """multiprocessing's resource tracker, where the arguments or the host use it; owned by multiprocessing."""
    is_shareable: bool
    """Whether another rank may be sent the same: nothing in it counts who has it."""

    @property
    def shared(self) -> tuple[int, ...]:
        """All descriptors that the worker gets for the arguments, the tracker's last."""
        return (*self.descriptors, *(() if self.tracker_fd is None else (self.tracker_fd,)))

    def parts(
        self, descriptors: tuple[int, ...], tracker_fd: int | None, *, settings: Mapping[str, Any] | None = None
    ) -> tuple[bytes, bytes]:
        """What goes through the pipe.

        Args:
            descriptors: their numbers as the worker will see them.
            tracker_fd: likewise.
            settings: what a forked worker puts in force itself.
        """
        header = {**self.header, "descriptors": list(descriptors), "tracker_fd": tracker_fd, "settings": settings}
        return pickle.dumps(header, 5), self.body

    def close(self) -> None:
        """Close the duplicates and let go of what is sent by now; idempotent."""
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors, self.body = (), b""


@final
class Spawning:
    """Stands in for the `Popen` that multiprocessing's reducers ask to pass descriptors on."""

    DupFd = InheritedDescriptor

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        """Keep a duplicate, so that the caller may close its own; gives the place in `descriptors`."""
        self.descriptors.append(os.dup(fd))
        return len(self.descriptors) - 1


def pickle_call(function: Callable[..., Any], args: tuple[Any, ...]) -> Payload:
    """Pickle a call for a worker of its own interpreter.

    Raises:
        Exception: whatever pickle, cloudpickle or a reducer raises, when no way works.
    """
    main = main_module()
    try:
        body, descriptors = _dump(pickle.Pickler, function, args)
        by_value = cloudpickle.list_registry_pickle_by_value() or (main is None and b"__main__" in body)
    except Exception:  # noqa: BLE001  # plain pickle refuses closures in several ways; cloudpickle's error is the one to show
        by_value = True
    else:
        if by_value:
            _close(descriptors)
    if by_value:
        body, descriptors = _dump(cloudpickle.Pickler, function, args)
    named = (b"__mp_main__",) if by_value else (b"__main__", b"__mp_main__")
    shares = b"multiprocessing" in body
    tracker_fd = _tracker_fd(needed=shares)
    # With a tracker of its own, a worker that is given shared memory by name would remove it at its end (bpo-38119).
    joins = tracker_fd is not None
    return Payload(
        body=body,
        header=_header(main if any(name in body for name in named) else None, joins=joins),
        descriptors=tuple(descriptors),
        tracker_fd=tracker_fd,
        is_shareable=not descriptors and not shares,
    )


def _dump(
    pickler: type[pickle.Pickler], function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[bytes, list[int]]:
    extra = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # noqa: SLF001  # has no public name
    reducers = {kind: reducer for kind, reducer in extra.items() if kind not in STOCK_TYPES}
    spawning = Spawning()
    file = io.BytesIO()
    context.set_spawning_popen(spawning)  # type: ignore[arg-type]  # all that its reducers ask
    try:
        with_reducers(pickler, reducers)(file, 5).dump((function, args))
    except BaseException:
        _close(spawning.descriptors)
        raise
    finally:
        context.set_spawning_popen(None)
    return file.getvalue(), spawning.descriptors


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _header(main: MainModule | None, *, joins: bool) -> Mapping[str, Any]:
    # Not multiprocessing.spawn.get_preparation_data: it would fix the host's default start method.
    return MappingProxyType(
        {
            "sys_path": [entry or process.ORIGINAL_DIR or os.getcwd() for entry in sys.path],  # type: ignore[attr-defined]
            "sys_argv": list(sys.argv),
            "main": main,
            "multiprocessing": joins,
            "authkey": bytes(process.current_process().authkey),
        }
    )


def _tracker_fd(*, needed: bool) -> int | None:
    tracker = resource_tracker._resource_tracker  # noqa: SLF001  # asking getfd would start it
    running: int | None = tracker._fd  # type: ignore[attr-defined]  # noqa: SLF001
    return resource_tracker.getfd() if needed else running


def main_module() -> MainModule | None:
    """The host's main module, if a worker can import it again.

    Returns:
        None for `python -c`, stdin, a REPL, a notebook and a package's `__main__`, whose functions travel by value.
    """
    main = sys.modules["__main__"]
    sys.modules["__mp_main__"] = main  # the name under which a worker knows what is defined in it
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        return None if name == "__main__" or name.endswith(".__main__") else ("module", name)
    path = getattr(main, "__file__", None)
    if path is None:
        return None
    path = os.path.normpath(os.path.join(process.ORIGINAL_DIR or "", path))  # type: ignore[attr-defined]
    known = os.path.isfile(path) and os.path.splitext(os.path.basename(path))[0] != "ipython"
    return ("path", path) if known else None


def interpreter() -> str:
    """The program to run workers with, as `multiprocessing.set_executable` chose it.

    Raises:
        RuntimeError: if this process is embedded or frozen in a program and has none.
    """
    from multiprocessing import spawn  # noqa: PLC0415  # only when a worker is spawned

    executable = os.fsdecode(spawn.get_executable() or "")
    if not executable or (getattr(sys, "frozen", False) and executable == sys.executable):
        raise RuntimeError(
            "a function can't be started: this process doesn't know its Python interpreter (sys.executable is"
            f" {sys.executable!r}); name one with multiprocessing.set_executable"
        )
    return executable
