"""The rules of a worker's life."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic._lifecycle import NEXT, Fact, State, after, outcome, schedule


def test_every_state_can_be_asked_to_stop() -> None:
    assert all(Fact.STOP_ASKED in NEXT[state] for state in State)


def test_a_missing_transition_names_rank_state_and_fact() -> None:
    with pytest.raises(RuntimeError, match="rank 4: END_REACHED can't happen to a worker that is RUNNING"):
        after(4, State.RUNNING, Fact.END_REACHED)


def test_the_exit_of_an_unkillable_worker_changes_nothing_any_more() -> None:
    given_up = after(0, after(0, State.RUNNING, Fact.STOP_ASKED), Fact.GIVEN_UP)
    for fact in (Fact.EXIT_SEEN, Fact.END_REACHED, Fact.EXIT_SEEN):
        given_up = after(0, given_up, fact)
    assert given_up is State.UNKILLABLE


def test_who_exits_first_is_never_counted_as_stopped() -> None:
    exited = after(0, State.RUNNING, Fact.EXIT_SEEN)
    assert after(0, exited, Fact.STOP_ASKED) is State.EXITED


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 1e6)), min_size=1), st.floats(0, 1e6))
def test_the_deadlines_of_a_stop_never_go_back(steps: list[tuple[int, float]], now: float) -> None:
    dues = [due.until for due in schedule(steps, now)]
    assert dues == sorted(dues)
    assert dues[0] >= now


@pytest.mark.parametrize(
    ("failed", "survived", "closed", "expected"),
    [
        (False, False, False, "succeeded"),
        (False, False, True, "stopped"),
        (True, False, True, "failed"),
        (False, True, True, "failed"),
    ],
)
def test_a_failure_or_a_survivor_outweighs_a_close(failed: bool, survived: bool, closed: bool, expected: str) -> None:
    assert outcome(failed=failed, survived=survived, closed=closed) == expected
