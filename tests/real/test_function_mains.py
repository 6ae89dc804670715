"""Functions of the main module travel, whatever that is: a script, a module, `-c`, stdin, a REPL, a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NET = 60.0
PROGRAM = """
import asyncio, os, sys
from aelastic import DefaultLogsSpecs, Std, start_processes

with open(os.environ["IMPORTS"], "a") as imports:
    imports.write(__name__ + " ")

class Point:
    def __init__(self, x): self.x = x

def make(x):
    return Point(x)

async def main(function, method):
    async with start_processes("test", function, {0: (0,), 1: (1,)}, start_method=method) as ctx:
        result = await ctx.wait()
    result.raise_for_failures("test")
    print([(value.x, type(value) is Point) for value in result.return_values.values()])
"""
RUN = "asyncio.run(main({function}, {method!r}))\n"
GUARD = 'if __name__ == "__main__":\n    '
SEEN = "[(0, True), (1, True)]\n"
NOTEBOOK = """
import sys, types
sys.modules["__main__"] = module = types.ModuleType("__main__")  # as a kernel does: it has neither file nor spec
for number, cell in enumerate(open(sys.argv[1]).read().split("\\n\\n")):
    exec(compile(cell, f"<cell {number}>", "exec"), vars(module))
"""


class Place:
    """A folder with a program in it, and a way to run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), str(self.folder), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *arguments],
            input=text,
            env={**os.environ, "IMPORTS": str(self.folder / "imports"), "PYTHONPATH": path},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=NET,
        )

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    @property
    def imports(self) -> list[str]:
        """Under which names the program was run, by all processes together."""
        return (self.folder / "imports").read_text().split()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("how", "method"),
    [
        *((how, "spawn") for how in ("path", "relative path", "module", "package", "stdin", "REPL", "notebook")),
        *((how, "forkserver") for how in ("path", "-c")),
    ],
)
def test_functions_of_the_main_module_travel(place: Place, how: str, method: str) -> None:
    """By name where a worker can import the main module, by value where not; values come back as what they were."""
    text = PROGRAM + GUARD + RUN.format(function="make", method=method)
    path = place.write("program.py", text)
    place.write("package/__main__.py", text)
    notebook = place.write("notebook.py", NOTEBOOK)
    arguments = {
        "path": [path],
        "relative path": ["program.py"],
        "module": ["-m", "program"],
        "package": ["-m", "package"],
        "-c": ["-c", text],
        "stdin": ["-"],
        "REPL": ["-i", "-q"],
        "notebook": [notebook, path],
    }
    typed = text.replace("    with", " with").replace("\nwith", "\n\nwith")
    typed = "\n".join(f"\n{line}" if line and line[0] not in " \n" else line for line in typed.split("\n")) + "\n\n"
    done = place.run(*arguments[how], text={"stdin": text, "REPL": typed}.get(how, ""))
    assert done.stdout.endswith(SEEN), done.stderr  # a REPL shows what else has a value
    imported = ["__mp_main__"] * 2 if how in ("path", "relative path", "module") else []
    assert place.imports == ["__main__", *imported]


def test_closures_over_the_main_module_travel(place: Place) -> None:
    """A lambda goes by value; what it names of an importable main module goes with it."""
    path = place.write("program.py", PROGRAM + GUARD + RUN.format(function="lambda x: make(x)", method="spawn"))
    done = place.run(path)
    assert done.stdout == SEEN, done.stderr


@pytest.mark.parametrize(("how", "method"), [("path", "spawn"), ("module", "forkserver")])
def test_an_unguarded_main_module_gets_a_clear_error_and_no_fork_bomb(place: Place, how: str, method: str) -> None:
    """Each worker imports it once, and starts nothing."""
    path = place.write("program.py", PROGRAM + RUN.format(function="make", method=method))
    done = place.run(*([path] if how == "path" else ["-m", "program"]))
    assert done.returncode == 1
    assert 'put what starts the run under `if __name__ == "__main__":`' in done.stderr.replace("\n    ", "")
    assert place.imports[0] == "__main__"
    assert 1 <= place.imports.count("__mp_main__") <= 2
    assert len(place.imports) <= 3


def test_an_unguarded_run_of_a_command_is_refused_too(place: Place) -> None:
    """Every worker that imports the main module would start it again."""
    command = "asyncio.run(start_command())\n"
    text = PROGRAM + (
        "async def start_command():\n"
        '    async with start_processes("command", "true", {0: ()}) as ctx:\n'
        "        await ctx.wait()\n"
    )
    done = place.run(place.write("program.py", text + command + GUARD + RUN.format(function="make", method="spawn")))
    assert done.returncode == 1
    assert "command: the program's main module starts a run while a worker is importing it" in done.stderr


def test_a_main_module_that_exits_when_it_is_imported_is_told(place: Place) -> None:
    """In words, and not as an exit of the worker's."""
    text = PROGRAM + GUARD + RUN.format(function="make", method="spawn") + "else:\n    sys.exit(0)\n"
    done = place.run(place.write("program.py", text))
    assert "something that was imported for it exits" in done.stderr


def test_a_function_of_the_main_module_is_found_from_another_folder(place: Place) -> None:
    """The worker's own `cwd` changes nothing about where the main module is."""
    run = RUN.format(function="make", method="spawn").replace("main(", "main_elsewhere(")
    text = PROGRAM.replace("async def main(", "async def main_elsewhere(").replace(
        "start_method=method)", 'start_method=method, options=WorkerOptions(cwd="/"))'
    )
    text = text.replace("Std, start_processes", "Std, WorkerOptions, start_processes")
    place.write("program.py", text + GUARD + run)
    done = place.run("program.py")
    assert done.stdout == SEEN, done.stderr


def test_a_frozen_program_is_told_that_it_has_no_interpreter(place: Place) -> None:
    """Its own executable would be started in place of an interpreter, again and again."""
    text = "import sys; sys.frozen = True\n" + PROGRAM + GUARD + RUN.format(function="make", method="spawn")
    done = place.run(place.write("program.py", text))
    assert "name one with multiprocessing.set_executable" in done.stderr
    assert place.imports == ["__main__"]
