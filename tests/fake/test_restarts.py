"""Restarts in virtual time: an hour in milliseconds, and whatever may happen in whatever order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from aelastic import AttemptStarted, Backoff, RestartPolicy, RestartScheduled, RunFinished, StopPolicy, WorkerStarted
from tests.fake.world import FakeProcess, World

LONG = os.environ.get("AELASTIC_TEST_LONG", "") not in ("", "0")
PARTS, SCHEDULES = (40, 250) if LONG else (1, 200)
"""Schedules of each part; no single test may take minutes."""
STEPS = StopPolicy(steps=((15, 5.0), (9, 1.0)), drain=1.0)


@contextmanager
def world(nprocs: int, restart: RestartPolicy, stop: StopPolicy = STEPS) -> Iterator[World]:
    made = World(nprocs, restart, stop)
    try:
        yield made
    finally:
        made.close()
        made.end()


def test_an_hour_of_a_crash_loop() -> None:
    """Each life takes a second; the times between them double to the cap, and stay there for the hour."""
    with world(1, RestartPolicy(max_restarts=1000, backoff=Backoff(jitter=0.0))) as fake:
        fake.on_start = lambda process: fake.loop.call_later(1.0, process.end, 3)
        fake.wait(3600)
        starts = [at for at, _ in fake.seen(WorkerStarted)]
    gaps = [later - earlier - 1.0 for earlier, later in pairwise(starts)]
    assert gaps[:8] == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30])
    assert gaps[8:] == pytest.approx([30.0] * (len(gaps) - 8))
    assert len(starts) == 121


def test_an_hour_of_a_daemon() -> None:
    """What ends well every two minutes is started again after the first delay, and its window never fills."""
    policy = RestartPolicy(max_restarts=2, window=200.0, when="always", backoff=Backoff(initial=5.0, jitter=0.0))
    with world(2, policy) as fake:
        fake.on_start = lambda process: fake.loop.call_later(120.0 + process.rank, process.end, 0)
        fake.wait(3600)
        starts = [at for at, event in fake.seen(WorkerStarted) if event.rank == 0]
    assert [later - earlier for earlier, later in pairwise(starts)] == pytest.approx([126.0] * 28)


def test_ranks_have_budgets_of_their_own() -> None:
    """One crash loop ends after its own restarts, whatever the others have spent."""
    policy = RestartPolicy(max_restarts=3, scope="rank", backoff=Backoff(initial=1.0, jitter=0.0))
    with world(3, policy) as fake:
        lives = {0: 100.0, 1: 1.0, 2: 1000.0}
        fake.on_start = lambda process: fake.loop.call_later(lives[process.rank], process.end, 3)
        fake.do(fake.run.finished)
        result = fake.run.result
    assert result is not None
    assert [sorted(failures) for failures in result.history] == [[1]] * 4
    assert (list(result.failures), sorted(result.victims), result.attempts) == ([1], [0, 2], 4)


def test_a_long_history_keeps_every_failure_and_little_of_the_old_ones() -> None:
    """A daemon that crashes for months doesn't fill its supervisor."""
    with world(1, RestartPolicy(max_restarts=150, backoff=Backoff(initial=0.0))) as fake:
        fake.on_start = lambda process: fake.loop.call_soon(process.end, 3)
        fake.do(fake.run.finished)
        result = fake.run.result
    assert result is not None
    assert [failures[0].exitcode for failures in result.history] == [3] * 151


LIVES = st.tuples(st.sampled_from([None, 0.0, 0.01, 0.2, 1.0, 30.0]), st.sampled_from([3, 3, 3, 0, -9]), st.booleans())
"""How long a worker lives, None for ever; its return code; whether it leaves something behind."""
MOMENTS = st.sampled_from([0.0, 0.0, 0.0, 0.3])


