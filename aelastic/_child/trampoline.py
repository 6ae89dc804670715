"""Put a worker's options in force, then become its program. Run as a script by a bare interpreter (`-I -S`).

argv: this file, settings as `name=value`, `--`, the path to execute, the program's own argv. What goes wrong is
written to the status pipe as `errno what`; the pipe closes by itself when the program is executed.

Standard library only, and as little of it as can be: `signal` and `json` would double the 8 ms that this takes.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # has no stub
import os
import sys

INVALID = 22
"""EINVAL, for what has no errno: an unknown user, a limit above its maximum."""
NO_MEMORY = 12

Settings = dict[str, list[str]]


class Refused(Exception):
    """A setting that can't be meant on this host."""


def main(argv: list[str]) -> None:
    """Apply the settings in order and execute the program; report the first step that fails."""
    dashes = argv.index("--")
    settings: Settings = {}
    for word in argv[1:dashes]:
        name, _, value = word.partition("=")
        settings.setdefault(name, []).append(value)
    path, args = argv[dashes + 1], argv[dashes + 2 :]
    status = int(settings["status"][0])
    os.set_inheritable(status, False)  # noqa: FBT003  # takes no keyword
    doing = "its cgroup can't be entered"
    try:
        for folder in settings.get("cgroup", ()):
            enter_cgroup(folder)
        doing = "its signals can't be reset"
        reset_signals(ignore_hup="hup" in settings)
        restore_environment(settings)
        doing = "its user and groups can't be set"
        numbers = identity(*(settings[name][0] if name in settings else None for name in ("user", "group", "groups")))
        for name, apply in (("nice", nice), ("cpus", cpus), ("umask", umask), ("rlimit", rlimit)):
            for value in settings.get(name, ()):
                doing = f"{name} can't be set to {value}"
                apply(value)
        doing = "its user and groups can't be set"
        become(*numbers)
        doing = f"{path} can't be executed"
        os.execv(path, args)  # noqa: S606  # its whole purpose
    except OSError as error:
        report(status, error.errno or INVALID, doing)
    except (Refused, ValueError, OverflowError) as error:
        report(status, INVALID, f"{doing} ({error})")
    except MemoryError:
        report(status, NO_MEMORY, doing)


def report(status: int, number: int, what: str) -> None:
    """Tell the supervisor and end."""
    os.write(status, f"{number} {what}".encode("utf-8", "replace"))
    os._exit(127)


def enter_cgroup(folder: str) -> None:
    """Move into a cgroup, as whoever we still are: all that comes from the worker is born in it."""
    fd = os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"0")
    os.close(fd)


def reset_signals(*, ignore_hup: bool) -> None:
    """Every action to its default and none blocked; only an ignored SIGHUP stays (nohup)."""
    for number in range(1, _signal.NSIG):
        try:
            _signal.signal(number, _signal.SIG_DFL)
        except (OSError, ValueError):
            continue  # SIGKILL, SIGSTOP, and what the C library keeps for itself
    if ignore_hup:
        _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def restore_environment(settings: Settings) -> None:
    """Take back what the interpreter puts there in the C locale (PEP 538)."""
    if "lc_ctype" in settings:
        os.environ["LC_CTYPE"] = settings["lc_ctype"][0]
    else:
        os.environ.pop("LC_CTYPE", None)


def nice(value: str) -> None:
    """Add to the niceness."""
    os.nice(int(value))


def umask(value: str) -> None:
    """Set the file mode creation mask."""
    os.umask(int(value))


def cpus(value: str) -> None:
    """Bind to processors."""
    if not hasattr(os, "sched_setaffinity"):
        raise Refused("this system can't bind a process to processors")
    os.sched_setaffinity(0, [int(cpu) for cpu in value.split(",")])


def rlimit(value: str) -> None:
    """Set one limit: `which:soft:hard`."""
    import resource

    which, soft, hard = map(int, value.split(":"))
    resource.setrlimit(which, (soft, hard))


def become(uid: int | None, gid: int | None, groups: list[int] | None) -> None:
    """Become another user: groups first, since the user may not change them any more."""
    if groups is not None and set(groups) != set(os.getgroups()):
        os.setgroups(groups)
    if gid is not None and {os.getgid(), os.getegid()} != {gid}:
        os.setgid(gid)
    if uid is not None and {os.getuid(), os.geteuid()} != {uid}:
        os.setuid(uid)


def identity(
    user: str | None, group: str | None, groups: str | None
) -> tuple[int | None, int | None, list[int] | None]:
    """The numbers to become: user, group, supplementary groups; None leaves one as it is."""
    uid, gid, wanted = (None, None, None) if user is None else find_user(user, with_group=group is None)
    if group is not None:
        gid = find_group(group)
    if wanted is None and uid is not None and gid is not None:
        wanted = [gid]
    if groups is not None:
        wanted = [find_group(name) for name in groups.split(",") if name]
    return uid, gid, wanted


def find_user(user: str, *, with_group: bool) -> tuple[int, int | None, list[int] | None]:
    """Number, group and groups of a user; one that is known by its number only has neither of the last two."""
    import pwd

    number = number_of(user)
    try:
        account = pwd.getpwnam(user) if number is None else pwd.getpwuid(number)
    except KeyError:
        if number is None:
            raise Refused(f"this host has no user {user!r}") from None
        if with_group:
            raise Refused(f"this host has no user {user}, so its group has to be given") from None
        return number, None, None
    return account.pw_uid, account.pw_gid, os.getgrouplist(account.pw_name, account.pw_gid)


def find_group(name: str) -> int:
    """The number of a group."""
    import grp

    number = number_of(name)
    if number is not None:
        return number
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Refused(f"this host has no group {name!r}") from None


def number_of(name: str) -> int | None:
    """A user or group that is given by its number."""
    return int(name) if name.isdecimal() else None


if __name__ == "__main__":
    main(sys.argv)
