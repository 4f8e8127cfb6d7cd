"""docs/model.md tells the truth: its scenario runs, and its counter-example reads as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from nopin.model.explore.mutants import mutants
from nopin.model.explore.scenario import scenarios

PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text()


def block(language: str, number: int = 0) -> str:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found[number]


def nopin(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nopin", *arguments]
    return subprocess.run(command, cwd=where, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)


def test_a_scenario_of_a_users_own_is_explored_and_its_counter_example_replayed(tmp_path: Path) -> None:
    (tmp_path / "my_driver.py").write_text(block("python"))
    for command in block("sh").splitlines():
        program, *arguments = command.split()
        assert program == "nopin"
        ended = nopin(tmp_path, *arguments)
        assert ended.returncode == 4, ended.stderr
    assert ended.stdout == block("text")


def test_a_machine_of_a_users_own_takes_the_time_that_is_printed() -> None:
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(block("python", 1), "docs/model.md", "exec"), {})
    assert printed.getvalue() == block("text", 1)


def test_a_file_without_that_scenario_is_told(tmp_path: Path) -> None:
    ended = nopin(tmp_path, "explore", "none.py:nothing")
    assert ended.returncode == 2
    assert "none.py" in ended.stderr


def test_names_on_the_page_are_there() -> None:
    known = {*scenarios(), *mutants(), "driver_vs_munmap"}
    named = set(re.findall(r"\b\w+_vs_\w+\b", PAGE))
    assert named
    assert named <= known
