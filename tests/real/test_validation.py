"""Bad input gets a sentence that says who and what, before anything is started."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    DefaultLogsSpecs,
    LogsDest,
    LogsSpecs,
    RankMappingError,
    Starting,
    Std,
    StopPolicy,
    WorkerOptions,
    start_processes,
)
from tests.real.runs import RUNS_ON_ARGS, capture, start
from tests.ways_to_die import NO_STARTS, RUNS_ON, NoStart


@dataclass(frozen=True)
class Wrong:
    """Arguments that can't be meant, the error they get, and what it says."""

    what: str
    error: type[Exception]
    says: str
    args: Any = field(default_factory=lambda: {0: (), 1: ()})
    entrypoint: Any = "true"
    name: Any = "job"
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


class OddLogs(LogsSpecs):
    """Answers whatever it was given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:  # the seam's signature
        answer: LogsDest = self._answer
        return answer

    @property
    def root_log_dir(self) -> str:
        return ""


STRANGE = LogsDest(stdouts={9: "/dev/null"})


def odd_logs(answer: Any) -> dict[str, Any]:
    return {"logs_specs": OddLogs(answer)}


def logs(**settings: Any) -> dict[str, Any]:
    return {"logs_specs": DefaultLogsSpecs(os.devnull, **settings)}


WRONG = (
    Wrong("no name", TypeError, "name must be a string", name=3),
    Wrong("name of two lines", ValueError, "name stands in one line", name="a\nb"),
    Wrong("prefix of two lines", ValueError, r"prefixes\[0\] stands in one", more={"log_line_prefixes": {0: "a\n"}}),
    Wrong("surrogate in args", ValueError, r"args\[1\]\[0\] holds .*ud800", args={0: (), 1: ("\ud800",)}),
    Wrong(
        "surrogate in envs", ValueError, r"envs\[0\]\['A'\] holds .*ud800", more={"envs": {0: {"A": "\ud800"}, 1: {}}}
    ),
    Wrong("journal a word", TypeError, "journal must be True or False", more={"journal": "no"}),
    Wrong("no entrypoint", TypeError, "entrypoint must be a command", entrypoint=3),
    Wrong("empty entrypoint", ValueError, "entrypoint is empty", entrypoint=""),
    Wrong("NUL in entrypoint", ValueError, "job: entrypoint holds a NUL byte", entrypoint="a\0b"),
    Wrong("args no mapping", TypeError, "args must map each rank", args=[()]),
    Wrong("args empty", RankMappingError, "has no entry for rank 0", args={}),
    Wrong("args missing", RankMappingError, "has no entry for rank 1.* has entries for 2", args={0: (), 2: ()}),
    Wrong("args named", RankMappingError, "entries for 'x'", args={0: (), "x": ()}),
    Wrong("args no tuple", TypeError, r"args\[1\] must be a tuple", args={0: (), 1: 7}),
    Wrong("NUL in args", ValueError, r"args\[1\]\[0\] holds a NUL byte", args={0: (), 1: ("a\0",)}),
    Wrong("NUL in bytes", ValueError, r"args\[0\]\[1\] holds a NUL byte", args={0: ("", b"\0"), 1: ()}),
    Wrong("envs missing", RankMappingError, "envs has no entry for rank 1", more={"envs": {0: {}}}),
    Wrong("envs extra", RankMappingError, "envs has entries for 2", more={"envs": {0: {}, 1: {}, 2: {}}}),
    Wrong("envs no string", TypeError, r"envs\[1\]\['A'\] must be a string", more={"envs": {0: {}, 1: {"A": 1}}}),
    Wrong("envs no mapping", TypeError, r"envs\[0\] must be a mapping", more={"envs": {0: "A=1", 1: {}}}),
    Wrong("NUL in envs", ValueError, r"envs\[0\]\['A'\] holds a NUL", more={"envs": {0: {"A": "\0"}, 1: {}}}),
    Wrong("equals in envs", ValueError, "can't be the name of a variable", more={"envs": {0: {"A=": ""}, 1: {}}}),
    Wrong(
        "unknown prefix", RankMappingError, "log_line_prefixes has entries for 5", more={"log_line_prefixes": {5: ""}}
    ),
    Wrong("prefix no string", TypeError, r"log_line_prefixes\[0\]", more={"log_line_prefixes": {0: 1}}),
    Wrong("start method", ValueError, "start_method must be", more={"start_method": "threads"}),
    Wrong("filters a string", TypeError, "duplicate_stdout_filters", more={"duplicate_stdout_filters": "error"}),
    Wrong("filters no strings", TypeError, "duplicate_stderr_filters", more={"duplicate_stderr_filters": [1]}),
    Wrong("logs a string", TypeError, "logs_specs must be", more={"logs_specs": "/tmp"}),
    Wrong("options a dict", TypeError, "options must be a WorkerOptions", more={"options": {"nice": 1}}),
    Wrong("stop a number", TypeError, "stop must be a StopPolicy", more={"stop": 30}),
    Wrong("unknown cpus", RankMappingError, "cpus has entries for 4", more={"options": WorkerOptions(cpus={4: {0}})}),
    Wrong("unknown tee", RankMappingError, "job: DefaultLogsSpecs.tee has entries for 7", more=logs(tee={7: Std.OUT})),
    Wrong("unknown capture", RankMappingError, "DefaultLogsSpecs.capture has entries for 2", more=logs(capture={2: 1})),
    Wrong("unknown file", RankMappingError, "job: LogsDest.stdouts has entries for 9", more=odd_logs(STRANGE)),
    Wrong("no destination", TypeError, "job: LogsSpecs.reify must return a LogsDest, not None", more=odd_logs(None)),
    Wrong(
        "keep with a pipe",
        ValueError,
        "on_supervisor_death='keep'",
        more={"stop": StopPolicy(on_supervisor_death="keep"), "logs_specs": capture()},
    ),
)


def starting(wrong: Wrong) -> Starting:
    return start_processes(wrong.name, wrong.entrypoint, wrong.args, **wrong.more)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
async def test_a_wrong_argument_is_told_in_the_await(wrong: Wrong) -> None:
    """Calling does nothing yet; awaiting says what is wrong."""
    unused = starting(wrong)
    with pytest.raises(wrong.error, match=wrong.says):
        await unused


async def test_a_wrong_question_to_a_context_is_told() -> None:
    """Ranks that are none, and times that are no numbers; the run goes on, and is closed as ever."""
    async with start(RUNS_ON, logs_specs=capture()) as ctx:
        questions: tuple[Callable[[], Any], ...] = (
            lambda: ctx.send_signal(15, ranks=3),
            lambda: ctx.send_signal(15, ranks="0"),
            lambda: ctx.lines(ranks=[7]),
            lambda: ctx.wait("1"),
            lambda: ctx.wait(float("nan")),
            lambda: ctx.close(timeout="1"),
        )
        for wrong in questions:
            with pytest.raises((TypeError, ValueError), match=r"test: .* (ranks|timeout|lines)|timeout must be"):
                await wrong()
        assert ctx.result is None


async def test_a_missing_rank_is_both_errors_and_names_them() -> None:
    """torch raises RuntimeError, Python's own word is ValueError: it is both."""
    with pytest.raises(RankMappingError) as caught:
        await start_processes("job", "true", args={0: (), 3: ()})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    assert (caught.value.missing, caught.value.extra) == ((1,), (3,))


