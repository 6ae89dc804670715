"""Write why this process failed into the error file that its supervisor named: `record` and `ErrorHandler`.

The file is JSON in the shape that torch's readers expect, with our own facts beside theirs. Nothing here reads it back
(`_evidence` does), and nothing is imported that isn't needed before something goes wrong: a worker pays for this file.

Source: `torch.distributed.elastic.multiprocessing.errors`.
"""

from __future__ import annotations

import faulthandler
import os
import stat
import sys
import time
from functools import partial, wraps

from . import stacks

TYPE_CHECKING = False  # typing costs a worker 5 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, ParamSpec, TypeVar, overload

    P = ParamSpec("P")
    R = TypeVar("R")

ENV_NAMES = ("AELASTIC_ERROR_FILE", "TORCHELASTIC_ERROR_FILE")
"""Where the path is looked up, in this order."""
TEXT_LIMIT = 1 << 20
"""Characters of a message or traceback that are written; the middle of a longer one is left out."""
CO_COROUTINE = 0x80  # inspect.CO_COROUTINE; inspect costs 10 ms


class ErrorHandler:
    """Writes an exception into this process's error file; subclasses may override each public method.

    Source: torch's class of the same name.
    """

    def error_file(self) -> str | None:
        """Path of this process's error file; None when nobody asked for one."""
        return next((os.environ[name] for name in ENV_NAMES if os.environ.get(name)), None)

    def initialize(self) -> None:
        """Let a crash in C code, and a supervisor that asks, see the stacks; called before the recorded function."""
        if not faulthandler.is_enabled():
            # The descriptor, not sys.stderr, which may be None or an object without one.
            faulthandler.enable(2, all_threads=True)
        stacks.show_on_signal()

    def record_exception(self, e: BaseException) -> None:
        """Write an exception with its traceback, causes and notes.

        Does nothing without an error file. A file that can't be written is a sentence on stderr, never an exception
        that would hide the first one.
        """
        path = self.error_file()
        if path:
            self._write(path, report_of(e))

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        """Make the error file of a nested run's root cause our own.

        Args:
            rootcause_error_file: path of the failed worker's error file.
            error_code: how that worker ended, as `Popen.returncode`; 0 leaves what the file says.

        Raises:
            OSError: if that file can't be read.
            ValueError: if it holds no JSON object.
        """
        import json

        with open(rootcause_error_file, encoding="utf-8") as file:
            data = json.load(file)
        if not isinstance(data, dict):
            raise ValueError(f"{rootcause_error_file} holds no error report: {data!r:.100}")  # noqa: TRY004  # damage
        if error_code and isinstance(data.get("message"), dict):
            data["message"]["errorCode"] = error_code
        path = self.error_file()
        if path:
            self._write(path, data)

    def _write(self, path: str, data: dict[str, Any]) -> None:
        import json

        try:
            write_whole(path, json.dumps(data, default=repr).encode())
        except OSError as error:
            sys.stderr.write(f"aelastic: the error file {path} could not be written: {error}\n")


def report_of(e: BaseException) -> dict[str, Any]:
    """An exception as the error file holds it: torch's fields, and ours in the same `extraInfo`."""
    import traceback

    extra: dict[str, Any] = {
        "py_callstack": clipped("".join(traceback.format_exception(e))),
        "timestamp": str(int(time.time())),
        "monotonic_ns": time.monotonic_ns(),
        "pid": os.getpid(),
        "type": f"{type(e).__module__}.{type(e).__qualname__}",
        "notes": [str(note) for note in getattr(e, "__notes__", None) or ()],
    }
    retriable = getattr(e, "retriable", None)
    if isinstance(retriable, bool):
        extra["retriable"] = retriable
    return {"message": {"message": clipped(_message(e)), "extraInfo": extra}}


def _message(e: BaseException) -> str:
    try:
        return f"{type(e).__name__}: {e}"
    except Exception:  # noqa: BLE001  # an exception whose __str__ fails is still to be reported
        return f"{type(e).__name__}: <its text can't be made>"


def clipped(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text, without its middle when it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def write_whole(path: str, data: bytes) -> None:
    """Put a file in place all at once: a reader sees the old one or the whole new one.

    A special file (a pipe, /dev/stderr), and one in a folder that we may not write, is written directly.

    Raises:
        OSError: if neither way works.
    """
    target = os.path.realpath(path)  # rename(2) would replace a symbolic link, not what it points to
    if _is_special(target):
        _write_all(target, data, os.O_WRONLY)
        return
    beside = f"{target}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    try:
        _write_all(beside, data, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.replace(beside, target)
    except OSError:
        _remove(beside)
        _write_all(target, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _is_special(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _write_all(path: str, data: bytes, flags: int) -> None:
    with open(path, "wb", buffering=0, opener=lambda name, _flags: os.open(name, flags | os.O_CLOEXEC, 0o666)) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


if TYPE_CHECKING:

    @overload
    def record(
        fn: Callable[P, Coroutine[Any, Any, R]], error_handler: ErrorHandler | None = None
    ) -> Callable[P, Coroutine[Any, Any, R | None]]: ...

    @overload
    def record(fn: Callable[P, R], error_handler: ErrorHandler | None = None) -> Callable[P, R | None]: ...


def record(fn: Callable[..., Any], error_handler: ErrorHandler | None = None) -> Callable[..., Any]:
    """Decorate a worker's main function, so that its uncaught exception reaches the supervisor.

    Args:
        fn: `def` or `async def`; the exception goes on to the caller as if there were no decorator.
        error_handler: who writes; an `ErrorHandler` by default.

    Returns:
        A function that returns what `fn` returns, and None where `fn` raised `SystemExit(0)`. Any other `SystemExit`
        passes unrecorded: a program that chooses its exit code has said what it had to say. A `ChildFailedError`
        passes its root cause's error file on as this process's own.

    Source: torch's `record`.

    Example:
        >>> @record
        ... def main() -> int:
        ...     return 3
        >>> main()
        3
    """
    scribe = error_handler or ErrorHandler()

    if is_async(fn):

        @wraps(fn)
        async def recorded_async(*args: Any, **kwargs: Any) -> Any:
            scribe.initialize()
            try:
                return await fn(*args, **kwargs)
            except SystemExit as leave:
                if leave.code != 0:
                    raise
            except Exception as error:
                _record_failure(scribe, error)
                raise

        return recorded_async

    @wraps(fn)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        scribe.initialize()
        try:
            return fn(*args, **kwargs)
        except SystemExit as leave:
            if leave.code != 0:
                raise
        except Exception as error:
            _record_failure(scribe, error)
            raise

    return recorded


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether a call gives a coroutine, as far as the code behind a partial or bound method tells."""
    while isinstance(fn, partial):
        fn = fn.func
    fn = getattr(fn, "__func__", fn)
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
    return code is not None and bool(code.co_flags & CO_COROUTINE)


def _record_failure(scribe: ErrorHandler, error: BaseException) -> None:
    path, code = _root_cause_file(error)
    if path:
        try:
            scribe.dump_error_file(path, code)
            return
        except (OSError, ValueError):
            pass  # the root cause left no readable file: the error's own text tells it
    scribe.record_exception(error)


def _root_cause_file(error: BaseException) -> tuple[str, int]:
    # By its shape, so that torch's ChildFailedError counts too and nothing has to be imported.
    if type(error).__name__ != "ChildFailedError" or not getattr(error, "failures", None):
        return "", 0
    _, failure = error.get_first_failure()  # type: ignore[attr-defined]
    return (failure.error_file if os.path.isfile(failure.error_file) else ""), failure.exitcode
