"""The supervisor's side of the guard: one helper process that outlives us if we are killed, shared by all runs.

It is started with the first run and gone with the last. It belongs to the process and not to an event loop: runs may
live in loops of several threads, and a host that forks starts a guard of its own in the child. What the guard does
with a death is told in `_child.guard`; where there is no /proc it finds nothing, and can end nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import final

from ._child import procfs
from ._exit import ExitStatus
from ._limits import shortage
from ._policies import StopPolicy
from ._tasks import outlast, service

PROGRAM = Path(__file__).parent / "_child" / "guard.py"
INHERITED = ("AELASTIC_LINEAGE", "LD_LIBRARY_PATH")
"""Variables that the guard keeps: an outer run must find it, and the interpreter its libraries."""
BACKLOG_BYTES = 1024 * 1024
"""A guard that leaves more than this unread is not working; it is replaced."""
RETRY_SECONDS = 0.05
"""How soon a full pipe is tried again."""
RESTART_SECONDS = 1.0
"""The least time between two starts after a loss."""
END_SECONDS = 5.0
"""How long the end of a guard is awaited at the most."""

SERVER = -1
"""In the place of a rank: the fork server, which is none of them."""

OnLost = Callable[[int, str], None]


async def watch(
    run_id: str, *, stop: StopPolicy, journal: str, on_lost: OnLost, executor: Executor, cgroup: str = ""
) -> Watch:
    """Put a run into the guard's care. On return the run's id is in its pipe; its boot is not awaited.

    Args:
        run_id: as the lineage of its workers shows it.
        stop: `on_supervisor_death`, `orphan_grace` and the first step's signal are passed on.
        journal: path of the run's journal, `""` when there is none.
        on_lost: called in this loop with the pid of a guard that died and a sentence why.
        executor: the run's own; starts the guard, and another one after a loss.
        cgroup: the folder in which the run's cgroups are, or will be; `""` for none.

    Raises:
        OSError: of the errno's class, if the guard can't be started.

    Cancellation: the run is taken out again.
    """
    watched = Watch(run_id, stop=stop, journal=journal, on_lost=on_lost, executor=executor, cgroup=cgroup)
    try:
        await outlast(asyncio.get_running_loop().run_in_executor(executor, _house.enter, watched))
        watched.attend()
    except BaseException:
        await watched.release()
        raise
    return watched


@final
class Watch:
    """A run in the guard's care. Used in the loop that made it."""

    def __init__(
        self, run_id: str, *, stop: StopPolicy, journal: str, on_lost: OnLost, executor: Executor, cgroup: str
    ) -> None:
        paths = f"{_in_hex(journal)} {_in_hex(cgroup)}"
        first, _ = stop.steps[0]
        self.run_id = run_id
        self.loop = asyncio.get_running_loop()
        policy = f"{stop.on_supervisor_death} {stop.orphan_grace!r} {int(first)}"
        self._opening = f"run {run_id} {policy} {procfs.now_ticks() - 1} {paths}\n"
        self._workers: dict[int, str] = {}
        self._on_lost = on_lost
        self._executor = executor
        self._sentry = -1
        self._restart: asyncio.Task[None] | None = None
        self._resigned = False
        self._retry: asyncio.TimerHandle | None = None
        self._released = False

    def worker(self, rank: int, pid: int, pidfd: int | None, held_ticks: int) -> None:
        """Name a worker to the guard; it takes the place of the rank's former one.

        It is in the pipe on return, whatever becomes of us then; the guard takes its time to read it.

        Args:
            pid: our child, leader of its own session.
            pidfd: of it; None where there are none.
            held_ticks: clock ticks since boot at which the pid was certainly its own; 0 when that isn't known.
        """
        if not held_ticks:
            return  # ended and collected already: what it left behind is found by its lineage
        inode = 0 if pidfd is None else procfs.inode_of(pidfd)
        self._workers[rank] = line = f"worker {self.run_id} {rank} {pid} {held_ticks} {inode}\n"
        self._tell(line)

    @property
    def lines(self) -> str:
        """All that a guard must know of the run."""
        return "".join([self._opening, *self._workers.values()])

    async def release(self) -> None:
        """Take the run out, after nothing of it is left; the last one ends the guard and awaits its end. Idempotent.

        Cancellation: raised after the release.
        """
        if self._released:
            return
        self._released = True
        if self._retry is not None:
            self._retry.cancel()
        await outlast(service(self._leave(), name=f"release {self.run_id} from the guard"))

    async def _leave(self) -> None:
        if self._restart is not None:
            await asyncio.wait({self._restart})
        last = _house.leave(self)
        if last is not None:
            last.kill()
            await self._await_end(last)
            last.close()
        self._unwatch()

    async def _await_end(self, process: GuardProcess) -> None:
        """Wait for a killed guard; it takes a millisecond, the kernel willing."""
        self._unwatch()
        try:
            self._sentry = os.dup(process.sentry)
        except OSError:  # no pidfds here, or no descriptor left
            await self.loop.run_in_executor(self._executor, process.wait)
            return
        ended = self.loop.create_future()
        self.loop.add_reader(self._sentry, _resolve, ended)
        await asyncio.wait({ended}, timeout=END_SECONDS)

    def attend(self) -> bool:
        """Look out for the end of the guard; False when none is in office."""
        self._unwatch()
        process, self._sentry = _house.lookout()
        if process is not None and self._sentry >= 0:
            self.loop.add_reader(self._sentry, self._guard_ended, process)
        return process is not None

    def _unwatch(self) -> None:
        if self._sentry >= 0:
            self.loop.remove_reader(self._sentry)
        self.disown()

    def disown(self) -> None:
        """Close the descriptor without touching the loop, which in a forked child is shared with the parent's."""
        if self._sentry >= 0:
            os.close(self._sentry)
        self._sentry = -1

    def _guard_ended(self, process: GuardProcess) -> None:
        self._unwatch()
        reason = process.ending()
        _house.dismiss(process)
        if not self._released:
            self._restart = service(self._replace(process), name="replace the guard", on_cancel=self._resign)
            self._on_lost(process.pid, reason)

    def _resign(self) -> None:
        self._resigned = True

    async def _replace(self, lost: GuardProcess) -> None:
        """Start another guard, which is told everything again, or find that another run has started it."""
        due = lost.started + RESTART_SECONDS
        told = False
        while not (self._released or self._resigned):
            if time.monotonic() < due:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                await self.loop.run_in_executor(self._executor, _house.enter, self)
                if self.attend():
                    return
            except OSError as error:
                if not told:
                    self._on_lost(lost.pid, f"{error}; it is tried again every {RESTART_SECONDS:g} s")
                told = True
                due = time.monotonic() + RESTART_SECONDS

    def _tell(self, text: str = "") -> None:
        """Tell the guard in office, and try a full pipe again until it has read what waits for it."""
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self.loop.call_later(RETRY_SECONDS, self._tell) if _house.tell(text) else None


