"""Launch n copies of a command or a function, supervise them inside a running asyncio loop, keep every byte.

General layout. A file imports only from floors below its own:

    doors     __init__ (lazy)   worker (standard library only)   cli/
    floor 5   _supervisor, _kept                  several runs under one roof
              _start, _context, _readiness, _run, _signals   a run: from start to result; the caller's handle on it
              _round, _succession                 all its ranks; the attempts of a gang or of a rank, one after another
    floor 4   _gang, _attempt                     one attempt: start all, watch all, stop all
    floor 3   _worker                             one incarnation of a rank: its process, its output, its end
    floor 2   _process/ _logs/ _function/ _health/ _bus _guard _evidence _tasks _threads _limits _contagion
              _descriptors                        machines that touch the OS
    floor 1   _spec _lifecycle _restart _logs/ (plan, lines)                         rules: no await, no clock
    floor 0   _std _exit _options _policies _conditions _failures _results _events                   words: values
    cellar    _child/                             what runs inside other processes; standard library only

A byte goes `_worker` -> `_logs/pump` -> the file first, then `_logs/lines` -> console, filters, subscribers.
An exit goes `_process` -> `_worker` (status, failure) -> `_gang` (outcome) -> `_restart` (decision) -> `_succession`
(next attempt), or `_round` and `_run` (result).
"""

from __future__ import annotations

# Neither typing nor importlib at the door: they are two thirds of what `import aelastic` cost. Type checkers know
# the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from ._bus import Events as Events
    from ._child.record import ErrorHandler as ErrorHandler
    from ._child.record import record as record
    from ._conditions import HealthPolicy as HealthPolicy
    from ._conditions import HttpGet as HttpGet
    from ._conditions import LinePattern as LinePattern
    from ._conditions import Notify as Notify
    from ._conditions import TcpPort as TcpPort
    from ._context import MultiprocessContext as MultiprocessContext
    from ._context import PContext as PContext
    from ._context import Starting as Starting
    from ._context import SubprocessContext as SubprocessContext
    from ._events import AttemptFinished as AttemptFinished
    from ._events import AttemptStarted as AttemptStarted
    from ._events import Event as Event
    from ._events import GuardLost as GuardLost
    from ._events import JournalLost as JournalLost
    from ._events import OutputHeld as OutputHeld
    from ._events import OutputLost as OutputLost
    from ._events import RestartScheduled as RestartScheduled
    from ._events import RunFinished as RunFinished
    from ._events import RunStarted as RunStarted
    from ._events import StopRequested as StopRequested
    from ._events import SurvivorsLeft as SurvivorsLeft
    from ._events import UsageSampled as UsageSampled
    from ._events import WatchdogExpired as WatchdogExpired
    from ._events import WorkerExited as WorkerExited
    from ._events import WorkerFailed as WorkerFailed
    from ._events import WorkerReady as WorkerReady
    from ._events import WorkerSignaled as WorkerSignaled
    from ._events import WorkerStarted as WorkerStarted
    from ._events import WorkerUnkillable as WorkerUnkillable
    from ._exit import ExitStatus as ExitStatus
    from ._failures import ChildFailedError as ChildFailedError
    from ._failures import LineNotSeen as LineNotSeen
    from ._failures import ProcessFailure as ProcessFailure
    from ._failures import RankMappingError as RankMappingError
    from ._failures import SignalException as SignalException
    from ._failures import StreamNotCaptured as StreamNotCaptured
    from ._failures import SupervisorFailed as SupervisorFailed
    from ._failures import WorkerNotReady as WorkerNotReady
    from ._logs import DefaultLogsSpecs as DefaultLogsSpecs
    from ._logs import LineOrigin as LineOrigin
    from ._logs import Lines as Lines
    from ._logs import LogsDest as LogsDest
    from ._logs import LogsSpecs as LogsSpecs
    from ._options import WorkerOptions as WorkerOptions
    from ._policies import Backoff as Backoff
    from ._policies import RestartPolicy as RestartPolicy
    from ._policies import Rotate as Rotate
    from ._policies import StopPolicy as StopPolicy
    from ._results import ExitUsage as ExitUsage
    from ._results import LineMatch as LineMatch
    from ._results import LogLine as LogLine
    from ._results import RunProcsResult as RunProcsResult
    from ._results import Survivor as Survivor
    from ._results import Usage as Usage
    from ._signals import forward_signals as forward_signals
    from ._start import start_processes as start_processes
    from ._std import Std as Std
    from ._std import to_map as to_map
    from ._supervisor import Supervisor as Supervisor

_HOMES = {
    "_bus": "Events",
    "_child.record": "ErrorHandler record",
    "_conditions": "HealthPolicy HttpGet LinePattern Notify TcpPort",
    "_context": "MultiprocessContext PContext Starting SubprocessContext",
    "_events": (
        "AttemptFinished AttemptStarted Event GuardLost JournalLost OutputHeld OutputLost RestartScheduled RunFinished"
        " RunStarted StopRequested SurvivorsLeft UsageSampled WatchdogExpired WorkerExited WorkerFailed WorkerReady"
        " WorkerSignaled WorkerStarted WorkerUnkillable"
    ),
    "_exit": "ExitStatus",
    "_failures": (
        "ChildFailedError LineNotSeen ProcessFailure RankMappingError SignalException StreamNotCaptured"
        " SupervisorFailed WorkerNotReady"
    ),
    "_logs": "DefaultLogsSpecs LineOrigin Lines LogsDest LogsSpecs",
    "_options": "WorkerOptions",
    "_policies": "Backoff RestartPolicy Rotate StopPolicy",
    "_results": "ExitUsage LineMatch LogLine RunProcsResult Survivor Usage",
    "_signals": "forward_signals",
    "_start": "start_processes",
    "_std": "Std to_map",
    "_supervisor": "Supervisor",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # a list of the names in the table above


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415  # see the top

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
