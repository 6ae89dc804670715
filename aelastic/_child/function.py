"""Run a function in a worker and hand back what it returned or raised.

`perform` is the same for every start method. `main` is for a spawned worker, whose call arrives through a pipe: a
header of plain values first, by which the interpreter is made ready, then the function and its arguments. What a
function doesn't need is not imported: multiprocessing alone costs 30 ms.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import types

from . import mainmodule, stacks
from .frames import ABORT, END, RAISED, RESTART, VALUE, ChunkWriter
from .record import ErrorHandler, clipped

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Iterable
    from typing import Any, BinaryIO

    Call = tuple[Callable[..., Any], tuple[Any, ...]]
else:
    import _pickle as pickle  # the same without what only its Python twin needs: re, 6 ms

descriptors: list[int] = []
"""What was handed over beside the payload, in the order in which the payload counts it."""
SHARED_BY_DESCRIPTOR = ("multiprocessing.", "torch.multiprocessing")
"""Modules whose reducers share an object of this process, which is gone when the supervisor would use it."""


class InheritedDescriptor:
    """A descriptor inside the payload, in the place of multiprocessing's `DupFd`.

    Args:
        index: its place in `descriptors`.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        """The descriptor here; its owner closes it."""
        return descriptors[self.index]


def main(payload_fd: int, result_fd: int) -> int:
    """Run the call that arrives through the payload's pipe.

    Returns:
        The exit code.
    """
    for fd in (payload_fd, result_fd):
        os.set_inheritable(fd, False)  # noqa: FBT003  # positional only
    faulthandler.enable(2)
    stacks.show_on_signal()
    return perform(lambda: receive(payload_fd), result_fd)


def receive(payload_fd: int) -> Call:
    """Make the interpreter ready and unpickle the call.

    Raises:
        EOFError: if the supervisor ended before it had sent everything.
    """
    with open(payload_fd, "rb") as payload:
        header = pickle.load(payload)  # our supervisor wrote it
        prepare(header)
        return load(payload, header)


def load(payload: BinaryIO, header: dict[str, Any]) -> Call:
    """Unpickle the call that follows the header."""
    try:
        call: Call = pickle.load(payload)  # as above
    finally:
        settle(header)
    return call


def prepare(header: dict[str, Any]) -> None:
    """Do what multiprocessing's `spawn.prepare` does, but keep the worker's own folder and PYTHONPATH."""
    sys.path[:] = merged_path(sys.path, header["sys_path"])
    sys.argv = header["sys_argv"]
    descriptors[:] = header["descriptors"]
    tracker_fd = header["tracker_fd"]
    for fd in (*descriptors, *(() if tracker_fd is None else (tracker_fd,))):
        os.set_inheritable(fd, False)  # noqa: FBT003  # positional only
    if header["multiprocessing"]:
        _join_multiprocessing(header)
    mainmodule.replace(header["main"])


def merged_path(own: list[str], parents: list[str]) -> list[str]:
    """The parent's `sys.path`, after what this worker's PYTHONPATH adds, before what else it has."""
    named = () if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wanted = {os.path.abspath(entry) for entry in named if entry}
    first = [entry for entry in own if entry in wanted and entry not in parents]
    return [*first, *parents, *(entry for entry in own if entry not in parents and entry not in first)]


def _join_multiprocessing(header: dict[str, Any]) -> None:
    from multiprocessing import process, resource_tracker

    process.current_process().authkey = header["authkey"]
    # Its private names are what its own spawn_main sets.
    process.current_process()._inheriting = True  # type: ignore[attr-defined]  # noqa: SLF001
    if header["tracker_fd"] is not None:
        resource_tracker._resource_tracker._fd = header["tracker_fd"]  # type: ignore[attr-defined]  # noqa: SLF001


def settle(header: dict[str, Any]) -> None:
    """After the call was unpickled: what multiprocessing there is in this process is the supervisor's relative."""
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = header["authkey"]
        process.current_process().__dict__.pop("_inheriting", None)


def perform(receive_call: Callable[[], Call], result_fd: int) -> int:
    """Call the function, send what came of it.

    Returns:
        The exit code: 0 when the supervisor has the value, else 1.

    Raises:
        SystemExit: if the function raised it with a code other than 0.
        KeyboardInterrupt: if the function did, after it was reported; Python then ends by SIGINT, as for any program.
    """
    results = ChunkWriter(result_fd)
    try:
        function, args = _received(receive_call)
        value = function(*args)
        if isinstance(value, types.CoroutineType):
            value = _run(value)
    except SystemExit as leave:
        if leave.code not in (None, 0):
            raise
        value = None
    except BaseException as error:  # whatever it is, it is the function's end and is told as such
        _report(error, results)
        if isinstance(error, KeyboardInterrupt):
            sys.excepthook = lambda *_: None  # it has been shown
            raise
        return 1
    return 0 if results.is_anothers() else _attempt(lambda: _send_value(value, results))