def _in_hex(path: str) -> str:
    return os.fsencode(os.path.abspath(path)).hex() if path else "-"


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@final
class GuardProcess:
    """One guard: its process, which we reap, and our end of its lifeline.

    Raises:
        OSError: of the errno's class, if it can't be started.
    """

    def __init__(self) -> None:
        try:
            reading, self._lifeline = os.pipe()
        except OSError as error:
            raise _not_started(error) from error
        try:
            os.set_blocking(self._lifeline, False)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(PROGRAM), str(os.getpid()), str(reading)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in INHERITED if name in os.environ},
                pass_fds=(reading,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._lifeline)
            raise _not_started(error) from error
        finally:
            os.close(reading)
        self.pid = self._process.pid
        self.sentry = procfs.open_pidfd(self.pid)
        self.started = time.monotonic()
        self._backlog = b""

    def tell(self, text: str) -> bool:
        """Send lines without ever waiting; True when some could not be sent yet."""
        self._backlog += text.encode()
        try:
            while self._backlog:
                self._backlog = self._backlog[os.write(self._lifeline, self._backlog) :]
        except BlockingIOError:
            if len(self._backlog) > BACKLOG_BYTES:
                self.kill()
        except OSError:  # it has ended, as its sentry will tell
            return False
        return bool(self._backlog)

    def kill(self) -> None:
        """End it at once; it has nothing to finish while we live."""
        if self.sentry < 0:
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.sentry, signal.SIGKILL)  # its number may be another's by now

    def wait(self) -> None:
        """Block until it has ended, and reap it."""
        self._process.wait()

    def ending(self) -> str:
        """How it ended, in words; it is reaped with that."""
        returncode = self._process.poll()
        return "it is not answering" if returncode is None else ExitStatus.from_returncode(returncode).describe()

    def close(self) -> None:
        """Reap it and give the descriptors back; idempotent."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
        if self.sentry >= 0:
            os.close(self.sentry)
        self._lifeline = self.sentry = -1
        self._process.poll()

    def disown(self) -> None:
        """In a forked child: it is the parent's; only our copies of its descriptors are closed."""
        self._process.returncode = 0  # or Popen would warn that it still runs
        with contextlib.suppress(OSError):
            self.close()


