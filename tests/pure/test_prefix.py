"""A prefix stands before each line, once, and tells when the line began."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic._logs import DefaultLogsSpecs, LineOrigin
from aelastic._logs.lines import Prefixed
from aelastic._logs.prefix import DEFAULT_PREFIX, LinePrefix, Prefix, check_prefix
from aelastic._std import Std

SECOND = 1_000_000_000


def prefix_of(prefix: LinePrefix, *, rank: int = 3) -> Prefix:
    """The prefix of one stream."""
    return Prefix.of(prefix, name="job", rank=rank, std=Std.ERR, host="box", now_ns=0)


def clock(at_ns: int, form: str) -> bytes:
    """A time of reading as the host's clock shows it."""
    return datetime.fromtimestamp(at_ns / SECOND, UTC).astimezone().strftime(form).encode()


def test_a_format_string_tells_what_it_names() -> None:
    """Each field is filled in; one without a time is the same for ever."""
    prefix = prefix_of("{name}/{rank:02} {std}@{host} ")
    assert (prefix.at(0), prefix.changes) == (b"job/03 stderr@box ", False)
    assert prefix_of(DEFAULT_PREFIX).at(0) == b"[job3]:"


def test_a_time_is_that_of_reading() -> None:
    """In the host's local time, in any format of strftime."""
    prefix = prefix_of("{time:%H:%M:%S} ")
    assert prefix.changes
    for at_ns in (0, 3600 * SECOND, 7 * SECOND):
        assert prefix.at(at_ns) == clock(at_ns, "%H:%M:%S ")


def test_a_callable_is_given_the_origin() -> None:
    """All of it, and asked anew for each time."""
    seen: list[LineOrigin] = []

    def short(origin: LineOrigin) -> str:
        seen.append(origin)
        return f"{origin.rank}> "

    prefix = prefix_of(short)
    assert prefix.at(5 * SECOND) == b"3> "
    assert [(origin.name, origin.rank, origin.std, origin.host) for origin in seen] == [("job", 3, Std.ERR, "box")] * 2
    assert [origin.time.timestamp() for origin in seen] == [0.0, 5.0]


def not_a_string(_: LineOrigin) -> str:
    """Break the promise of its annotation."""
    return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("prefix", "error"),
    [
        ("{nobody}", ValueError),
        ("{}", ValueError),
        ("{rank.nothing}", ValueError),
        ("{rank", ValueError),
        ("{rank:%H}", ValueError),
        ("a\nb", ValueError),
        (7, TypeError),
    ],
)
def test_a_wrong_prefix_is_refused_at_once(prefix: object, error: type[Exception]) -> None:
    """Before anything is started."""
    with pytest.raises(error, match="prefix"):
        DefaultLogsSpecs(prefix=prefix)  # type: ignore[arg-type]


@pytest.mark.parametrize(("prefix", "error"), [(not_a_string, TypeError), (lambda _: "\n", ValueError)])
def test_what_a_callable_returns_is_checked(prefix: Callable[[LineOrigin], str], error: type[Exception]) -> None:
    """Nothing but a string without a newline."""
    assert check_prefix(prefix) is prefix
    with pytest.raises(error, match="prefix"):
        prefix_of(prefix)


def test_a_colour_begins_and_ends_with_the_prefix() -> None:
    """Neighbours differ, an empty prefix has none, and a time is still told."""
    first, second = (Prefix.fixed("x").coloured(rank).at(0) for rank in (0, 1))
    assert first == b"\x1b[36mx\x1b[0m"
    assert first != second
    assert Prefix.fixed("").coloured(0).at(0) == b""
    assert prefix_of("{time:%S}").coloured(10).at(7 * SECOND) == b"\x1b[36m" + clock(7 * SECOND, "%S") + b"\x1b[0m"


@given(st.lists(st.tuples(st.sampled_from([b"a", b"\n", b"ab\nc", b"\n\n", b"x\n"]), st.integers(0, 9)), max_size=20))
def test_a_line_keeps_the_prefix_it_began_with(chunks: list[tuple[bytes, int]]) -> None:
    """However it is cut and whenever the rest comes, each line has one prefix: that of its first byte."""
    view, began = Prefixed(b"0:"), []
    fresh = True
    for data, at in chunks:
        view.renew(b"%d:" % at)
        assert view.feed(data) == data.count(b"\n")
        for byte in data:
            if fresh:
                began.append(b"%d:" % at)
            fresh = byte == 10
    view.end()
    data = b"".join(data for data, _ in chunks)
    lines = data.split(b"\n")[:-1] if data.endswith(b"\n") or not data else data.split(b"\n")
    expected = b"".join(prefix + line + b"\n" for prefix, line in zip(began, lines, strict=True))
    assert b"".join(view.take()) == expected
