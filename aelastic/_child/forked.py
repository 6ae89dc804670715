"""Make a worker of a process that was just forked, and run its function.

Where a spawned worker has its environment, folder, options and streams before its interpreter starts, a forked one
puts them in force here. It was forked with all signals blocked, and unblocks them when the host's handlers are gone.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import gc
import itertools
import os
import signal
import struct
import sys
import threading

from . import procfs, stacks, trampoline
from .function import perform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, NoReturn

    from .function import Call

NOT_STARTED = 127
"""Exit code of a worker whose settings could not be put in force; the supervisor is told what and why."""
PID = struct.Struct("<q")


def fork_apart() -> int:
    """Fork as `begin` does, and block until the child leads its session.

    Returns:
        0 in the child; the child's pid in the parent.

    Raises:
        OSError: if there can be no further process.
    """
    pid, ready_fd = begin()
    return pid and told_pid(ready_fd, pid)


def told_pid(ready_fd: int, pid: int) -> int:
    """Block until the child that `begin` forked leads its session, or has ended; give its pid, and close the pipe.

    Raises:
        ChildProcessError: if it ended before anybody knew its pid.
    """
    try:
        told = os.read(ready_fd, PID.size)
    finally:
        os.close(ready_fd)
    if not told and pid < 0:
        raise ChildProcessError(errno.ECHILD, "it ended at once")
    return int(PID.unpack(told)[0]) if told else pid


def begin() -> tuple[int, int]:
    """Fork with all signals blocked, so that none of them runs a handler of the parent's in the child.

    Returns:
        1. 0 in the child, where they stay blocked.
        2. The child's pid in the parent (-1 where Python hides it), and a pipe that is readable as soon as the child
           leads a session of its own, for `told_pid`.

    Raises:
        OSError: if there can be no further process.
    """
    ready_r, ready_w = os.pipe()
    pid = -1
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except Warning:  # from 3.12 on, in the parent of a threaded program; the child is there all the same
        pass
    except BaseException:
        os.close(ready_r)
        raise
    finally:
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(ready_w)
    if pid == 0:
        try:
            os.setsid()
            os.write(ready_w, PID.pack(os.getpid()))
            os.close(ready_w)
            os.close(ready_r)
        except BaseException:  # noqa: BLE001  # never back into the parent's stack
            os._exit(NOT_STARTED)
    return pid, ready_r


def run(
    receive_call: Callable[[], Call],
    *,
    streams: tuple[int, int, int],
    result_fd: int,
    status_fd: int,
    settings: Mapping[str, Any],
    unwanted: Iterable[int],
) -> NoReturn:
    """Become the worker, run its function and end; called in the child, never returns.

    Args:
        receive_call: gives the function and its arguments.
        streams: what becomes stdin, stdout and stderr.
        result_fd: where the result goes.
        status_fd: where `errno what` goes if something can't be put in force; closed when all is.
        settings: of the trampoline, and `env` and `cwd`.
        unwanted: descriptors of the parent's to close.
    """
    code = NOT_STARTED
    try:
        if _become(streams, status_fd, settings, unwanted):
            code = _exit_code(lambda: perform(receive_call, result_fd))
    finally:
        os._exit(code)  # never back into the parent's stack


def _become(
    streams: tuple[int, int, int], status_fd: int, settings: Mapping[str, Any], unwanted: Iterable[int]
) -> bool:
    step = "it can't be separated from its parent"
    try:
        _forget_host(unwanted)
        for step in _steps(streams, settings):  # noqa: B007  # read below, where it names what failed
            pass
    except (OSError, trampoline.Refused, ValueError, OverflowError) as error:
        number, why = (error.errno, "") if isinstance(error, OSError) else (None, f" ({error})")
        os.write(status_fd, f"{number or trampoline.INVALID} {step}{why}".encode("utf-8", "replace"))
        return False
    os.close(status_fd)
    return True


def _forget_host(unwanted: Iterable[int]) -> None:
    """Drop what is the parent's business: its exit hooks, its wake-up descriptor, its descriptors."""
    gc.freeze()  # what the parent left to be collected has finalizers that are none of ours
    signal.set_wakeup_fd(-1)
    threading.current_thread()._daemonic = False  # type: ignore[attr-defined]  # noqa: SLF001  # or all others would be
    if "asyncio.events" in sys.modules:
        sys.modules["asyncio.events"]._set_running_loop(None)  # noqa: SLF001
    atexit._clear()  # noqa: SLF001  # has no public name, and multiprocessing does it too
    threading._threading_atexits.clear()  # type: ignore[attr-defined]  # noqa: SLF001  # likewise
    for fd in unwanted:
        with contextlib.suppress(OSError):
            os.close(fd)
    _forget_executors()
    _forget_multiprocessing()


