"""Everything that came from the workers of a run: finding it, signalling it, seeing it gone.

Which process is whose, `census` says; here looks are shared, steps of a stop are taken and waited for. Everything is
bounded: a look that /proc doesn't answer is given up, and what was known before counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor
from typing import final

from .._child import cgroupfs, procfs
from .._child.procfs import Member
from .._results import Survivor
from . import census, platform
from .census import Blind, Census, Identity, Leader, Sight
from .cgroups import Cgroups
from .handle import Process
from .pace import Pace
from .reserve import Reserve
from .signals import Groups, signal_members

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 2.0
"""Seconds after which a tree that doesn't end is looked at again: it may have grown."""
LOOK_WITHIN = 5.0
"""Seconds that a look at /proc may take, where no step's deadline comes before: a read of a process whose memory is
locked in the kernel hangs with it."""
KILL_GRACE = 2.0
"""Seconds that SIGKILL always gets: the kernel has to take down what it ended, and we have to see it on a busy host."""
WATCHED = 16
"""Processes of a rank whose end is waited for at once, a descriptor each; the rest is looked for when they are gone."""

OnHit = Callable[[tuple[int, ...], int], None]
"""Is told which pids were sent which signal."""


@final
class Tree:
    """The processes of one run. Belongs to the running loop.

    Args:
        run_id: what their lineage shows.
        executor: where /proc is read; simultaneous questions share one reading that began after they were asked.
        cgroups: of the run, if it has any.
    """

    def __init__(self, run_id: str, executor: Executor, cgroups: Cgroups | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._executor = executor
        self._pace = Pace.of_running_loop()
        self._census = Census(run_id, cgroups)
        self._leaders: dict[int, Leader] = {}
        self._retired: list[Process] = []
        self._reserve = Reserve()
        self._last = Sight()
        self._looking = False
        self._next_look: asyncio.Future[Sight | None] | None = None

    def add(self, rank: int, process: Process) -> None:
        """Count the tree of a started process in; a rank's earlier process is closed, what it left stays known."""
        earlier = self._leaders.get(rank)
        if earlier is not None:
            self._retired.append(earlier.process)
        self._leaders[rank] = Leader(rank, process, procfs.now_ticks() - 1)
        self._close_retired()

    def close(self) -> None:
        """Close the handles of all processes. Idempotent."""
        self._retired += [leader.process for leader in self._leaders.values()]
        self._leaders.clear()
        self._close_retired()
        self._reserve.close()

    def _close_retired(self) -> None:
        if self._looking:
            return  # their descriptors are being asked
        for process in self._retired:
            process.close()
        self._retired.clear()

    async def members(self, rank: int | None = None) -> tuple[Member, ...]:
        """The processes that are alive, leaders included, zombies not.

        Args:
            rank: None means of the whole run.
        """
        await self._look(LOOK_WITHIN)
        return self._last.everything if rank is None else self._of(rank)

    async def is_gone(self, rank: int) -> bool:
        """Whether nothing of a rank is alive."""
        return await self._look(LOOK_WITHIN) and self._is_gone(rank)

    def _is_gone(self, rank: int) -> bool:
        """As the last look saw it: what no list shows, because it flees while it is read, its cgroup still counts."""
        return not self._of(rank) and rank not in self._last.populated

    async def by_rank(self, ranks: Collection[int]) -> dict[int, tuple[Member, ...]]:
        """The live processes of each of these ranks, by one look."""
        await self._look(LOOK_WITHIN)
        return {rank: self._of(rank) for rank in ranks}

    def _of(self, rank: int) -> tuple[Member, ...]:
        leader = self._leaders.get(rank)
        return self._last.of(rank, ended=leader is None or leader.process.has_ended())

    async def _look(self, within: float) -> bool:
        """Read /proc after now; False when that can't be done in time, and then `_last` is what was known before."""
        if self._next_look is None:
            self._next_look = self._loop.create_future()
            if not self._looking:
                self._loop.call_soon(self._begin_look)  # not at once: who asks in this turn shares it
        look = self._next_look
        await asyncio.wait({look}, timeout=max(within, 0))
        return look.done() and look.result() is not None

    def _begin_look(self) -> None:
        look, self._next_look = self._next_look, None
        if look is None:
            return
        try:
            reading = self._loop.run_in_executor(self._executor, self._sight, tuple(self._leaders.values()))
        except RuntimeError as error:  # the run's threads have been closed
            look.set_exception(error)
            look.exception()
            return
        self._looking = True
        reading.add_done_callback(lambda done: self._end_look(done, look))

    def _sight(self, leaders: tuple[Leader, ...]) -> Sight:
        with self._reserve.spent():
            return self._census.look(leaders)

    def _end_look(self, reading: asyncio.Future[Sight], look: asyncio.Future[Sight | None]) -> None:
        self._looking = False
        self._close_retired()
        if reading.cancelled():
            look.set_exception(RuntimeError("the look at /proc was given up: the run's threads have been closed"))
            look.exception()  # whoever asked may have stopped waiting
        elif isinstance(error := reading.exception(), Blind):
            look.set_result(None)
        elif error is not None:
            look.set_exception(error)
            look.exception()
        else:
            self._last = reading.result()
            look.set_result(self._last)
        self._begin_look()

    async def press(self, rank: int, sig: int, until: float, *, hurry: asyncio.Future[None], on_hit: OnHit) -> bool:
        """Send a signal to everything of a rank, and wait until nothing is left.

        Everybody gets it once; SIGKILL goes again to whatever is still there, and to whole groups and cgroups at once,
        so that nothing can fork faster than it is killed. Every other signal is followed by SIGCONT.

        Args:
            until: when to give up, on the loop's clock.
            hurry: done when another step shall begin at once.
            on_hit: told of the leader at once, of the others as they are found.

        Returns:
            True when nothing of the rank is alive.
        """
        await self._pace.signal_admitted()
        if sig == signal.SIGKILL:
            until = max(until, self._loop.time() + KILL_GRACE)
        began = procfs.now_ticks()
        by_group = self._press_leader(rank, sig, on_hit)
        hit: set[Identity] = set()
        pause, rounds, empty = FIRST_PAUSE, 0, 0
        while True:
            looked = await self._look(min(until - self._loop.time(), LOOK_WITHIN))
            members = self._of(rank)
            if looked and self._is_gone(rank):
                empty += 1
                if rounds < empty * 2:
                    return True
                continue  # it grew while it was pressed: one look might have missed the last one
            if sig == signal.SIGKILL:
                await self._kill_cgroup(rank)
            strays = self._not_reached(rank, members, hit, began if by_group else None)
            if strays:
                await self._hit(strays, sig, on_hit, stubborn=rounds > 1)
            if sig != signal.SIGKILL:
                hit |= {member.identity for member in members}
            if hurry.done() or self._loop.time() >= until:
                return False
            await self._ends(members, min(until, self._loop.time() + pause), hurry)
            pause, rounds = min(pause * 2, LONGEST_PAUSE), rounds + 1

    def _press_leader(self, rank: int, sig: int, on_hit: OnHit) -> bool:
        """Signal the leader's group at once; whether it has one that can be signalled."""
        leader = self._leaders.get(rank)
        if leader is None:
            return False
        was_alive = not leader.process.has_ended()  # asked first: SIGKILL may have ended it by the next line
        if not leader.process.signal_group(sig):
            return False
        if sig != signal.SIGKILL:
            leader.process.signal_group(signal.SIGCONT)
        if was_alive:
            on_hit((leader.process.pid,), sig)
        return True

    async def _kill_cgroup(self, rank: int) -> None:
        leader = self._leaders.get(rank)
        if leader is not None and leader.process.cgroup:
            job = self._loop.run_in_executor(self._executor, cgroupfs.kill, leader.process.cgroup)
            await asyncio.wait({job}, timeout=LOOK_WITHIN)

    def _not_reached(
        self, rank: int, members: Iterable[Member], hit: set[Identity], began: int | None
    ) -> tuple[Member, ...]:
        """Who needs a signal of their own.

        Args:
            began: clock ticks at which the leader's group was signalled; None when it was not. Who was in it then has
                been reached: a second SIGINT or SIGTERM may mean something else.
        """
        leader = self._leaders.get(rank)
        group = 0 if leader is None or began is None else leader.process.pid
        return tuple(
            member
            for member in members
            if member.identity not in hit and (member.group != group or began is None or member.started > began)
        )

    async def _hit(self, members: tuple[Member, ...], sig: int, on_hit: OnHit, *, stubborn: bool) -> None:
        groups = Groups.NONE if sig != signal.SIGKILL else Groups.ALL if stubborn else Groups.LED
        job = self._loop.run_in_executor(self._executor, self._signal, members, sig, groups, self._last.groups)
        await asyncio.wait({job}, timeout=LOOK_WITHIN)
        if job.done() and not job.cancelled() and job.result():
            on_hit(job.result(), sig)

    def _signal(
        self, members: tuple[Member, ...], sig: int, groups: Groups, only_ours: frozenset[int]
    ) -> tuple[int, ...]:
        with self._reserve.spent():
            return signal_members(members, sig, groups, only_ours, self._census.run_id)

    async def _ends(self, members: Iterable[Member], until: float, hurry: asyncio.Future[None]) -> None:
        """Wait until these have ended, time is over, or something hurries."""
        ends: dict[int, asyncio.Future[None]] = {}
        try:
            for member in list(members)[:WATCHED]:
                self._watch(member, ends)
            waiting = {hurry, *ends.values()}
            while not hurry.done() and (left := until - self._loop.time()) > 0:
                _, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if ends and waiting == {hurry}:
                    return
        finally:
            for pidfd in ends:
                self._loop.remove_reader(pidfd)
                os.close(pidfd)

    def _watch(self, member: Member, ends: dict[int, asyncio.Future[None]]) -> None:
        with contextlib.suppress(OSError):  # no descriptor is left: those that we have, and the time, must do
            pidfd = platform.open_pidfd(member.pid)
            if pidfd is not None:
                end = ends[pidfd] = self._loop.create_future()
                self._loop.add_reader(pidfd, _set_once, end)

    async def survivors(self, rank: int) -> tuple[Survivor, ...]:
        """What is still alive of a rank, with the kernel's state and wait channel."""
        looked = await self._look(LOOK_WITHIN)
        members = self._of(rank)
        if not looked and not members:
            pid = self._leaders[rank].process.pid if rank in self._leaders else 0
            return (Survivor(rank, pid, "[unknown]", "unknown", "/proc could not be read to find out who is left"),)
        job = self._loop.run_in_executor(self._executor, census.survivors, rank, members)
        await asyncio.wait({job}, timeout=LOOK_WITHIN if looked else 0.5)
        if job.done():
            return job.result()
        why = "/proc did not answer when it was asked how this process is"
        return tuple(
            Survivor(rank, member.pid, "[unknown]", census.STATES.get(member.state, member.state), why)
            for member in members
        )

    async def holders(self, rank: int, inodes: Collection[int]) -> tuple[int, ...]:
        """The pids that hold one of these pipes open, as far as we may see; ours is left out.

        Args:
            rank: whose pipes they are.
            inodes: as `os.fstat` tells them for a pipe's ends.
        """
        links = frozenset(f"pipe:[{inode}]" for inode in inodes)
        since = self._leaders[rank].began_ticks if rank in self._leaders else self._census.since
        job = self._loop.run_in_executor(self._executor, census.holders, links, since)
        await asyncio.wait({job}, timeout=LOOK_WITHIN)
        return job.result() if job.done() else ()


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
