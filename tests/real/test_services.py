"""Real servers, as a user runs them: made ready by what they themselves say, killed, started again, ready again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    AttemptStarted,
    Backoff,
    DefaultLogsSpecs,
    HealthPolicy,
    LinePattern,
    Notify,
    PContext,
    RestartPolicy,
    Std,
    StopPolicy,
    TcpPort,
    WorkerOptions,
    WorkerReady,
    start_processes,
)

NET = 60.0
AT_ONCE = RestartPolicy(max_restarts=2, backoff=Backoff(initial=0.0, maximum=0.0))
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("initdb") or "/none/initdb").parent]
"""Debian keeps its programs off the PATH; the newest version is the last."""
REDIS = shutil.which("redis-server")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        number: int = server.getsockname()[1]
        return number


def unprivileged() -> str | None:
    """Whom a server that refuses root runs as; None where this is nobody special."""
    return None if os.getuid() else "nobody"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The directory of a new database cluster."""
    initdb = POSTGRES[-1] / "initdb"
    if not initdb.is_file():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    user = unprivileged()
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:  # pytest lets nobody else into its own
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        options = ["--no-sync", "--no-locale", "--auth=trust", "--username=test", "-D", f"{folder}/data"]
        subprocess.run([initdb, *options], user=user, cwd="/", check=True, stdout=subprocess.DEVNULL)
        yield f"{folder}/data"


async def ready_again(ctx: PContext) -> None:
    """Kill rank 0 as the kernel would, and wait until its next incarnation is ready."""
    os.kill(ctx.pids()[0], signal.SIGKILL)
    async for event in ctx.events():
        if isinstance(event, AttemptStarted) and event.attempt == 1:
            break
    await ctx.wait_ready(NET)


async def test_postgres_is_ready_killed_and_ready_again(cluster: str) -> None:
    """By sd_notify, its log and its port together; what the killed one left is gone, or it would not start again."""
    port = free_port()
    says = rf"port (?P<port>{port})$"
    health = HealthPolicy(ready=Notify() & LinePattern(says, std=Std.ERR) & TcpPort(port), ready_timeout=NET)
    run = start_processes(
        "postgres",
        str(POSTGRES[-1] / "postgres"),
        args={0: ("-D", cluster, "-p", str(port), "-h", "127.0.0.1", "-k", "", "-c", "fsync=off")},
        logs_specs=DefaultLogsSpecs(capture=Std.ALL),
        options=WorkerOptions(user=unprivileged(), cwd="/"),
        stop=StopPolicy(steps=((signal.SIGINT, NET), (signal.SIGKILL, 5.0))),
        restart=AT_ONCE,
        health=health,
    )
    async with run as ctx:
        await ctx.wait_ready(NET)
        assert (await ctx.usage())[0].processes >= 4
        await ready_again(ctx)
        assert ctx.ready_captures == {0: {"port": str(port)}}
    result = ctx.result
    assert result is not None
    assert (result.outcome, result.attempts, result.exits[0].code) == ("stopped", 2, 0)
    assert result.history[0][0].exitcode == -signal.SIGKILL


@pytest.mark.skipif(REDIS is None, reason="Redis is not installed: apt-get install redis-server")
async def test_redis_is_ready_killed_and_ready_again(tmp_path: Path) -> None:
    """By sd_notify, which it speaks with `--supervised systemd`."""
    port = free_port()
    options: dict[str, Any] = {"stop": StopPolicy(steps=((signal.SIGTERM, NET), (signal.SIGKILL, 5.0)))}
    run = start_processes(
        "redis",
        "redis-server",
        args={0: ("--port", str(port), "--supervised", "systemd", "--save", "", "--dir", str(tmp_path))},
        logs_specs=DefaultLogsSpecs(capture=Std.ALL),
        restart=AT_ONCE,
        health=HealthPolicy(ready=Notify() & TcpPort(port), ready_timeout=NET),
        **options,
    )
    async with run as ctx:
        await ctx.wait_ready(NET)
        await ready_again(ctx)
        seen = [event.attempt async for event in _two_ready(ctx)]
    assert seen == [0, 1]
    assert ctx.result is not None
    assert ctx.result.exits[0].code == 0


async def _two_ready(ctx: PContext) -> Any:
    left = 2
    async for event in ctx.events():
        if isinstance(event, WorkerReady):
            yield event
            left -= 1
        if not left:
            return
