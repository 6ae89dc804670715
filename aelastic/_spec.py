"""What a caller asked for, checked once and spelled out rank by rank.

Pure: nothing is opened, looked up or started, so a wrong argument is told before anything happened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, final, get_args

from ._conditions import HealthPolicy
from ._failures import RankMappingError
from ._options import WorkerOptions
from ._policies import RestartPolicy, StopPolicy
from ._std import Std

StartMethod = Literal["spawn", "fork", "forkserver"]
Entrypoint = str | Callable[..., Any]
Argument = str | bytes
T = TypeVar("T")
Text = TypeVar("Text", str, bytes)

NEVER_INHERITED = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
"""They speak of the host itself: a worker that used them would answer in the host's name (sd_notify(3))."""
NEVER_INHERITED_PREFIXES = ("LISTEN_", "AELASTIC_", "TORCHELASTIC_")
LINEAGE = "AELASTIC_LINEAGE"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """A checked launch. Mappings have exactly the keys 0..nprocs-1."""

    name: str
    entrypoint: Entrypoint
    args: Mapping[int, tuple[Any, ...]]
    envs: Mapping[int, Mapping[str, str]]
    """What the caller lays over the inherited environment."""
    prefixes: Mapping[int, str]
    """By rank, of the ranks whose lines have a prefix of their own."""
    filters: Mapping[Std, tuple[str, ...] | None]
    """By stream: the words a line must hold to go to the filter file; None without one."""
    start_method: StartMethod
    options: WorkerOptions
    stop: StopPolicy
    restart: RestartPolicy
    health: HealthPolicy | None
    """None: nobody looks, and workers have no `NOTIFY_SOCKET`."""

    @property
    def nprocs(self) -> int:
        """Number of ranks, 1 or more."""
        return len(self.args)

    @property
    def is_command(self) -> bool:
        """Whether the ranks run a command rather than a function."""
        return isinstance(self.entrypoint, str)

    @property
    def restarts_ranks(self) -> bool:
        """Whether each rank restarts by itself."""
        return self.restart.scope == "rank"

    @property
    def starts_in_order(self) -> bool:
        """Whether each rank waits until the one before it is ready."""
        return self.health is not None and self.health.start_order == "sequential"

    def who(self, rank: int) -> str:
        """The run and rank as error texts name them."""
        return f"{self.name} rank {rank}"

    def ranks(self, what: str, chosen: Collection[int] | None) -> tuple[int, ...]:
        """Spell a choice of ranks out.

        Args:
            what: who asks, for the error.
            chosen: None means all.

        Raises:
            RankMappingError: if one is none of this run.
        """
        if chosen is None:
            return tuple(range(self.nprocs))
        if isinstance(chosen, (str, bytes)) or not isinstance(chosen, Collection):
            raise TypeError(f"{self.name}: {what} must be a collection of ranks such as [0, 1], not {chosen!r}")
        _check_ranks(f"{self.name}: {what}", chosen, self.nprocs, every=False)
        return tuple(sorted(set(chosen)))


def check(
    name: str,
    entrypoint: Entrypoint,
    args: Mapping[int, tuple[Any, ...]],
    envs: Mapping[int, Mapping[str, str]] | None,
    log_line_prefixes: Mapping[int, str] | None,
    start_method: str,
    *,
    duplicate_stdout_filters: Sequence[str] | None,
    duplicate_stderr_filters: Sequence[str] | None,
    options: WorkerOptions | None,
    stop: StopPolicy | None,
    restart: RestartPolicy | None = None,
    health: HealthPolicy | None = None,
) -> RunSpec:
    """Check everything that can be checked without touching the system.

    Raises:
        RankMappingError: if a mapping by rank has wrong keys.
        TypeError: if something has the wrong type.
        ValueError: if a string holds a NUL byte, or a value is unknown.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {name!r}")
    _one_line("name", name)
    if not isinstance(entrypoint, str) and not callable(entrypoint):
        raise TypeError(f"{name}: entrypoint must be a command (a string) or a callable, not {entrypoint!r}")
    if entrypoint == "":
        raise ValueError(f"{name}: entrypoint is empty: give the command to run")
    if start_method not in get_args(StartMethod):
        raise ValueError(f"{name}: start_method must be 'spawn', 'fork' or 'forkserver', not {start_method!r}")
    nprocs = _count(name, args)
    checked_options = _instance(name, "options", options, WorkerOptions)
    _check_cpu_ranks(name, checked_options, nprocs)
    return RunSpec(
        name=name,
        entrypoint=_passable(f"{name}: entrypoint", entrypoint) if isinstance(entrypoint, str) else entrypoint,
        args={rank: _arguments(name, rank, args[rank], entrypoint) for rank in range(nprocs)},
        envs=_environments(name, envs, nprocs),
        prefixes=_prefixes(name, log_line_prefixes, nprocs),
        filters={
            Std.OUT: _filters(name, "duplicate_stdout_filters", duplicate_stdout_filters),
            Std.ERR: _filters(name, "duplicate_stderr_filters", duplicate_stderr_filters),
        },
        start_method=start_method,  # type: ignore[arg-type]  # get_args() above is the check
        options=checked_options,
        stop=_instance(name, "stop", stop, StopPolicy),
        restart=_instance(name, "restart", restart, RestartPolicy),
        health=_health(name, health, nprocs),
    )


def _count(name: str, args: object) -> int:
    if not isinstance(args, Mapping):
        raise TypeError(f"{name}: args must map each rank to its arguments, not {args!r}")
    if not args:
        raise RankMappingError(f"{name}: args", missing=(0,), extra=(), nprocs=1)
    _check_ranks(f"{name}: args", args, len(args))
    return len(args)


def _check_ranks(what: str, keys: Collection[Any], nprocs: int, *, every: bool = True) -> None:
    """Raise unless the keys are the ranks (all of them, or `every=False`: some of them)."""
    ranks = range(nprocs)
    extra = [key for key in keys if not _is_rank(key) or key not in ranks]
    missing = [rank for rank in ranks if rank not in keys] if every else []
    if extra or missing:
        raise RankMappingError(what, missing=missing, extra=extra, nprocs=nprocs, every=every)


def _is_rank(key: object) -> bool:
    return isinstance(key, int) and not isinstance(key, bool)


def _check_cpu_ranks(name: str, options: WorkerOptions, nprocs: int) -> None:
    if isinstance(options.cpus, Mapping):
        _check_ranks(f"{name}: WorkerOptions.cpus", options.cpus, nprocs, every=False)


def _instance(name: str, what: str, value: T | None, kind: type[T]) -> T:
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {what} must be a {kind.__name__}, not {value!r}")
    return value


def _health(name: str, health: HealthPolicy | None, nprocs: int) -> HealthPolicy | None:
    if health is None:
        return None
    checked = _instance(name, "health", health, HealthPolicy)
    _check_ranks(f"{name}: HealthPolicy.ready", checked.ranks, nprocs, every=False)
    return checked


def _arguments(name: str, rank: int, given: object, entrypoint: Entrypoint) -> tuple[Any, ...]:
    if not isinstance(entrypoint, str):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"{name}: args[{rank}] must be a tuple of arguments, not {given!r}")
        return tuple(given)
    if isinstance(given, (str, bytes, os.PathLike)):
        given = (given,)
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"{name}: args[{rank}] must be a tuple of arguments, not {given!r}")
    return tuple(_argument(f"{name}: args[{rank}][{index}]", value) for index, value in enumerate(given))


def _argument(what: str, value: object) -> Argument:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return _passable(what, value) if isinstance(value, bytes) else _passable(what, str(value))


def _passable(what: str, value: Text) -> Text:
    """Return what a program can be given, or say why it can't."""
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.end]
        raise ValueError(f"{what} holds {bad!r}, which {error.encoding} can't write: {value!r}") from None
    if b"\0" in encoded:
        raise ValueError(f"{what} holds a NUL byte, which no program can be given: {value!r}")
    return value


