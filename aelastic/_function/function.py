"""The functions of one attempt: prepared before anything starts, started, and heard to the end."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import subprocess
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, final

from aelastic._process import Command, Confirmation, Process, launch
from aelastic._returned import Returned
from aelastic._spec import LINEAGE, RunSpec
from aelastic._tasks import service

from . import forking
from .channel import CallPipe, ResultChannel
from .server import BOOTSTRAP, ForkServer

if TYPE_CHECKING:
    from .payload import Payload  # imports multiprocessing and cloudpickle, which only functions need


@final
class Function:
    """One call a rank, from pickling to its result.

    Args:
        spec: with a callable as its entrypoint.
        payloads: by rank, owned from here on; none for `fork`.
        program: the interpreter and its flags, without the script.
        server: of the run; started when it is needed.
    """

    def __init__(
        self,
        spec: RunSpec,
        ranks: Collection[int],
        payloads: dict[int, Payload],
        program: tuple[str, ...],
        server: ForkServer,
    ) -> None:
        self._spec = spec
        self._program = program
        self._payloads = payloads
        self._calls: dict[int, CallPipe] = {}
        self._results = {rank: ResultChannel(spec.who(rank)) for rank in ranks}
        self._server = server
        self._hurry: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.returned: dict[int, asyncio.Future[Returned]] = {
            rank: result.returned for rank, result in self._results.items()
        }
        """By rank: resolved as soon as a result is there, or can't come any more."""

    @classmethod
    async def prepare(cls, spec: RunSpec, ranks: Collection[int], threads: Executor, server: ForkServer) -> Function:
        """Pickle the call of each of these ranks, in a thread; nothing is pickled for `fork`.

        Raises:
            pickle.PicklingError: naming the rank, if a call can't be sent to a worker.
            RuntimeError: if there is no interpreter.
        """
        if spec.start_method == "fork":
            return cls(spec, ranks, {}, (), server)
        payloads, program = await asyncio.get_running_loop().run_in_executor(threads, _pickle_all, spec, ranks)
        return cls(spec, ranks, payloads, program, server)

    async def launch(self, rank: int, bare: Command) -> Process:
        """Start a rank's worker, send it its call and wait for its result from now on.

        Not to be cancelled, like `aelastic._process.launch`.

        Args:
            bare: all but the program.

        Raises:
            OSError: as `aelastic._process.launch` does, and when no descriptor is left.
        """
        result = self._results[rank]
        result.open()
        match self._spec.start_method:
            case "fork":
                call = (_function_of(self._spec), self._spec.args[rank])
                process = await forking.fork(call, bare, result)
            case "forkserver":
                process = await self._have_forked(rank, bare, result)
            case _:
                process = await self._spawn(rank, bare, result)
        result.started()
        process.exited.add_done_callback(lambda _: result.worker_ended())
        return process

    async def _spawn(self, rank: int, bare: Command, result: ResultChannel) -> Process:
        payload = self._payloads[rank]
        call = self._calls[rank] = CallPipe(payload.parts(payload.descriptors, payload.tracker_fd))
        process = await launch(
            dataclasses.replace(
                bare,
                argv=(*self._program, BOOTSTRAP, "work", str(call.child_fd), str(result.child_fd)),
                pass_fds=(*bare.pass_fds, call.child_fd, result.child_fd, *payload.shared),
            )
        )
        payload.close()
        call.started()
        return process

    async def _have_forked(self, rank: int, bare: Command, result: ResultChannel) -> Process:
        payload = self._payloads[rank]
        settings = forking.settings_of(bare)
        call = self._calls[rank] = CallPipe(payload.parts((), payload.tracker_fd, settings=settings))
        await self._server.start(self._program, _outer_environment(bare.env))
        confirmation = Confirmation(bare.who)
        streams = (bare.stdin, bare.stdout, bare.stderr)
        fds = (*streams, call.child_fd, result.child_fd, confirmation.child_fd, *payload.shared)
        try:
            process = await self._server.fork(bare, fds, confirmation, self._hurry)
        except BaseException:
            confirmation.close()
            raise
        confirmation.started()
        payload.close()
        call.started()
        return process

    def hasten(self) -> None:
        """Wait for no start much longer, because the run stops; idempotent."""
        if not self._hurry.done():
            self._hurry.set_result(None)

    async def close(self) -> None:
        """Give up what has not arrived; every `returned` is resolved after it. Idempotent, bounded."""
        closing = [service(result.close(), name="close a result") for result in self._results.values()]
        await asyncio.wait(closing)
        for closed in closing:
            closed.result()
        for payload in self._payloads.values():
            payload.close()
        for call in self._calls.values():
            call.close()


def _outer_environment(env: Mapping[str, str]) -> Mapping[str, str]:
    """A worker's environment without what tells of its run and rank."""
    outer = {name: value for name, value in env.items() if not name.startswith(("AELASTIC_", "TORCHELASTIC_"))}
    return {**outer, LINEAGE: env.get(LINEAGE, "").removesuffix(f"{env.get('AELASTIC_RUN_ID', '')}:")}


def _function_of(spec: RunSpec) -> Any:
    if isinstance(spec.entrypoint, str):
        raise TypeError(f"{spec.name} runs a command, not a function: {spec.entrypoint!r}")
    return spec.entrypoint


def _pickle_all(spec: RunSpec, ranks: Collection[int]) -> tuple[dict[int, Payload], tuple[str, ...]]:
    from .payload import interpreter, pickle_call  # noqa: PLC0415  # see above, and here it is off the loop

    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    program = (interpreter(), *flags)
    payloads: dict[int, Payload] = {}
    by_args: dict[tuple[int, ...], Payload] = {}
    function = _function_of(spec)
    try:
        for rank in ranks:
            args = spec.args[rank]
            same = tuple(map(id, args))  # all ranks often get the same, and it may be large
            payloads[rank] = dataclasses.replace(by_args[same]) if same in by_args else pickle_call(function, args)
            if payloads[rank].is_shareable:
                by_args[same] = payloads[rank]
    except BaseException as error:
        for payload in payloads.values():
            payload.close()
        if not isinstance(error, Exception):
            raise
        who = spec.who(tuple(ranks)[len(payloads)])
        raise pickle.PicklingError(
            f"{who} can't be sent to a worker: its function or an argument can't be pickled: "
            f"{type(error).__name__}: {error}"
        ) from error
    return payloads, program
