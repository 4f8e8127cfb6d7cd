"""The keeper: a server that was killed gets a successor, one that exits does not, and it gives up in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nopin.verbs import keeper

SERVER = """
import os, signal, sys
log, deaths = sys.argv[1], int(sys.argv[2])
with open(log, "a") as lines:
    lines.write(f"{os.getpid()} {' '.join(sys.argv[3:])}\\n")
with open(log) as lines:
    n_started = len(lines.readlines())
if n_started <= deaths:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7)
"""


def kept(tmp_path: Path, n_deaths: int, *arguments: str, owner: int | None = None) -> tuple[int, list[str], str]:
    """Run a server that is killed `n_deaths` times and then exits with 7; exit code, a line per start, words."""
    script, log = tmp_path / "server.py", tmp_path / "log"
    script.write_text(SERVER)
    command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid() if owner is None else owner)]
    command += [sys.executable, str(script), str(log), str(n_deaths), *arguments]
    fds = [int(arguments[1])] if "--ready-fd" in arguments else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, pass_fds=fds)
    return done.returncode, [line.partition(" ")[2].strip() for line in log.read_text().splitlines()], done.stderr


def test_a_server_that_exits_is_not_started_again(tmp_path: Path) -> None:
    assert kept(tmp_path, 0, "--some", "thing") == (7, ["--some thing"], "")


def test_a_killed_server_gets_a_successor_told_to_take_over(tmp_path: Path) -> None:
    code, starts, words = kept(tmp_path, 2, "--some", "thing")
    assert (code, starts) == (7, ["--some thing", "--some thing --takeover", "--some thing --takeover"])
    assert words.count("SIGKILL") == 2


def test_only_the_first_server_is_waited_for(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    _, starts, _ = kept(tmp_path, 1, "--ready-fd", str(writer), "--more")
    assert starts == [f"--ready-fd {writer} --more", "--more --takeover"]
    os.close(writer)
    assert os.read(reader, 1) == b"", "the keeper holds no copy of it, or whoever waits would wait for ever"
    os.close(reader)


def test_successors_that_die_at_once_are_given_up(tmp_path: Path) -> None:
    code, starts, words = kept(tmp_path, 1000)
    assert code == 128 + 9
    assert len(starts) == keeper.RESTARTS_MAX + 1
    assert "no successor" in words


def test_an_owner_that_is_gone_needs_no_successor(tmp_path: Path) -> None:
    """The owner is a zombie: its number can still be opened, and it is gone."""
    owner = os.fork()
    if owner == 0:
        os._exit(0)
    os.waitid(os.P_PID, owner, os.WEXITED | os.WNOWAIT)
    code, starts, _ = kept(tmp_path, 1, owner=owner)
    os.waitpid(owner, 0)
    assert (code, len(starts)) == (128 + 9, 1)