def _one_line(what: str, value: str) -> str:
    if not {"\n", "\r", "\0"}.isdisjoint(value):
        raise ValueError(f"{what} stands in one line of a log, and must hold no newline or NUL byte: {value!r}")
    return value


def _environments(name: str, envs: object, nprocs: int) -> Mapping[int, Mapping[str, str]]:
    if envs is None:
        return {rank: MappingProxyType({}) for rank in range(nprocs)}
    if not isinstance(envs, Mapping):
        raise TypeError(f"{name}: envs must map each rank to its variables, not {envs!r}")
    _check_ranks(f"{name}: envs", envs, nprocs)
    return {rank: _environment(f"{name}: envs[{rank}]", envs[rank]) for rank in range(nprocs)}


def _environment(what: str, env: object) -> Mapping[str, str]:
    if not isinstance(env, Mapping):
        raise TypeError(f"{what} must be a mapping of names to strings, not {env!r}")
    for key, value in env.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{what}[{key!r}] must be a string under a string, not {value!r}")
        _passable(f"{what}[{key!r}]", value)
        if not key or "=" in _passable(f"{what}: a name", key):
            raise ValueError(f"{what}: {key!r} can't be the name of a variable")
    return MappingProxyType(dict(env))


def _prefixes(name: str, prefixes: object, nprocs: int) -> Mapping[int, str]:
    if prefixes is None:
        return {}
    if not isinstance(prefixes, Mapping):
        raise TypeError(f"{name}: log_line_prefixes must map ranks to strings, not {prefixes!r}")
    _check_ranks(f"{name}: log_line_prefixes", prefixes, nprocs, every=False)
    for rank, prefix in prefixes.items():
        if not isinstance(prefix, str):
            raise TypeError(f"{name}: log_line_prefixes[{rank}] must be a string, not {prefix!r}")
        _one_line(f"{name}: log_line_prefixes[{rank}]", prefix)
    return dict(prefixes)


def _filters(name: str, what: str, filters: object) -> tuple[str, ...] | None:
    if filters is None:
        return None
    if isinstance(filters, str) or not isinstance(filters, Collection):
        raise TypeError(f"{name}: {what} must be a list of strings, not {filters!r}")
    for word in filters:
        if not isinstance(word, str):
            raise TypeError(f"{name}: {what} must hold strings, not {word!r}")
    return tuple(filters)


def worker_environments(spec: RunSpec, host: Mapping[str, str], run_id: str, attempt: int) -> dict[int, dict[str, str]]:
    """The environment of every worker, all but the path of its error file.

    Args:
        host: this process's environment; it is not changed.
        run_id: appended to the lineage, also where the rest of the host's environment is not inherited.
    """
    inherited = _inherited(host, spec.options)
    lineage = f"{host.get(LINEAGE) or ':'}{run_id}:"
    return {
        rank: {
            **inherited,
            **spec.envs[rank],
            "AELASTIC_RUN_ID": run_id,
            "AELASTIC_RANK": str(rank),
            "AELASTIC_WORLD_SIZE": str(spec.nprocs),
            "AELASTIC_ATTEMPT": str(attempt),
            LINEAGE: lineage,
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        for rank in range(spec.nprocs)
    }


def _inherited(host: Mapping[str, str], options: WorkerOptions) -> dict[str, str]:
    if not options.inherit_env:
        return {}
    dropped = NEVER_INHERITED.union(options.unset_env)
    return {
        name: value
        for name, value in host.items()
        if name not in dropped and not name.startswith(NEVER_INHERITED_PREFIXES)
    }
