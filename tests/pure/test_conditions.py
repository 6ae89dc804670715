"""Conditions of readiness are values: they compose, check themselves, and say what is missing of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic import HealthPolicy, HttpGet, LinePattern, Notify, RankMappingError, Std, TcpPort
from aelastic._conditions import AllOf, AnyOf, Condition, as_condition
from aelastic._health.notify import parse
from aelastic._spec import check

LEAVES = (Notify(), TcpPort(1), TcpPort(2), LinePattern("up"))


async def is_up(ctx: Any, rank: int) -> bool:
    return True


def conditions() -> st.SearchStrategy[Condition]:
    """Any composition of the leaves."""
    return st.recursive(
        st.sampled_from(LEAVES),
        lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] & t[1] if t[2] else t[0] | t[1]),
        max_leaves=6,
    )


def truth(condition: Condition, met: set[Condition]) -> bool:
    """What `and` and `or` of Python make of it."""
    match condition:
        case AllOf(parts):
            return all(truth(part, met) for part in parts)
        case AnyOf(parts):
            return any(truth(part, met) for part in parts)
    return condition in met


@given(conditions(), st.sets(st.sampled_from(LEAVES)))
def test_a_composition_is_true_as_its_operators_say(condition: Condition, met: set[Condition]) -> None:
    """And it names what is missing exactly while it is not."""
    assert condition.is_met(met) == truth(condition, met)
    if not condition.is_met(met):
        missing = condition.missing(met, {})
        assert any(str(leaf) in missing for leaf in LEAVES if leaf not in met)
        if isinstance(condition, AllOf):
            assert not [leaf for leaf in met if str(leaf) in missing and "or" not in missing]


@given(conditions())
def test_more_facts_never_make_it_false(condition: Condition) -> None:
    """So that it may be asked after each fact."""
    order = [condition.is_met(LEAVES[:count]) for count in range(len(LEAVES) + 1)]
    assert order == sorted(order)
    assert order[-1]


def test_what_was_heard_last_is_told() -> None:
    """A port that refuses, a server that answers 503."""
    both = TcpPort(8080) & HttpGet("http://h/ready")
    told: dict[Condition, str] = {TcpPort(8080): "Connection refused"}
    assert both.missing((), told) == (
        "a connection to 127.0.0.1 port 8080 (last: Connection refused) and an answer from http://h/ready"
    )


def test_a_callable_composes_from_either_side() -> None:
    """`Notify() & is_up` and `is_up & Notify()` alike."""
    for composed in (Notify() & is_up, is_up & Notify(), Notify() | is_up, is_up | Notify()):
        assert "is_up(ctx, rank)" in composed.missing((), {})
        assert composed.is_met(set(composed.leaves()))


def test_captures_go_by_name_or_number() -> None:
    """A group that took no part is left out."""
    pattern = LinePattern(r"(?P<host>\w+):(\d+)( extra)?")
    match = pattern.compiled.search("at db:5432")
    assert match is not None
    assert LinePattern.captured(match) == {"host": "db", "2": "5432"}


WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: LinePattern("("), ValueError, "no regular expression"),
    (lambda: LinePattern(re.compile(b"x")), TypeError, "for text"),  # type: ignore[arg-type]
    (lambda: LinePattern("x", std=Std.NONE), ValueError, "Std.OUT"),
    (lambda: TcpPort("80"), TypeError, "whole number"),  # type: ignore[arg-type]
    (lambda: TcpPort(0), ValueError, "1 to 65535"),
    (lambda: TcpPort(80, ""), ValueError, "host is empty"),
    (lambda: HttpGet("127.0.0.1:80"), ValueError, "must be like"),
    (lambda: HttpGet("http://h:99999/"), ValueError, "must be like"),
    (lambda: HttpGet("http://h/\r\nX: y"), ValueError, "must be like"),
    (lambda: HttpGet("http://h/", expect=()), ValueError, "expect is empty"),
    (lambda: HttpGet("http://h/", expect="200"), TypeError, "status codes"),  # type: ignore[arg-type]
    (lambda: HttpGet("http://h/", timeout=0), ValueError, "more than 0"),
    (lambda: HealthPolicy(ready=3), TypeError, "HealthPolicy.ready: a condition is"),  # type: ignore[arg-type]
    (lambda: HealthPolicy(ready=Notify), TypeError, "HealthPolicy.ready: a condition is"),  # type: ignore[arg-type]
    (lambda: HealthPolicy(ready={0: "x"}), TypeError, "a condition is"),  # type: ignore[dict-item]
    (lambda: HealthPolicy(ready=Notify(), ready_timeout=-1), ValueError, "0 seconds or more"),
    (lambda: HealthPolicy(ready_timeout=1), ValueError, "nothing to wait for"),
    (lambda: HealthPolicy(watchdog=0), ValueError, "watchdog must be more than 0"),
    (lambda: HealthPolicy(interval=0), ValueError, "interval must be more than 0"),
    (lambda: HealthPolicy(usage_every=float("nan")), ValueError, "usage_every"),
    (lambda: HealthPolicy(start_order="random"), ValueError, "'sequential'"),  # type: ignore[arg-type]
    (lambda: Notify() & 3, TypeError, "a condition is"),  # type: ignore[operator]
]


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{error.__name__}: {text}" for _, error, text in WRONG])
def test_what_can_not_be_meant_is_told(wrong: tuple[Callable[[], object], type[Exception], str]) -> None:
    """At once, in a sentence that names the field."""
    make, error, text = wrong
    with pytest.raises(error, match=re.escape(text)):
        make()


def test_a_mapping_chooses_by_rank() -> None:
    """A rank that it leaves out is ready when it runs."""
    policy = HealthPolicy(ready={0: Notify(), 1: is_up, 2: None})
    assert [type(policy.condition_of(rank)).__name__ for rank in range(4)] == [
        "Notify",
        "Asked",
        "NoneType",
        "NoneType",
    ]


def test_a_rank_that_is_none_is_told() -> None:
    """Before anything is started."""
    with pytest.raises(RankMappingError, match=r"HealthPolicy\.ready has entries for 2"):
        check(
            "job", "true", {0: (), 1: ()}, None, None, "spawn", duplicate_stdout_filters=None,
            duplicate_stderr_filters=None, options=None, stop=None, health=HealthPolicy(ready={2: Notify()}),
        )  # fmt: skip


def test_one_status_may_stand_alone() -> None:
    """And a collection of them is kept as a set."""
    assert HttpGet("http://h/", expect=204).expects(204)
    assert not HttpGet("http://h/", expect=[200, 204]).expects(201)
    assert HttpGet("https://h").expects(301)


@given(st.binary())
def test_any_datagram_can_be_read(datagram: bytes) -> None:
    """What a worker sends is never trusted to be the protocol."""
    assert all("\n" not in name + value for name, value in parse(datagram).items())


def test_only_a_newline_ends_an_assignment() -> None:
    """What a person reads as a line break in a status is still the status."""
    assert parse("STATUS=a\u2028b\fREADY=1\nWATCHDOG=1".encode()) == {"STATUS": "a\u2028b\fREADY=1", "WATCHDOG": "1"}


def test_a_condition_made_twice_is_one() -> None:
    """`as_condition` leaves conditions alone."""
    assert as_condition(TcpPort(1)) == TcpPort(1)
    assert as_condition(is_up) != as_condition(is_up)