class Schedule(RuleBasedStateMachine):
    """Any exits, failing starts and stops, in any order and at any time."""

    @initialize(
        nprocs=st.integers(1, 3),
        scope=st.sampled_from(["gang", "rank"]),
        when=st.sampled_from(["failure", "failure", "always"]),
        most=st.integers(0, 4),
        window=st.sampled_from([None, 5.0, 60.0]),
        initial=st.sampled_from([0.0, 0.5, 20.0]),
        on_failure=st.sampled_from(["stop", "stop", "continue", 2.0]),
        lives=st.lists(LIVES, min_size=1, max_size=8),
        moments=st.tuples(MOMENTS, MOMENTS),
        hurries=st.booleans(),
    )
    def begin(
        self, nprocs: int, most: int, window: Any, initial: float, on_failure: Any, lives: list[Any],
        moments: tuple[float, float], hurries: bool, **chosen: Any,
    ) -> None:  # fmt: skip
        self.policy = RestartPolicy(max_restarts=most, window=window, backoff=Backoff(initial=initial), **chosen)
        self.moments = moments
        stop = dataclasses.replace(STEPS, on_failure=on_failure)
        self.world = World(nprocs, self.policy, stop)
        self.world.spawn_seconds, self.world.settle_seconds = moments
        self.world.on_start = lambda process: self.is_born(process, *lives[process.pid % len(lives)])
        if not hurries:
            self.world.wait(1.0)

    def is_born(self, process: FakeProcess, seconds: float | None, code: int, leaves: bool) -> None:
        if seconds is not None:
            process.left = leaves
            self.world.loop.call_later(seconds, process.end, code)

    @rule(rank=st.integers(0, 2), code=st.sampled_from([0, 3, 3, -9]))
    def a_worker_ends(self, rank: int, code: int) -> None:
        for process in self.world.living(rank):
            process.end(code)

    @rule(rank=st.integers(0, 2))
    def the_next_start_fails(self, rank: int) -> None:
        self.world.refused.add(rank)

    @rule(deaf=st.booleans())
    def workers_change(self, deaf: bool) -> None:
        self.world.deaf = deaf

    @rule(rank=st.integers(0, 2), immortal=st.sampled_from([False, False, True]))
    def a_worker_can_not_be_killed(self, rank: int, immortal: bool) -> None:
        for process in self.world.living(rank):
            process.immortal = process.immortal or immortal

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.2, 1.0, 10.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(turns=st.integers(1, 40))
    def the_loop_turns(self, turns: int) -> None:
        for _ in range(turns):
            self.world.wait(0)

    @rule(steps=st.sampled_from([None, ((9, 1.0),)]), seconds=st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.4, 1.1, 40.0]))
    def the_caller_stops(self, steps: Any, seconds: float) -> None:
        self.world.loop.call_later(seconds, self.world.close, steps)

    @invariant()
    def never_two_at_once_and_never_after_a_stop(self) -> None:
        assert not self.world.wrong

    @invariant()
    def no_budget_is_exceeded(self) -> None:
        by_rank: dict[Any, list[float]] = {}
        for at, event in self.world.seen(RestartScheduled):
            by_rank.setdefault(event.rank, []).append(at)
        window = self.policy.window or float("inf")
        for instants in by_rank.values():
            assert all(
                sum(last - window < at <= last for at in instants) <= self.policy.max_restarts for last in instants
            )

    @invariant()
    def every_attempt_but_the_first_was_scheduled(self) -> None:
        begun: dict[Any, int] = {}
        for _, event in self.world.seen(AttemptStarted):
            begun[event.rank] = begun.get(event.rank, -1) + 1
            assert event.attempt == begun[event.rank]
        scheduled = [event.rank for _, event in self.world.seen(RestartScheduled)]
        assert all(count <= scheduled.count(rank) for rank, count in begun.items())

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.close()
        self.world.end()
        self.the_result_holds()

    def the_result_holds(self) -> None:
        """The end is what was seen on the way."""
        self.never_two_at_once_and_never_after_a_stop()
        self.no_budget_is_exceeded()
        assert isinstance(self.world.events[-1][1], RunFinished)
        assert all(process.immortal for process in self.world.living())
        result = self.world.run.result
        if result is not None:
            attempts = 1 + max(event.attempt for _, event in self.world.seen(AttemptStarted))
            assert result.attempts == len(result.history) == attempts
            assert bool(self.world.living()) == bool(result.survivors)
            assert (result.outcome == "failed") >= bool(result.survivors)
            assert result.outcome != "succeeded" or not result.failures
            assert result.outcome != "stopped" or self.world.closed_at is not None
        if self.world.closed_at is not None:
            finished = self.world.events[-1][0]
            assert finished <= self.world.closed_at + STEPS.bound + STEPS.drain + sum(self.moments) + 1.0


@pytest.mark.parametrize("part", range(PARTS))
def test_any_schedule(part: int) -> None:
    """Stop beats start; never two incarnations of a rank at once; never a restart after a close; no budget exceeded."""
    run_state_machine_as_test(
        Schedule,
        settings=settings(
            max_examples=SCHEDULES, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
