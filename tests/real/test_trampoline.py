"""Options that fork and exec can't set are in force before the program's first instruction, or the start fails."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import resource
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from aelastic._exit import ExitStatus
from aelastic._process import trampoline
from tests.real.children import NET, child, python

pytestmark = pytest.mark.one_loop

ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        ({"umask": 0o27}, "print(oct(os.umask(0)))", "0o27"),
        ({"nice": 3}, f"print(os.nice(0) - {os.nice(0)})", "3"),
        ({"cpus": [0]}, "print(os.sched_getaffinity(0))", "{0}"),
        ({"cpus": {0: [0]}}, "print(os.sched_getaffinity(0))", "{0}"),
        (
            {"rlimits": {resource.RLIMIT_NOFILE: (100, 200), resource.RLIMIT_CORE: 0}},
            "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE))",
            "(100, 200) (0, 0)",
        ),
        pytest.param({"groups": (7, 8)}, "print(os.getuid(), os.getgroups())", "0 [7, 8]", marks=ROOT),
    ],
)  # fmt: skip
async def test_an_option_is_in_force_when_the_program_begins(options: dict[str, Any], code: str, line: str) -> None:
    async with child(*python(code), **options) as started:
        await asyncio.wait_for(started.process.confirmed(), NET)
        assert await started.line() == line
        assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(0, None)


@ROOT
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"user": "nobody"}, "{uid} {gid} {gid}"),
        ({"user": "nobody", "groups": (7, 8)}, "{uid} {gid} {gid} 7 8"),
        ({"user": "nobody", "group": 7, "groups": ()}, "{uid} 7 7"),
        ({"user": 4321, "group": 8765}, "4321 8765 8765"),
        ({"group": 8765, "groups": (7,)}, "0 8765 8765 7"),
    ],
)
async def test_a_worker_becomes_its_user_with_that_users_groups(options: dict[str, Any], line: str) -> None:
    account = pwd.getpwnam("nobody")
    async with child("sh", "-c", "echo $(id -u) $(id -g) $(id -G)", **options) as started:
        await asyncio.wait_for(started.process.confirmed(), NET)
        assert await started.line() == line.format(uid=account.pw_uid, gid=account.pw_gid)


@pytest.mark.parametrize(
    ("options", "number", "text"),
    [
        ({"user": "no-such-user"}, errno.EINVAL, "this host has no user 'no-such-user'"),
        ({"group": "no-such-group"}, errno.EINVAL, "this host has no group 'no-such-group'"),
        ({"user": 54321}, errno.EINVAL, "its group has to be given"),
        ({"cpus": [4000]}, errno.EINVAL, "cpus can't be set to 4000"),
        ({"rlimits": {999: 10}}, errno.EINVAL, "rlimit can't be set to 999"),
    ],
)
async def test_an_option_that_fails_is_the_starts_error(options: dict[str, Any], number: int, text: str) -> None:
    async with child("true", **options) as started:
        with pytest.raises(OSError, match="demo rank 0 can't be started") as raised:
            await asyncio.wait_for(started.process.confirmed(), NET)
        assert raised.value.errno == number
        assert text in str(raised.value)
        assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(127, None)


async def test_a_program_that_the_new_user_may_not_execute_is_the_starts_error(tmp_path: Any) -> None:
    if os.getuid() != 0:
        pytest.skip("only root may become somebody else")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    async with child(str(program), user="nobody") as started:
        with pytest.raises(PermissionError, match="can't be executed"):
            await asyncio.wait_for(started.process.confirmed(), NET)


async def test_a_command_that_is_not_found_fails_before_anything_runs() -> None:
    with pytest.raises(FileNotFoundError, match="no such program was found"):
        async with child("no-such-program", umask=0):
            pass


@pytest.mark.parametrize("locale", [{}, {"LC_CTYPE": "C"}, {"LC_ALL": "C"}, {"LANG": "C"}])
async def test_arguments_and_environment_arrive_unchanged(locale: dict[str, str]) -> None:
    env = {"PATH": os.environ["PATH"], "ODD": "a\udcffb", **locale}
    async with child("sh", "-c", "tr '\\0' '\\n' </proc/$$/environ", env=env) as plain:
        expected = sorted(await plain.rest())
    async with child("sh", "-c", "tr '\\0' '\\n' </proc/$$/environ", env=env, umask=0o22) as started:
        assert sorted(await started.rest()) == expected
    code = "print([os.fsencode(a) for a in sys.argv[1:]])"
    async with child(*python(code), "", "--", "status=1", b"\xff", env=env, umask=0o22) as started:
        assert await started.line() == "[b'', b'--', b'status=1', b'\\xff']"


async def test_no_descriptor_of_the_trampoline_is_left_to_the_program() -> None:
    links = "for fd in /proc/$$/fd/*; do readlink $fd; done"
    async with child("sh", "-c", links) as started:
        expected = len(await started.rest())
    async with child("sh", "-c", links, umask=0o22) as started:
        seen = await started.rest()
    assert len(seen) == expected


async def test_a_trampoline_that_is_killed_on_its_way_is_an_exit_and_no_error() -> None:
    async with child("true", umask=0o22) as started:
        started.process.signal_group(signal.SIGKILL)
        await asyncio.wait_for(started.process.confirmed(), NET)
        status = await asyncio.wait_for(started.process.exited, NET)
        assert status in (ExitStatus(None, 9), ExitStatus(0, None))


@pytest.fixture
def odd_signals() -> Iterator[None]:
    """Signals ignored and blocked in the host."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGQUIT})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.usefixtures("odd_signals")
async def test_workers_start_with_an_empty_mask_and_default_actions() -> None:
    async with child(*python("os.execv('/bin/grep', ['grep', '-E', 'Sig(Blk|Ign)', '/proc/self/status'])")) as started:
        blocked, ignored = await started.line(), await started.line()
    assert _mask(blocked) == 0
    assert _mask(ignored) & ~_bits(signal.SIGPIPE, signal.SIGXFSZ) == 0  # Python's own, before it exec'd


async def test_a_plain_host_needs_no_trampoline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trampoline, "argv_of", None)
    async with child("grep", "-E", "Sig(Blk|Ign)", "/proc/self/status") as started:
        assert [_mask(line) for line in await started.rest()] == [0, 0]


@pytest.mark.parametrize("options", [{}, {"umask": 0o22}])
async def test_a_hangup_that_the_host_ignores_stays_ignored(options: dict[str, Any]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with child("grep", "SigIgn", "/proc/self/status", **options) as started:
            assert _mask(await started.line()) == _bits(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def _mask(line: str) -> int:
    """Without the C library's own two, which nobody can set, and which whatever posix_spawn(3) started ignores."""
    return int(line.split()[1], 16) & ~_bits(32, 33)


def _bits(*numbers: int) -> int:
    return sum(1 << (number - 1) for number in numbers)
