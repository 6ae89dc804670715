"""What the README shows is so: its commands, its example, its layout."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETS_UP = "python3 -m venv .venv && .venv/bin/python -m pip install"


def block(heading: str, language: str) -> str:
    """The first block of a language under a heading."""
    _, _, section = README.partition(f"\n## {heading}\n")
    found = re.search(rf"^```{language}\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"README.md has no block of {language!r} under '## {heading}'")
    return found[1]


def run(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a newcomer would, from an empty directory."""
    return subprocess.run(
        words, cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("heading", ["Run four ranks", "Run the tests"])
def test_each_command_sets_itself_up(heading: str) -> None:
    """One line, which begins with an environment of its own."""
    assert block(heading, "sh").startswith(SETS_UP)
    assert block(heading, "sh").count("\n") == 1


def test_the_gate_runs_the_readmes_test_command() -> None:
    """`.ci/run` reads it from here; the suite you are in is what it runs."""
    assert "## Run the tests" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert block("Run the tests", "sh").rstrip().partition(" && ")[2].endswith("-m pytest -n 2 --dist worksteal")


def test_the_main_job_runs(tmp_path: Path) -> None:
    """Four ranks, each line with its rank; the last line names the directory."""
    job = block("Run four ranks", "sh").rpartition(" && ")[2]
    words = [sys.executable if word == ".venv/bin/python" else word for word in shlex.split(job)]
    assert words[:2] == [".venv/bin/aelastic", "run"]
    done = run([sys.executable, "-m", "aelastic", *words[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        assert f"[bench{rank}]:" in done.stdout
    run_dir = Path(tmp_path, done.stderr.splitlines()[-1].partition(": ")[2])
    assert {path.name for path in (run_dir / "attempt_0").iterdir() if path.is_dir()} == {"0", "1", "2", "3"}
    assert (run_dir / "events.jsonl").is_file()


def test_the_example_runs(tmp_path: Path) -> None:
    """Pasted into a file, it does what it says."""
    (tmp_path / "service.py").write_text(block("Use it in a service", "python"), encoding="utf-8")
    done = run([sys.executable, "-W", "error", "service.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for rank in range(4):
        assert f"[trainer{rank}]:rank {rank} of 4" in done.stdout
    assert "trainer: succeeded" in done.stdout


def test_the_example_of_health_runs(tmp_path: Path) -> None:
    """A real server, asked by nobody but its own log."""
    (tmp_path / "web.py").write_text(
        block("Wait until it is ready, notice when it is stuck", "python"), encoding="utf-8"
    )
    done = run([sys.executable, "-W", "error", "web.py"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"serving on port \d+\nUsage\(cpu_seconds=.*processes=1\)\n", done.stdout)


def test_the_example_of_restarts_runs(tmp_path: Path) -> None:
    """One that fails twice, and two runs under a supervisor."""
    (tmp_path / "again.py").write_text(block("Start again what has failed", "python"), encoding="utf-8")
    done = run([sys.executable, "-W", "error", "again.py"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"succeeded after 3 attempts\n\{0: \d+\} \{0: \d+, 1: \d+\}\n", done.stdout)


def test_no_address_and_no_machine_in_it() -> None:
    """It is true everywhere."""
    assert not re.search(r"https?://|/work/|/home/|/root/", README)
