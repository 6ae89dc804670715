"""Everything at once: full speed, kills, rotations, a console that stalls, a reader that sleeps; no byte is missing."""

from __future__ import annotations

import io
import os
from pathlib import Path

from benchmarks._writers import log_directory
from benchmarks.soak import MOST_GROWTH, Shelf, console, judged, shared_processors, soak
from tests.real.streams import console_is

LONG = os.environ.get("AELASTIC_TEST_LONG") == "1"
RANKS, SIZE, KILL_EVERY, STALL = (8, 2_000_000_000, 1.0, 1.0) if LONG else (4, 120_000_000, 0.1, 0.3)


async def test_every_byte_arrives_while_everything_goes_wrong(tmp_path: Path) -> None:
    """Files match the checksums of their workers; the console showed whole lines, each shown or counted."""
    records = tmp_path / "records"
    records.mkdir()
    with log_directory(str(tmp_path)) as directory:
        with console(STALL) as (end, ear):
            text = io.TextIOWrapper(end, write_through=True)
            with console_is(text):
                seen = await soak(
                    directory,
                    str(records),
                    ranks=RANKS,
                    size=SIZE,
                    piece_bytes=1 << 20,
                    kill_every=KILL_EVERY,
                    processors=shared_processors(),
                )
            text.close()
        shelf = Shelf()
        shelf.read(seen["run_dir"], str(records))
    assert judged(ear, shelf, seen, SIZE) == []
    assert seen["attempts"] > 1
    assert shelf.pieces > len(shelf.lines)
    assert ear.stalls > 0
    assert seen["growth"] <= MOST_GROWTH