def _not_started(error: OSError) -> OSError:
    return OSError(
        error.errno, f"the guard process could not be started: {shortage(error.errno or 0) or error.strerror}"
    )


@final
class _House:
    """Who is in the care of which guard, in this process. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.guard: GuardProcess | None = None
        self._watches: dict[str, Watch] = {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()

    def enter(self, watched: Watch) -> None:
        """Register a run and see that a guard knows of it; starts one if there is none. Blocks for some milliseconds.

        Raises:
            OSError: if a guard is needed and can't be started.
        """
        with self._starting:
            with self._lock:
                known = self._watches.get(watched.run_id) is watched
                self._watches[watched.run_id] = watched
                if self.guard is not None:
                    if not known:
                        self.guard.tell(watched.lines)
                    return
            guard = GuardProcess()  # not under the lock that event loops take
            with self._lock:
                self.guard = guard
                guard.tell("".join(each.lines for each in self._watches.values()))

    def tell(self, line: str) -> bool:
        """Pass a line on; True when some of what was told waits in a full pipe."""
        with self._lock:
            return self.guard is not None and self.guard.tell(line)

    def lookout(self) -> tuple[GuardProcess | None, int]:
        """The guard in office, and a pidfd of it for the caller to close; -1 where there are no pidfds.

        Raises:
            OSError: if there is no descriptor left.
        """
        with self._lock:
            guard = self.guard
            return guard, -1 if guard is None or guard.sentry < 0 else os.dup(guard.sentry)

    def dismiss(self, guard: GuardProcess) -> None:
        """Take a dead guard out of office."""
        with self._lock:
            if self.guard is guard:
                self.guard = None
                guard.close()

    def leave(self, watched: Watch) -> GuardProcess | None:
        """Take a run out; the guard to end when it was the last."""
        with self._lock:
            if self._watches.get(watched.run_id) is watched:
                del self._watches[watched.run_id]
            guard = self.guard
            if self._watches:
                if guard is not None:
                    guard.tell(f"end {watched.run_id}\n")
                return None
            self.guard = None
            return guard

    def forked(self) -> None:
        """Begin anew in a forked child, whose parent's guard and runs are not its own."""
        guard, watches = self.guard, self._watches
        self.guard, self._watches = None, {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        if guard is not None:
            guard.disown()
        for each in watches.values():
            each.disown()


_house = _House()
os.register_at_fork(after_in_child=_house.forked)
