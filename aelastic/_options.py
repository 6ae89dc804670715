"""What a caller may choose about workers before they begin: a frozen value that checks itself.

Nothing here looks at the system: whether there is such a user or processor is found out where it is put in force.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What is in force in every worker before the program's first instruction.

    Options that fork and exec alone can't set (`umask`, `user`, `group`, `groups`, `nice`, `rlimits`, `cpus`) go
    through one exec'd trampoline, a bare Python interpreter that replaces itself with the command: about 12 ms of CPU
    a worker. Without them, no trampoline runs.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a value can't be meant.
    """

    cwd: str | os.PathLike[str] | None = None
    """Working directory; None (default) keeps the host's."""
    stdin: str | os.PathLike[str] = "null"
    """`"null"` (default): /dev/null; `"inherit"`: the host's; anything else: the path of a file to read."""
    umask: int | None = None
    """0 to 0o777; None (default) keeps the host's."""
    user: str | int | None = None
    """Name or number; its groups are set with it, unless `groups` says otherwise."""
    group: str | int | None = None
    """Name or number; None (default) means the user's own group, if there is a `user`."""
    groups: Collection[str | int] | None = None
    """Supplementary groups; None (default) means the user's, if there is a `user`."""
    nice: int | None = None
    """An increment, as nice(2); None (default) changes nothing."""
    rlimits: Mapping[int, int | tuple[int, int]] | None = None
    """`resource.RLIMIT_*` to a limit, or to (soft, hard)."""
    cpus: Collection[int] | Mapping[int, Collection[int]] | None = None
    """The processors a worker may run on: one set for all ranks, or a mapping by rank."""
    inherit_env: bool = True
    """Whether the host's environment is laid under `envs`; False starts from an empty one."""
    unset_env: Collection[str] = ()
    """Names taken out of what is inherited."""
    pass_fds: Collection[int] = ()
    """Descriptors of the host that every worker gets, under the same numbers."""
    forkserver_preload: Collection[str] = ()
    """Modules that a fork server imports before it forks the first worker."""

    def __post_init__(self) -> None:
        self._check_paths()
        self._check_identity()
        if self.umask is not None and not 0 <= _whole("umask", self.umask) <= 0o777:
            raise ValueError(f"WorkerOptions.umask must be 0 to 0o777, not {self.umask!r}")
        if self.nice is not None:
            _whole("nice", self.nice)
        for what in ("groups", "unset_env", "pass_fds", "forkserver_preload"):
            value = getattr(self, what)
            if isinstance(value, (str, bytes)):
                raise TypeError(f"WorkerOptions.{what} must be a collection, not the one string {value!r}")
            if value is not None:
                object.__setattr__(self, what, tuple(_collection(what, value)))
        for name in self.unset_env:
            if not isinstance(name, str):
                raise TypeError(f"WorkerOptions.unset_env must hold names, not {name!r}")
        for fd in self.pass_fds:
            if _whole("pass_fds", fd) < 0:
                raise ValueError(f"WorkerOptions.pass_fds holds {fd}, which is no descriptor")
        self._check_rlimits()
        self._check_cpus()

    def _check_paths(self) -> None:
        for what in ("cwd", "stdin"):
            value = getattr(self, what)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise TypeError(f"WorkerOptions.{what} must be a path, not {value!r}")
            if value is not None and "\0" in os.fspath(value):
                raise ValueError(f"WorkerOptions.{what} holds a NUL byte: {value!r}")

    def _check_identity(self) -> None:
        for what, names in (("user", [self.user]), ("group", [self.group]), ("groups", self.groups or ())):
            for name in _collection(what, names):
                if name is None and what != "groups":
                    continue
                if isinstance(name, bool) or not isinstance(name, (str, int)):
                    raise TypeError(f"WorkerOptions.{what} must be a name or a number, not {name!r}")
                if name == "" or (isinstance(name, int) and name < 0) or (isinstance(name, str) and "\0" in name):
                    raise ValueError(f"WorkerOptions.{what}: there can be no {name!r}")

    def _check_rlimits(self) -> None:
        if self.rlimits is None:
            return
        if not isinstance(self.rlimits, Mapping):
            raise TypeError(f"WorkerOptions.rlimits must map resource.RLIMIT_* to limits, not {self.rlimits!r}")
        pairs: dict[int, int | tuple[int, int]] = {}
        for which, limit in self.rlimits.items():
            values: Any = limit if isinstance(limit, tuple) else (limit, limit)
            if len(values) != 2 or not all(isinstance(value, int) for value in values):
                raise TypeError(f"WorkerOptions.rlimits[{which}] must be a number or (soft, hard), not {limit!r}")
            soft, hard = (math.inf if value == resource.RLIM_INFINITY else value for value in values)
            if not 0 <= soft <= hard:
                raise ValueError(
                    f"WorkerOptions.rlimits[{limit_name(_whole('rlimits', which))}] must be 0 <= soft <= hard,"
                    f" not {limit!r}"
                )
            pairs[_whole("rlimits", which)] = limit
        object.__setattr__(self, "rlimits", MappingProxyType(pairs))

    def _check_cpus(self) -> None:
        if self.cpus is None:
            return
        by_rank = isinstance(self.cpus, Mapping)
        sets = dict(self.cpus) if isinstance(self.cpus, Mapping) else {0: self.cpus}
        frozen = {
            rank: frozenset(_whole("cpus", cpu) for cpu in _collection("cpus", cpus)) for rank, cpus in sets.items()
        }
        for rank, cpus in frozen.items():
            if any(cpu < 0 for cpu in cpus):
                raise ValueError(f"WorkerOptions.cpus holds {min(cpus)}, which is no processor: they count from 0")
            if not cpus:
                where = f" for rank {rank}" if by_rank else ""
                raise ValueError(f"WorkerOptions.cpus is empty{where}: a worker needs one processor at least")
        object.__setattr__(self, "cpus", MappingProxyType(frozen) if by_rank else frozen[0])

    def cpus_of(self, rank: int) -> frozenset[int] | None:
        """The processors of one rank; None when nothing was chosen for it."""
        cpus = self.cpus.get(rank) if isinstance(self.cpus, Mapping) else self.cpus
        return None if cpus is None else frozenset(cpus)


def limit_name(which: int) -> str:
    """The name of a resource limit, such as `"RLIMIT_NOFILE"`; its number where it has none."""
    names = (name for name in dir(resource) if name.startswith("RLIMIT_") and getattr(resource, name) == which)
    return next(names, str(which))


def _collection(what: str, value: Any) -> Collection[Any]:
    if not isinstance(value, Collection):
        raise TypeError(f"WorkerOptions.{what} must be a collection such as a list or a set, not {value!r}")
    return value


def _whole(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"WorkerOptions.{what} must hold whole numbers, not {value!r}")
    return value
