"""Budget, window and backoff: rules over numbers, an hour in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic import Backoff, ProcessFailure, RestartPolicy
from aelastic._restart import Budget, Decision, Ended, GiveUp, Rest, Restart

AT_ONCE = Backoff(initial=0.0)
STEADY = Backoff(initial=1.0, factor=1.0, jitter=0.0)
SUCCESS = Ended(failures={}, seconds=1.0)


def failure(rank: int = 0, seconds: float = 1.0, **fields: Any) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=3, error_file="", seconds=seconds, **fields)


def failed(seconds: float = 1.0, **fields: Any) -> Ended:
    return Ended(failures={0: failure(seconds=seconds, **fields)})


def lives(
    policy: RestartPolicy, seconds: float, *, until: float, chance: float = 0.0
) -> Iterator[tuple[float, Decision]]:
    """What fails `seconds` after each start, until it is given up or the time is over: when, and the decision."""
    budget, now = Budget(policy), seconds
    while now < until:
        decision = budget.decide(failed(seconds), now=now, chance=chance)
        yield now, decision
        if not isinstance(decision, Restart):
            return
        now += decision.delay + seconds


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_budget_for_all_time_is_spent_once(most: int) -> None:
    """So many restarts, however far apart, and then a reason that names the number."""
    budget = Budget(RestartPolicy(max_restarts=most, backoff=AT_ONCE))
    decisions = [budget.decide(failed(), now=hour * 3600.0, chance=0.5) for hour in range(most + 2)]
    assert [type(decision) for decision in decisions] == [Restart] * most + [GiveUp] * 2
    assert isinstance(decisions[-1], GiveUp)
    assert f"budget of {most} restart" in decisions[-1].reason


def test_without_restarts_there_is_nothing_to_say() -> None:
    """The default policy rests, whatever happened."""
    budget = Budget(RestartPolicy())
    assert budget.decide(failed(), now=0.0, chance=0.0) == Rest()
    assert budget.decide(SUCCESS, now=0.0, chance=0.0) == Rest()


def test_a_window_forgets() -> None:
    """A restart counts until the window has passed, to the instant."""
    budget = Budget(RestartPolicy(max_restarts=2, window=60.0, backoff=AT_ONCE))
    kinds = [type(budget.decide(failed(), now=now, chance=0.0)) for now in (0.0, 59.0, 59.9, 60.0, 60.1, 119.0)]
    assert kinds == [Restart, Restart, GiveUp, Restart, GiveUp, Restart]


@given(
    most=st.integers(1, 4),
    window=st.floats(0.5, 100.0),
    gaps=st.lists(st.floats(0.0, 60.0), min_size=1, max_size=60),
)
def test_no_window_ever_holds_more_restarts_than_the_budget(most: int, window: float, gaps: list[float]) -> None:
    """And none is refused while there is room."""
    budget, now, granted = Budget(RestartPolicy(max_restarts=most, window=window, backoff=AT_ONCE)), 0.0, list[float]()
    for gap in gaps:
        now += gap
        recent = [at for at in granted if now - at < window]
        if isinstance(budget.decide(failed(), now=now, chance=0.0), Restart):
            granted.append(now)
            assert len(recent) < most
        else:
            assert len(recent) == most


def test_an_hour_of_crashes_takes_milliseconds() -> None:
    """What crashes a second after each start: the delays double to the cap and stay there."""
    policy = RestartPolicy(max_restarts=1000, backoff=Backoff(jitter=0.0))
    hour = list(lives(policy, 1.0, until=3600.0))
    delays = [decision.delay for _, decision in hour if isinstance(decision, Restart)]
    assert delays[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert set(delays[8:]) == {30.0}
    assert len(delays) == 121


def test_an_hour_of_a_daemon_that_fails_now_and_then() -> None:
    """What keeps up for a minute begins with the first delay again, and its window never fills."""
    policy = RestartPolicy(max_restarts=2, window=100.0, backoff=Backoff(jitter=0.0, reset_after=60.0))
    decisions = [decision for _, decision in lives(policy, 61.0, until=3600.0)]
    assert [decision.delay for decision in decisions if isinstance(decision, Restart)] == [0.5] * 58


@given(
    initial=st.floats(0.0, 100.0),
    factor=st.floats(1.0, 1e6),
    more=st.floats(0.0, 1000.0),
    jitter=st.floats(0.0, 1.0),
    chances=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=400),
)
def test_a_delay_is_never_longer_than_the_cap(
    initial: float, factor: float, more: float, jitter: float, chances: list[float]
) -> None:
    """Nor shorter than the jitter allows, however many there were; and without jitter they never become shorter."""
    backoff = Backoff(initial=initial, factor=factor, maximum=initial + more, jitter=jitter)
    budget = Budget(RestartPolicy(max_restarts=len(chances), backoff=backoff))
    plain = initial
    for chance in chances:
        decision = budget.decide(failed(), now=0.0, chance=chance)
        assert isinstance(decision, Restart)
        assert plain * (1 - jitter) <= decision.delay * (1 + 1e-9)
        assert decision.delay <= plain <= backoff.maximum
        plain = min(plain * factor, backoff.maximum)


def test_a_success_is_restarted_only_when_asked_for() -> None:
    """`when="always"` is for daemons, and spends the budget the same way."""
    assert Budget(RestartPolicy(max_restarts=1)).decide(SUCCESS, now=0.0, chance=0.0) == Rest()
    budget = Budget(RestartPolicy(max_restarts=1, when="always", backoff=STEADY))
    assert isinstance(budget.decide(SUCCESS, now=0.0, chance=0.0), Restart)
    assert isinstance(budget.decide(SUCCESS, now=1.0, chance=0.0), GiveUp)


def test_a_daemon_that_ends_well_after_a_while_is_as_new() -> None:
    """Healthy time counts whether it ended well or badly."""
    budget = Budget(RestartPolicy(max_restarts=9, when="always", backoff=Backoff(jitter=0.0, reset_after=10.0)))
    ends = [Ended(failures={}, seconds=seconds) for seconds in (1.0, 1.0, 10.0, 9.9)]
    decisions = [budget.decide(end, now=0.0, chance=0.0) for end in ends]
    assert [decision.delay for decision in decisions if isinstance(decision, Restart)] == [0.5, 1.0, 0.5, 1.0]


def test_retriable_decides_by_failure() -> None:
    """One failure of which it says no is enough, and it is named."""
    policy = RestartPolicy(max_restarts=5, retriable=lambda failure: failure.rank != 1, backoff=AT_ONCE)
    budget = Budget(policy)
    assert isinstance(budget.decide(failed(), now=0.0, chance=0.0), Restart)
    decision = budget.decide(Ended(failures={0: failure(0), 1: failure(1)}), now=0.0, chance=0.0)
    assert isinstance(decision, GiveUp)
    assert "rank 1" in decision.reason


@pytest.mark.parametrize(
    "data",
    [
        {"message": {"message": "m", "extraInfo": {"retriable": False}}},
        {"message": {"message": "m", "retriable": False}},
        {"message": "m", "retriable": False},
    ],
    ids=["extraInfo", "message", "top"],
)
def test_an_error_file_has_the_last_word(data: dict[str, Any]) -> None:
    """It knows what a callable can't; wherever in the file it says so."""
    policy = RestartPolicy(max_restarts=5, retriable=lambda _: True)
    decision = Budget(policy).decide(failed(error_file_data=data), now=0.0, chance=0.0)
    assert isinstance(decision, GiveUp)
    assert "not retriable" in decision.reason


