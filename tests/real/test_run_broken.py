"""A failure of our own machinery fails the run aloud, and leaves nothing behind either."""

from __future__ import annotations

import pytest

from aelastic import start_processes
from aelastic._logs import Outputs


async def test_a_bug_in_the_supervision_of_one_rank_fails_the_run_and_ends_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: Outputs, rank: int, within: float) -> bool:
        raise ZeroDivisionError(f"a bug, met by rank {rank}")

    monkeypatch.setattr(Outputs, "finish", broken)
    ctx = await start_processes("job", "sh", args={0: ("-c", "exit 0"), 1: ("-c", "exec sleep 600")})
    with pytest.raises(ZeroDivisionError, match="a bug, met by rank 0"):
        await ctx.wait()
    assert ctx.result is None
