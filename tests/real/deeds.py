"""What the functions of whole runs do: importable, and light, because every worker imports it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def live(argv: tuple[str, ...]) -> None:
    """Live and end as a command of the list of ways to die does: its line of Python is run here, a shell as a child."""
    *flags, program = argv
    if flags[-1] == "-c" and os.path.realpath(flags[0]) == os.path.realpath(sys.executable):
        exec(program, {"__name__": "line"})
    else:
        code = os.spawnvp(os.P_WAIT, argv[0], argv)
        sys.exit(code)


def each(deeds: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]) -> Any:
    """Do the deed of this rank."""
    function, args = deeds[int(os.environ["AELASTIC_RANK"])]
    return function(*args)


def stay(value: Any) -> Any:
    """Return, and leave a thread that keeps the process."""
    import threading

    threading.Thread(target=threading.Event().wait).start()
    return value


def stay_failed(text: str) -> None:
    stay(None)
    raise ValueError(text)


def stay_unpicklable() -> Any:
    import threading

    return stay(threading.Lock())


class SlowToLoad:
    """Takes its time where it is loaded, after its worker has ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"import time; time.sleep({self.seconds})",))


def half(stopping: bool) -> Any:
    """Hand back a value, and stop or die in the middle of it."""
    import signal

    return [bytes(200_000), Signaller(signal.SIGSTOP if stopping else signal.SIGKILL)]


class Signaller:
    """Signals its own process where it is pickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        os.kill(os.getpid(), self.number)
        return (int, ())


def keep_child(seconds: float) -> str:
    """Return with a child of multiprocessing's that is no daemon, and that an interpreter's end waits for."""
    import multiprocessing
    import time

    multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,)).start()
    return "returned"


def keep_executor() -> str:
    """Return with an executor of threads that nobody has shut down."""
    from concurrent.futures import ThreadPoolExecutor

    kept.append(ThreadPoolExecutor(1))
    return str(kept[0].submit(str, "returned").result())


kept: list[Any] = []


async def nest(method: str) -> dict[int, Any]:
    """Start a run from a worker; its output goes to this worker's own."""
    from aelastic import DefaultLogsSpecs, Std, start_processes

    logs = DefaultLogsSpecs(tee=Std.ALL)
    async with start_processes("inner", say, {0: ("hello",)}, start_method=method, logs_specs=logs) as ctx:  # type: ignore[arg-type]
        return (await ctx.wait()).return_values


def say(text: str) -> str:
    sys.stdout.write(f"{text}\n")
    return text


def attach(name: str) -> None:
    """Write to shared memory that was given by its name."""
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(name)
    (memory.buf or memoryview(b""))[:5] = b"hello"
    memory.close()


def come_back_twice(raising: bool) -> str:
    """Fork, and come back from both processes."""
    child = os.fork()
    if child == 0:
        if raising:
            raise ValueError("from the child")
        return "from the child"
    os.waitpid(child, 0)
    return "from the worker"


def break_hook() -> None:
    """Fail, with a hook that fails too."""

    def hook(*_: Any) -> None:
        raise RuntimeError("hook")

    sys.excepthook = hook
    raise ValueError("original")


def close_everything(path: str) -> None:
    """Close what one did not open, as daemons do, and open a file that gets a number of those."""
    os.closerange(3, 256)
    for _ in range(64):
        os.open(path, os.O_WRONLY | os.O_CREAT)


def spin() -> str:
    """Run on in pure Python until a signal's handler ends it."""
    import signal
    import time

    told: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
    say("ready")
    sys.stdout.flush()
    tired = time.monotonic() + 10
    while not told and time.monotonic() < tired:
        pass
    return "told" if told else "tired"


def lose_streams() -> str:
    """Return with nothing left to flush."""
    sys.stdout.close()
    sys.stdout = sys.stderr = None
    return "returned"