def test_an_exception_may_say_it_too() -> None:
    """A function's exception carries the attribute where there is no error file."""
    error = ValueError("no use")
    error.retriable = False  # type: ignore[attr-defined]
    assert failure(exception=error).retriable is False
    assert failure(exception=ValueError()).retriable is None
    assert failure(error_file_data={"message": {"extraInfo": {"retriable": "no"}}}).retriable is None


def test_what_can_not_be_killed_is_not_restarted() -> None:
    """There are never two incarnations of a rank at once."""
    ended = Ended(failures={}, survived=True)
    decision = Budget(RestartPolicy(max_restarts=5)).decide(ended, now=0.0, chance=0.0)
    assert isinstance(decision, GiveUp)
    assert "alive" in decision.reason


def test_the_reason_is_the_root_cause() -> None:
    """A restart says what ended."""
    both = {0: failure(0, monotonic_ns=2), 1: failure(1, monotonic_ns=1, seconds=3.0)}
    decision = Budget(RestartPolicy(max_restarts=1)).decide(Ended(failures=both), now=0.0, chance=0.0)
    assert isinstance(decision, Restart)
    assert decision.reason.startswith("rank 1 (pid 101)")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_restarts": -1}, "0 or more"),
        ({"max_restarts": True}, "whole number"),
        ({"max_restarts": 1.5}, "whole number"),
        ({"window": 0}, "longer than 0"),
        ({"window": -1}, "0 seconds or more"),
        ({"scope": "node"}, "'gang' or 'rank'"),
        ({"when": "never"}, "'failure' or 'always'"),
        ({"backoff": 1.0}, "a Backoff"),
        ({"retriable": False}, "a function"),
    ],
    ids=str,
)
def test_a_policy_checks_itself(fields: dict[str, Any], error: str) -> None:
    """With a sentence that names the field."""
    with pytest.raises((TypeError, ValueError), match=error) as caught:
        RestartPolicy(**fields)
    assert f"RestartPolicy.{next(iter(fields))}" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"initial": -1.0},
        {"initial": "soon"},
        {"factor": 0.5},
        {"factor": float("inf")},
        {"maximum": 0.1},
        {"maximum": float("inf")},
        {"jitter": 1.5},
        {"jitter": float("nan")},
        {"reset_after": -1},
    ],
    ids=str,
)
def test_a_backoff_checks_itself(fields: dict[str, Any]) -> None:
    """With a sentence that names the field."""
    with pytest.raises((TypeError, ValueError), match=f"Backoff.{next(iter(fields))}"):
        Backoff(**fields)
