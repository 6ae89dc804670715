"""Lines: whatever the chunks, the lines and the console's bytes are the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic._logs.lines import MATCH_BYTES, Matching, Prefixed, rest_of
from aelastic._logs.tail import CHUNKS, TAIL_LINES, VIEW_BYTES, Cursor, RawLine, Tail

PREFIX = b"[job0]:"
# Few letters, so that newlines, carriage returns, NUL and halves of characters meet at every edge.
TEXTS = st.lists(st.sampled_from([b"\n", b"\r", b"\0", b"a", b"bc", "é".encode(), b"\xff", b"\x1b[0m"])).map(b"".join)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut bytes at some places."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


def lines_of(data: bytes) -> list[bytes]:
    """The lines of a finished stream, an unfinished last one included."""
    *whole, rest = data.split(b"\n")
    return [*whole, rest] if rest else whole


@given(TEXTS, st.lists(st.integers(min_value=0)), st.sampled_from([PREFIX, b""]))
def test_any_chunking_gives_the_same_bytes_on_the_console(data: bytes, places: list[int], prefix: bytes) -> None:
    """A prefix stands at the start of each line and nowhere else, and a newline ends the last."""
    view, shown, count = Prefixed(prefix), [], 0
    for chunk in cut(data, places):
        count += view.feed(chunk)
        shown += view.take()
    view.end()
    shown += view.take()
    assert b"".join(shown) == b"".join(prefix + line + b"\n" for line in lines_of(data))
    assert count == data.count(b"\n")


@given(TEXTS, st.lists(st.integers(min_value=0)))
def test_what_is_whole_is_sized_and_counted(data: bytes, places: list[int]) -> None:
    """Sizes and counts are those of the bytes handed over, also where a long line is passed on as it comes."""
    view = Prefixed(PREFIX)
    for index, chunk in enumerate(cut(data, places)):
        view.feed(chunk)
        size, lines = view.whole_bytes, view.whole_lines
        taken = b"".join(view.take())
        assert (size, lines) == (len(taken), taken.count(b"\n"))
        if index % 2 and view.unfinished:
            held = view.held_bytes
            assert held == len(b"".join(view.take_unfinished()))


@given(TEXTS, st.lists(st.integers(min_value=0)))
def test_any_chunking_gives_the_same_matching_lines(data: bytes, places: list[int]) -> None:
    """A filter sees each bare line once, wherever it was cut."""
    matching = Matching([b"a", b"c\0"], PREFIX)
    found = [line for chunk in cut(data, places) for line in matching.feed(chunk)] + matching.end()
    assert found == [PREFIX + line + b"\n" for line in lines_of(data) if b"a" in line or b"c\0" in line]


def test_a_filter_holds_no_more_than_its_view_of_an_endless_line() -> None:
    """Of a line without end, 1 MiB is looked at and written."""
    matching = Matching([b"x"], b"")
    for _ in range(40):
        assert matching.feed(b"x" * (MATCH_BYTES // 16)) == []
    assert [len(line) for line in matching.feed(b"\n")] == [MATCH_BYTES + 1]


@given(st.lists(TEXTS), st.integers(min_value=0))
def test_the_rest_of_some_pieces_is_what_was_not_written(pieces: list[bytes], written: int) -> None:
    """After a short write exactly the unwritten bytes are left."""
    whole = b"".join(pieces)
    written %= len(whole) + 1
    assert b"".join(rest_of(pieces, written)) == whole[written:]


def fill(tail: Tail, data: bytes, places: Sequence[int]) -> None:
    """Append in chunks, and end."""
    for at_ns, chunk in enumerate(cut(data, places)):
        tail.append(chunk, chunk.count(b"\n"), at_ns)
    tail.ended = True


def read_all(cursor: Cursor) -> list[RawLine]:
    """Read until there is nothing."""
    return list(iter(cursor.next, None))


@given(TEXTS, st.lists(st.integers(min_value=0)))
def test_any_chunking_gives_a_reader_the_same_lines(data: bytes, places: list[int]) -> None:
    """A reader gets every line once, numbered from 1, the last one without a newline too."""
    tail = Tail()
    fill(tail, data, places)
    lines = read_all(Cursor(tail))
    assert [line.data for line in lines] == lines_of(data)
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    assert not any(line.skipped or line.truncated or line.partial for line in lines)


@given(TEXTS, st.lists(st.integers(min_value=0)), st.integers(0, 6), st.integers(0, 6))
def test_what_left_the_tail_is_counted_as_skipped(data: bytes, places: list[int], most: int, reads: int) -> None:
    """Whatever was dropped while a reader slept, numbers and skipped counts add up and the last line is there."""
    tail = Tail()
    reader, read = Cursor(tail), []
    for at_ns, chunk in enumerate(cut(data, places)):
        tail.append(chunk, chunk.count(b"\n"), at_ns)
        tail.trim(most, 1000)
        read += [line for _ in range(reads % 3) if (line := reader.next()) is not None]
    tail.ended = True
    read += read_all(reader)
    whole = lines_of(data)
    number = 0
    for line in read:
        assert line.number == number + line.skipped + 1
        assert line.data == whole[line.number - 1]
        number = line.number
    assert number == len(whole)


@given(TEXTS, TEXTS, st.lists(st.integers(min_value=0)), st.integers(0, 6))
def test_a_live_reader_begins_with_the_line_that_is_unfinished(
    before: bytes, after: bytes, places: list[int], most: int
) -> None:
    """A subscription from now on shows the line under way whole, and counts nothing before it as missed."""
    tail = Tail()
    for at_ns, chunk in enumerate(cut(before, places)):
        tail.append(chunk, chunk.count(b"\n"), at_ns)
        tail.trim(most, 1000)
    cursor = Cursor(tail, live=True)
    fill(tail, after, [])
    lines = read_all(cursor)
    assert [line.data for line in lines] == lines_of(before + after)[before.count(b"\n") :]
    assert not any(line.skipped for line in lines)


def test_a_long_line_is_truncated_in_the_view_whatever_was_dropped() -> None:
    """The view keeps the beginning of a line of which most chunks are gone."""
    tail = Tail()
    tail.append(b"first\nBEGIN", 1, 0)
    for at_ns in range(1, 200):
        tail.append(b"x" * 10_000, 0, at_ns)
        tail.trim(VIEW_BYTES, TAIL_LINES)
    tail.append(b"\nlast", 1, 200)
    late = Cursor(tail)
    line = late.next()
    assert line is not None
    assert (line.number, line.skipped, line.truncated, len(line.data)) == (2, 1, True, VIEW_BYTES)
    assert line.data.startswith(b"BEGINx")
    unfinished = late.next() or late.unfinished()
    assert unfinished is not None
    assert (unfinished.data, unfinished.partial, unfinished.number) == (b"last", True, 3)


def test_the_tail_keeps_the_newest_lines() -> None:
    """What a stream nobody reads keeps is bounded by lines and bytes, and ends with the unfinished line."""
    tail = Tail()
    for number in range(5000):
        tail.append(b"line %d\n" % number, 1, number)
        tail.trim(1 << 16, TAIL_LINES)
    tail.append(b"prompt> ", 0, 5000)
    assert [raw.data for raw in tail.last(2)] == [b"line 4999", b"prompt> "]
    assert len(tail.chunks) <= TAIL_LINES + 1


def test_a_tail_that_came_byte_by_byte_is_bounded_too() -> None:
    """What its chunks take is bounded, not only their bytes, and the last lines are there."""
    tail = Tail()
    for at_ns in range(100_000):
        byte = b"\n" if at_ns % 100 == 99 else b"x"
        tail.append(byte, byte.count(b"\n"), at_ns)
        tail.trim(1 << 16, TAIL_LINES)
    assert len(tail.chunks) <= CHUNKS
    assert [(raw.number, raw.data) for raw in tail.last(40)] == [(number, b"x" * 99) for number in range(961, 1001)]


@given(TEXTS, st.lists(st.integers(min_value=0)), st.integers(0, 6), st.integers(1, 6), st.booleans())
def test_the_last_lines_are_those_that_a_reader_of_all_sees_last(
    data: bytes, places: list[int], most: int, count: int, ended: bool
) -> None:
    """Numbers and times are the same, whatever was dropped and wherever the chunks were cut."""
    tail = Tail()
    for at_ns, chunk in enumerate(cut(data, places)):
        tail.append(chunk, chunk.count(b"\n"), at_ns)
        tail.trim(most, 1000)
    tail.ended = ended
    cursor = Cursor(tail)
    every = read_all(cursor)
    if (unfinished := cursor.unfinished()) is not None:
        every.append(unfinished)
    assert tail.last(count) == [line._replace(skipped=0) for line in every[-count:]]


def test_the_last_lines_of_many_are_found_without_reading_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's end shows 40 of up to 20,000 lines in memory; reading them all would hold the loop for 20 ms."""
    tail, reads = Tail(), list[None]()
    for number in range(20_000):
        tail.append(b"line %d\n" % number, 1, number)
    read_next = Cursor.next

    def counted(cursor: Cursor) -> RawLine | None:
        reads.append(None)
        return read_next(cursor)

    monkeypatch.setattr(Cursor, "next", counted)
    assert [raw.data for raw in tail.last(2)] == [b"line 19998", b"line 19999"]
    assert len(reads) == 3