@pytest.mark.parametrize("no_start", NO_STARTS, ids=str)
async def test_a_command_that_cannot_be_started_is_the_builtin_error(no_start: NoStart) -> None:
    """Of its errno's class; the text names run, rank and command."""
    with pytest.raises(no_start.error, match="job rank 0") as caught:
        await start_processes("job", no_start.program, args={0: (), 1: ()})
    assert caught.value.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR)
    assert no_start.program in str(caught.value)


async def test_the_path_of_the_worker_counts() -> None:
    """A command is looked up along the PATH that the worker sees."""
    with pytest.raises(FileNotFoundError, match="job rank 1"):
        await start_processes("job", "true", args={0: (), 1: ()}, envs={0: {}, 1: {"PATH": "/nowhere"}})


async def test_a_path_is_relative_to_the_workers_directory(tmp_path: Path) -> None:
    """With a slash in it, a command is looked up from `cwd`."""
    (tmp_path / "tool").write_text("#!/bin/sh\nexit 5\n")
    (tmp_path / "tool").chmod(0o755)
    ctx = await start_processes("job", "./tool", args={0: ()}, options=WorkerOptions(cwd=tmp_path))
    assert (await ctx.wait()).exits[0].code == 5


async def test_a_directory_that_is_missing_is_told() -> None:
    """`cwd` that doesn't exist is not taken for a missing command."""
    with pytest.raises(FileNotFoundError, match=r"job rank 0.*nowhere"):
        await start_processes("job", "true", args={0: ()}, options=WorkerOptions(cwd="/nowhere"))