def _forget_executors() -> None:
    """Let the executors of this process end with it, and none of the parent's, whose threads are not here."""
    for name, register in (("thread", "_threads_queues"), ("process", "_threads_wakeups")):
        module = sys.modules.get(f"concurrent.futures.{name}")
        if module is not None:
            getattr(module, register).clear()
            threading._register_atexit(module._python_exit)  # type: ignore[attr-defined]  # noqa: SLF001


def _forget_multiprocessing() -> None:
    """Do what multiprocessing's `Process._bootstrap` does: its parent's children and finalizers are none of ours."""
    process, finalizers = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
    if process is not None:
        process._children = set()  # type: ignore[attr-defined]  # noqa: SLF001
        process._process_counter = itertools.count(1)  # type: ignore[attr-defined]  # noqa: SLF001
    if finalizers is not None:
        finalizers._finalizer_registry.clear()  # noqa: SLF001
        finalizers._run_after_forkers()  # noqa: SLF001
        atexit.register(finalizers._exit_function)  # noqa: SLF001  # joins this process's children


def _steps(streams: tuple[int, int, int], settings: Mapping[str, Any]) -> Iterable[str]:
    """Do one step after another; what an error in it means is yielded before each."""
    options: trampoline.Settings = {}
    for word in settings["words"]:
        name, _, value = word.partition("=")
        options.setdefault(name, []).append(value)
    yield "its cgroup can't be entered"
    for folder in options.get("cgroup", ()):
        trampoline.enter_cgroup(folder)
    yield "its signals can't be reset"
    faulthandler.disable()  # or it would believe, later, that what is reset here is still in place
    trampoline.reset_signals(ignore_hup=signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # this, and what is ignored, as in any Python program
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_IGN)
    yield "its streams can't be put in place"
    _take_streams(streams)
    if settings["cwd"] is not None:
        yield f"its directory can't become {settings['cwd']}"
        os.chdir(settings["cwd"])
    yield "its environment can't be set"
    os.environ.clear()
    os.environ.update(settings["env"])
    _show_lineage(settings["env"])
    yield from _options(options)
    stacks.show_on_signal(forked=True)


def _show_lineage(env: Mapping[str, str]) -> None:
    """Write whose we are to where /proc shows the environment, which is still the parent's; our children inherit it.

    Nobody needs what stood there: all that is in `os.environ` was copied as it was set. Best effort: where it can't be
    done, what leaves our session is found only while its parent lives.

    Source: proc_pid_stat(5), `env_start` and `env_end`; setproctitle(3) writes there too.
    """
    names = ("AELASTIC_LINEAGE", "AELASTIC_RUN_ID", "AELASTIC_RANK")
    shown = b"".join(os.fsencode(f"{name}={env[name]}") + b"\0" for name in names if name in env)
    fields = procfs.read("/proc/self/stat").rpartition(b") ")[2].split()
    begin, end = map(int, fields[47:49]) if len(fields) > 48 else (0, 0)
    if end - begin < len(shown):
        return
    with contextlib.suppress(OSError), open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(begin)
        memory.write(shown)


def _options(options: trampoline.Settings) -> Iterable[str]:
    yield "its user and groups can't be set"
    who = (options[name][0] if name in options else None for name in ("user", "group", "groups"))
    numbers = trampoline.identity(*who)
    appliers = {
        "nice": trampoline.nice,
        "cpus": trampoline.cpus,
        "umask": trampoline.umask,
        "rlimit": trampoline.rlimit,
    }
    for name, apply in appliers.items():
        for value in options.get(name, ()):
            yield f"{name} can't be set to {value}"
            apply(value)
    yield "its user and groups can't be set"
    trampoline.become(*numbers)


def _take_streams(streams: tuple[int, int, int]) -> None:
    # Out of the way first: one of them may be 0, 1 or 2 itself.
    copies = [os.dup(fd) for fd in streams]
    for target, copy in enumerate(copies):
        os.dup2(copy, target)
        os.close(copy)
    for fd in {*streams} - {0, 1, 2}:
        os.close(fd)
    # New objects: the old ones may hold what the parent has printed and not flushed. Never closed.
    sys.stdin = sys.__stdin__ = _text(0, "r", "strict")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _text(1, "w", "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, "w", "backslashreplace")  # type: ignore[misc]
    faulthandler.enable(2)


def _text(fd: int, mode: str, errors: str) -> Any:
    buffering = 1 if fd == 2 else -1
    return open(fd, mode, buffering, errors=errors, closefd=False)


def _exit_code(body: Callable[[], int]) -> int:
    """Run the body and what an interpreter does at its end; the exit code."""
    try:
        code = body()
    except SystemExit as leave:
        code = _code_of(leave)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    # Waits for threads that are no daemons, then calls the exit hooks.
    for end in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            end()
        except BaseException:  # noqa: BLE001  # shown, as an interpreter does, which ends all the same
            sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # None, closed, or what the user made of it
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def _code_of(leave: SystemExit) -> int:
    if isinstance(leave.code, int):
        return leave.code & 0xFF
    if leave.code is not None:
        sys.stderr.write(f"{leave.code}\n")
    return 0 if leave.code is None else 1