def _received(receive_call: Callable[[], Call]) -> Call:
    try:
        return receive_call()
    except SystemExit as leave:
        raise RuntimeError(
            "the worker's function could not be loaded: something that was imported for it exits; put what exits under"
            ' `if __name__ == "__main__":`'
        ) from leave


def _run(coroutine: types.CoroutineType[Any, Any, Any]) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def _report(error: BaseException, results: ChunkWriter) -> None:
    """Tell everyone: the rank's log, its error file, the supervisor."""
    error.__traceback__ = _users_part(error.__traceback__)
    _show(error)
    if results.is_anothers():
        return  # a child that the function forked came back from it
    scribe = ErrorHandler()
    scribe.record_exception(error)
    _attempt(lambda: _send_exception(error, results))


def _show(error: BaseException) -> None:
    """Print it as the interpreter would, also where the user's hook can't."""
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException as broken:  # noqa: BLE001  # the user's code, after which there is still a result to be sent
        sys.stderr.write("Error in sys.excepthook:\n")
        sys.__excepthook__(type(broken), broken, broken.__traceback__)
        sys.stderr.write("\nOriginal exception was:\n")
        sys.__excepthook__(type(error), error, error.__traceback__)


def _users_part(trace: types.TracebackType | None) -> types.TracebackType | None:
    inside = trace
    while inside is not None and inside.tb_frame.f_code.co_filename == __file__:
        inside = inside.tb_next
    return inside or trace


def _attempt(send: Callable[[], int]) -> int:
    try:
        return send()
    except BrokenPipeError:
        return 1  # the supervisor doesn't read any more: it has ended, or could not load what came so far
    except OSError as error:
        sys.stderr.write(f"aelastic: the function is over, but its result can't be sent: {error}\n")
        return 1


def _send_exception(error: BaseException, results: ChunkWriter) -> int:
    import traceback

    results.kind(RAISED)
    text = clipped("".join(traceback.format_exception(error)))
    results.write(text.encode("utf-8", "replace"))
    _dump(error, results)
    return 1


def _send_value(value: Any, results: ChunkWriter) -> int:
    results.kind(VALUE)
    problem = _dump(value, results)
    if problem:
        sys.stderr.write(problem)
    return 1 if problem else 0


def _dump(value: Any, results: ChunkWriter) -> str:
    """Pickle into the pipe; the traceback where no way works, else `""`."""
    problem = ""
    for pickler in _picklers():
        if problem:
            results.mark(RESTART)
        try:
            pickler(results, 5).dump(value)
        except BrokenPipeError:
            raise
        except Exception:  # noqa: BLE001  # reducers are the user's code
            import traceback

            problem = problem or traceback.format_exc()
        else:
            results.mark(END)
            return ""
    results.mark(ABORT)
    results.write(clipped(problem).encode("utf-8", "replace"))
    return problem


def _picklers() -> Iterable[type[pickle.Pickler]]:
    """The plain pickler, then cloudpickle's where it is installed, both with the user's own reducers."""
    yield with_reducers(pickle.Pickler, _own_reducers())
    try:
        from cloudpickle import Pickler
    except ImportError:
        return
    yield with_reducers(Pickler, _own_reducers())


def _own_reducers() -> dict[type, Any]:
    reduction = sys.modules.get("multiprocessing.reduction")
    extra = reduction.ForkingPickler._extra_reducers if reduction else {}  # noqa: SLF001  # it has no public name
    return {
        kind: reducer
        for kind, reducer in extra.items()
        if not getattr(reducer, "__module__", "").startswith(SHARED_BY_DESCRIPTOR)
    }


def with_reducers(pickler: type[pickle.Pickler], reducers: dict[type, Any]) -> type[pickle.Pickler]:
    """A pickler class with further reducers.

    They are a class attribute because the C pickler reads `dispatch_table` in its `__init__`: set later, it is
    ignored, and a Queue would arrive as a bare number.
    """
    import copyreg

    known = {} if pickler is pickle.Pickler else pickler.dispatch_table
    return type(pickler.__name__, (pickler,), {"dispatch_table": {**copyreg.dispatch_table, **known, **reducers}})