async def test_a_log_dir_that_is_a_file_is_told(tmp_path: Path) -> None:
    """Wherever it is noticed, it is NotADirectoryError and names the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        await start_processes("job", "true", args={0: ()}, logs_specs=DefaultLogsSpecs(str(tmp_path / "file")))


async def test_a_log_dir_that_cannot_be_made_is_told() -> None:
    """The error names the run, the directory and what to do; nothing was started."""
    with pytest.raises(FileNotFoundError, match=r"job: its logs have no place: .* name a log_dir .*'/proc/none'"):
        await start_processes("job", "true", args={0: ()}, logs_specs=DefaultLogsSpecs("/proc/none"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_log_dir_is_told(tmp_path: Path) -> None:
    """The error names it."""
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=tmp_path.name):
        await start_processes("job", "true", args={0: ()}, logs_specs=DefaultLogsSpecs(str(tmp_path)))


async def test_a_descriptor_that_is_not_open_is_told() -> None:
    """`pass_fds` are checked before anything is started."""
    with pytest.raises(OSError, match="999"):
        await start_processes("job", "true", args={0: ()}, options=WorkerOptions(pass_fds=[999]))


@pytest.mark.parametrize("room", [4, 12, 30])
async def test_too_few_descriptors_are_told_with_limit_and_need(room: int, tmp_path: Path) -> None:
    """The error is an OSError that names the resource, its limit and what is needed; the host is unharmed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + room, hard))
        with pytest.raises(OSError) as caught:
            await start(
                dict.fromkeys(range(64), RUNS_ON),
                logs_specs=DefaultLogsSpecs(str(tmp_path), tee=3),  # type: ignore[arg-type]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert str(highest + room) in str(caught.value)


async def test_an_argument_too_long_for_one_rank_takes_the_others_down() -> None:
    """A half start is no start: ranks 0 and 1 are gone before the error of rank 2 arrives."""
    args: dict[int, tuple[Any, ...]] = {0: RUNS_ON_ARGS, 1: RUNS_ON_ARGS, 2: ("x" * 300_000,)}
    with pytest.raises(OSError, match="job rank 2") as caught:
        await start_processes("job", "env", args=args)
    assert caught.value.errno == errno.E2BIG


async def test_a_start_can_be_used_once() -> None:
    """Awaiting it again is an error, not a second run."""
    once = start_processes("job", "true", args={0: ()})
    await (await once).wait()
    with pytest.raises(RuntimeError, match="used already"):
        await once


async def test_the_callers_mappings_are_never_changed() -> None:
    """Neither by the start nor by the run."""
    args, envs, prefixes = {0: ["a"], 1: "b"}, {0: {"A": "1"}, 1: {}}, {0: "zero "}
    async with start_processes("job", "true", args, envs, None, prefixes) as ctx:  # type: ignore[arg-type]
        await ctx.wait()
    assert (args, envs, prefixes) == ({0: ["a"], 1: "b"}, {0: {"A": "1"}, 1: {}}, {0: "zero "})


async def test_arguments_are_passed_as_they_are(tmp_path: Path) -> None:
    """Numbers as text, bytes and paths untouched; a bare string is one argument."""
    args: dict[int, Any] = {0: (1, b"\xff", tmp_path, "a b"), 1: "one"}
    logs = DefaultLogsSpecs(str(tmp_path), redirects=3)  # type: ignore[arg-type]
    ctx = await start_processes("job", "printf", {rank: ("%s\n", *tail(args[rank])) for rank in args}, logs_specs=logs)
    await ctx.wait()
    assert Path(ctx.stdouts[0]).read_bytes() == b"1\n\xff\n" + os.fsencode(tmp_path) + b"\na b\n"
    assert Path(ctx.stdouts[1]).read_bytes() == b"one\n"


def tail(args: Any) -> tuple[Any, ...]:
    return (args,) if isinstance(args, str) else args


@pytest.mark.parametrize("content", ["echo by a shell\n", "\x7fELF\x02\x01\x01"], ids=["no-interpreter", "odd-binary"])
async def test_what_the_kernel_cannot_execute_is_refused(content: str, tmp_path: Path) -> None:
    """No shell makes a guess at it, on any loop."""
    program = tmp_path / "program"
    program.write_text(content)
    program.chmod(0o755)
    with pytest.raises(OSError, match="job rank 0 can't be started: ") as caught:
        await start_processes("job", str(program), args={0: ()})
    assert caught.value.errno == errno.ENOEXEC
