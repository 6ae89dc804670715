"""Make the supervisor's `__main__` module available in a worker, so that what is defined there can be unpickled.

As `multiprocessing.spawn` does it: the file is run again under the name `__mp_main__`. While that happens no run may
be started, or an unguarded main module would start workers that start workers.
"""

from __future__ import annotations

import sys
import types


def replace(main: tuple[str, str] | None) -> None:
    """Put a new `__main__` in the place of this worker's program.

    Args:
        main: ("module", name) or ("path", path) of the supervisor's, run again; None gives an empty one.
    """
    module = types.ModuleType("__main__" if main is None else "__mp_main__")
    if main is not None:
        module.__dict__.update(_rerun(*main))
        sys.modules["__mp_main__"] = module
    _programs.append(sys.modules["__main__"])
    sys.modules["__main__"] = module


_programs: list[types.ModuleType] = []  # kept: a module's globals are cleared when it is dropped
_being_prepared: list[str] = []  # the main module that is being run again at this moment


def _rerun(how: str, what: str) -> dict[str, object]:
    import runpy

    _being_prepared.append(what)
    try:
        if how == "module":
            return runpy.run_module(what, run_name="__mp_main__", alter_sys=True)
        return runpy.run_path(what, run_name="__mp_main__")
    finally:
        _being_prepared.clear()


def check_not_being_prepared(name: str) -> None:
    """Refuse to start a run from a main module that a worker is only importing.

    Raises:
        RuntimeError: with what to do about it.
    """
    if _being_prepared:
        raise RuntimeError(
            f"{name}: the program's main module starts a run while a worker is importing it to find its functions;"
            ' put what starts the run under `if __name__ == "__main__":`'
        )
