"""The `LogsSpecs` of the house: files under a log directory, and streams left where they are.

Making directories is all they do to the disk; who opens the files is `outputs`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Mapping
from typing import final

from aelastic._failures import RankMappingError
from aelastic._policies import Rotate
from aelastic._std import Std, to_map

from .plan import DEFAULT_BUFFER_BYTES, LogsDest, LogsSpecs
from .prefix import DEFAULT_PREFIX, LinePrefix, check_prefix

JOURNAL = "events.jsonl"
NO_RUN_ID = "run"
"""The directory's first name when the environments carry no run id."""


class DefaultLogsSpecs(LogsSpecs):
    """Files under `<log_dir>/<run_id>_<unique>/attempt_<k>/<rank>/`: stdout.log, stderr.log, error.json.

    Filter files lie in the attempt's directory, the journal (events.jsonl) in the run's. Nothing that another launch
    wrote is ever deleted or truncated. One object may serve many launches at once.

    Source: `torch.distributed.elastic.multiprocessing.DefaultLogsSpecs`.

    Args:
        log_dir: made if it doesn't exist; None makes a temporary directory, which is kept; `os.devnull` turns
            files, error files and the journal off, and streams are inherited.
        redirects: streams that go to files, for all ranks or by rank.
        tee: streams that go to files and to the console.
        local_ranks_filter: ranks shown on the console; None or empty shows all. What another rank tees still goes to
            its file and to `lines()`, what it would have inherited is discarded.
        capture: streams piped for `lines()`, without file or console unless asked for too.
        rotate: cuts files into pieces; None (default) doesn't.
        timestamps: whether a time index is written beside each file. Default False.
        prefix: what stands before each line on the console and in the filter files: a format string of the fields
            `{name} {rank} {std} {host} {time}`, such as `"{time:%H:%M:%S} {rank} {std} "`, or a callable that is given
            a `LineOrigin`. `log_line_prefixes` of `start_processes` overrides it. One that tells the time, or is a
            callable, is asked once for all lines that are read at one time, in the event loop; what a callable raises
            fails the run. Default `"[{name}{rank}]:"`.
        buffer_bytes: how much of one stream may wait for its file before the worker is held back; a batch that is
            being read (at most 1 MiB) may come on top. Default 4 MiB.

    Raises:
        NotADirectoryError: if `log_dir` is a file.
        TypeError: if `prefix` is neither a string nor a callable, or `buffer_bytes` no whole number.
        ValueError: if `prefix` names an unknown field or has a newline in it, or `buffer_bytes` is less than 1.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        redirects: Std | Mapping[int, Std] = Std.NONE,
        tee: Std | Mapping[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
        *,
        capture: Std | Mapping[int, Std] = Std.NONE,
        rotate: Rotate | None = None,
        timestamps: bool = False,
        prefix: LinePrefix = DEFAULT_PREFIX,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    ) -> None:
        root = None if log_dir is None or log_dir == "" else os.fspath(log_dir)
        if root is not None and root != os.devnull:
            root = os.path.abspath(root)  # the host may change its directory before the launch
            _check_directory(root)
        super().__init__(
            root,
            _checked_streams("redirects", redirects),
            _checked_streams("tee", tee),
            _checked_ranks(local_ranks_filter),
        )
        self._capture = _checked_streams("capture", capture)
        if rotate is not None and not isinstance(rotate, Rotate):
            raise TypeError(f"DefaultLogsSpecs.rotate must be a Rotate or None, not {rotate!r}")
        self._rotate = rotate
        self._timestamps = timestamps
        self._prefix = check_prefix(prefix)
        self._buffer_bytes = _checked_size("buffer_bytes", buffer_bytes)
        self._lock = threading.Lock()
        self._run_dirs: dict[str, str] = {}

    @property
    def root_log_dir(self) -> str:
        """The directory under which runs have theirs; made at the first call when none was given."""
        with self._lock:
            return self._root()

    def _root(self) -> str:
        if self._root_log_dir is None:
            self._root_log_dir = tempfile.mkdtemp(prefix="aelastic_")
        return self._root_log_dir

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Make the directories of one attempt and name its files.

        Args:
            envs: by rank; they are not changed.

        Raises:
            RankMappingError: if a setting names a rank that is not in `envs`.
            NotADirectoryError: if the log directory is a file by now.
            OSError: if a directory can't be made; the error names it.
        """
        nprocs = len(envs)
        for name, setting in (("redirects", self._redirects), ("tee", self._tee), ("capture", self._capture)):
            if isinstance(setting, Mapping) and (extra := sorted(setting.keys() - range(nprocs))):
                what = f"DefaultLogsSpecs.{name}"
                raise RankMappingError(what, missing=(), extra=extra, nprocs=nprocs, every=False)
        if self._root_log_dir == os.devnull:
            return self._without_files(nprocs)
        env = envs.get(0, {})
        run_id = env.get("AELASTIC_RUN_ID") or env.get("TORCHELASTIC_RUN_ID") or NO_RUN_ID
        attempt = env.get("AELASTIC_ATTEMPT") or env.get("TORCHELASTIC_RESTART_COUNT") or "0"
        run_dir = self._run_dir(run_id)
        attempt_dir = os.path.join(run_dir, f"attempt_{attempt}")
        for rank in range(nprocs):
            os.makedirs(os.path.join(attempt_dir, str(rank)), exist_ok=True)
        return self._with_files(nprocs, run_dir, attempt_dir)

    def _run_dir(self, run_id: str) -> str:
        # One attempt goes beside the other; the number of runs that one object serves is a caller's own affair.
        with self._lock:
            if run_id not in self._run_dirs:
                root = self._root()
                _check_directory(root)
                os.makedirs(root, exist_ok=True)
                safe = re.sub(r"[^\w.-]", "_", run_id)[:100]
                self._run_dirs[run_id] = tempfile.mkdtemp(prefix=f"{safe}_", dir=root)
            return self._run_dirs[run_id]

    def _shown(self, rank: int) -> bool:
        return not self._local_ranks_filter or rank in self._local_ranks_filter

    def _without_files(self, nprocs: int) -> LogsDest:
        paths = {rank: "" if self._shown(rank) else os.devnull for rank in range(nprocs)}
        return LogsDest(stdouts=paths, stderrs=dict(paths), error_files=dict.fromkeys(range(nprocs), ""))

    def _with_files(self, nprocs: int, run_dir: str, attempt_dir: str) -> LogsDest:
        tees = to_map(self._tee, nprocs)
        redirects = to_map(self._redirects, nprocs)
        captures = to_map(self._capture, nprocs)
        dest = LogsDest(
            filtered_stdout=os.path.join(attempt_dir, "filtered_stdout.log"),
            filtered_stderr=os.path.join(attempt_dir, "filtered_stderr.log"),
            captures=captures,
            rotate=self._rotate,
            timestamps=self._timestamps,
            prefix=self._prefix,
            buffer_bytes=self._buffer_bytes,
            run_dir=run_dir,
            journal=os.path.join(run_dir, JOURNAL),
        )
        for rank in range(nprocs):
            rank_dir = os.path.join(attempt_dir, str(rank))
            dest.error_files[rank] = os.path.join(rank_dir, "error.json")
            for std, files, shown in (
                (Std.OUT, dest.stdouts, dest.tee_stdouts),
                (Std.ERR, dest.stderrs, dest.tee_stderrs),
            ):
                path = os.path.join(rank_dir, f"{std.label}.log")
                files[rank] = path if std in redirects[rank] | tees[rank] else ""
                if std in tees[rank] and self._shown(rank):
                    shown[rank] = path
                elif std in tees[rank]:
                    captures[rank] |= std
                elif not files[rank] and not self._shown(rank):
                    files[rank] = os.devnull
        return dest

    def __repr__(self) -> str:
        return (
            f"DefaultLogsSpecs(root_log_dir={self._root_log_dir}, redirects={self._redirects}, tee={self._tee},"
            f" local_ranks_filter={self._local_ranks_filter})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DefaultLogsSpecs) and self._choices() == other._choices()

    __hash__ = None  # type: ignore[assignment]  # equal by value, and its mappings may change

    def _choices(self) -> tuple[object, ...]:
        return (
            self._root_log_dir,
            self._redirects,
            self._tee,
            self._local_ranks_filter,
            self._capture,
            self._rotate,
            self._timestamps,
            self._prefix,
            self._buffer_bytes,
        )


def _checked_size(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{what} must be 1 or more, not {value}")
    return value


def _checked_streams(name: str, setting: object) -> Std | Mapping[int, Std]:
    """A setting of streams, for all ranks or rank by rank."""
    if not isinstance(setting, Mapping):
        return _checked_std(f"DefaultLogsSpecs.{name}", setting)
    for rank, std in setting.items():
        if not _is_rank(rank):
            raise TypeError(f"DefaultLogsSpecs.{name} must have ranks as its keys, not {rank!r}")
        _checked_std(f"DefaultLogsSpecs.{name}[{rank}]", std)
    return setting


def _checked_std(what: str, value: object) -> Std:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be a Std, such as Std.OUT or Std.ALL, not {value!r}")
    if not Std.NONE <= value <= Std.ALL:
        raise ValueError(f"{what} is {value}, which names no stream: use 0 none, 1 stdout, 2 stderr, 3 both")
    return Std(value)


def _checked_ranks(ranks: object) -> set[int] | None:
    if ranks is None:
        return None
    if isinstance(ranks, Mapping) or not isinstance(ranks, Collection) or not all(map(_is_rank, ranks)):
        raise TypeError(f"DefaultLogsSpecs.local_ranks_filter must be a set of ranks or None, not {ranks!r}")
    return set(ranks)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_directory(path: str) -> None:
    if os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(f"log_dir: {path} is a file; name a directory, or one that can be made")


@final
class InheritLogsSpecs(LogsSpecs):
    """What `logs_specs=None` means: streams are inherited, error files lie in a private temporary directory.

    One object serves one run; whoever made it calls `remove` when the run has ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._directory = ""

    @property
    def root_log_dir(self) -> str:
        """Always `""`: there are no logs to look for."""
        return ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name an error file for every rank, readable by this user only.

        Raises:
            OSError: if the temporary directory can't be made.
        """
        if not self._directory:
            self._directory = tempfile.mkdtemp(prefix="aelastic_")
        attempt = envs.get(0, {}).get("AELASTIC_ATTEMPT", "0")
        ranks = range(len(envs))
        return LogsDest(
            stdouts=dict.fromkeys(ranks, ""),
            stderrs=dict.fromkeys(ranks, ""),
            error_files={rank: os.path.join(self._directory, f"error_{attempt}_{rank}.json") for rank in ranks},
        )

    def remove(self) -> None:
        """Remove the directory with all that is in it; idempotent, blocks on the disk."""
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
