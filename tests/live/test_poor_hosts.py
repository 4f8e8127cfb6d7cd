"""Hosts that lack something, and programs that are started oddly: what a user is told, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from forbidding import MEMFD_CREATE, PIDFD_OPEN, PROCESS_VM, forbidding

from nopin.control.paths import default_socket_path

COMMAND = [sys.executable, "-m", "nopin"]
URL = f"nopin://127.0.0.1:1/{'a' * 16}#{'A' * 43}"
SHARE_AND_READ = """
import numpy as np, nopin
memory = np.arange(1000)
with nopin.Device() as device, device.share(memory) as share, nopin.attach(share.url) as remote:
    remote[0] = 7
    assert memory[0] == 7 and (remote[...] == memory).all()
raise SystemExit(42)
"""


def run(environment: dict[str, str], command: Sequence[str], **how: object) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 50, "check": False} | how
    done: subprocess.CompletedProcess[str] = subprocess.run(command, env=environment, **options)  # type: ignore[call-overload]  # any options
    return done


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize(
    ("numbers", "feature"), [(PROCESS_VM, "process_vm"), (MEMFD_CREATE, "memfd"), (PIDFD_OPEN, "pidfd")]
)
def test_what_cannot_be_done_without_is_said_with_the_remedy_and_ends_with_3(
    numbers: tuple[int, ...], feature: str, code: int, environment: dict[str, str]
) -> None:
    """Also where it is the server, started as a child, that finds it missing."""
    before = forbidding(numbers, code=code)
    got = run(environment, [*before, *COMMAND, "get", URL])
    assert got.returncode == 3, got.stderr
    (line,) = got.stderr.splitlines()
    assert line.startswith(f"nopin: {feature}: {os.strerror(code)}; ")
    assert "seccomp profile" in line
    told = run(environment, [*before, *COMMAND, "doctor", "-j"])
    assert told.returncode == 3, told.stderr
    assert f"nopin cannot work here without {feature}: " in told.stderr
    assert not json.loads(told.stdout)["usable"]


def test_a_server_without_descriptors_names_the_limit(environment: dict[str, str]) -> None:
    def poor() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))

    done = run(environment, [*COMMAND, "get", URL], preexec_fn=poor)
    assert done.returncode == 1
    assert "Too many open files; raise the limit" in done.stderr
    assert "ulimit -n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_do_no_harm(closed: str, environment: dict[str, str], tmp_path: Path) -> None:
    """What is opened next gets their numbers: a server that is started would find its descriptors overwritten."""
    done = run(environment, ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", SHARE_AND_READ])
    assert done.returncode == 42, done.stderr
    np.save(tmp_path / "array.npy", np.arange(10))
    script = f'exec "$0" -m nopin get "$(cat url)" -o part.npy {closed}'
    with subprocess.Popen(
        [*COMMAND, "share", "array.npy"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as sharing:
        assert sharing.stdout is not None
        (tmp_path / "url").write_text(sharing.stdout.readline())
        done = run(environment, ["sh", "-c", script, sys.executable], cwd=tmp_path)
        sharing.terminate()
    assert done.returncode == 0, done.stderr
    assert (np.load(tmp_path / "part.npy") == np.arange(10)).all()


def test_a_relative_runtime_directory_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its specification asks: programs in two directories would not find each other."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    assert default_socket_path() == Path(f"/tmp/nopin-{os.getuid()}/server.sock")


def test_a_working_directory_that_is_gone_does_no_harm(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    script = f'rmdir "{folder}"; exec "$@"'
    done = run(environment, ["sh", "-c", script, "sh", sys.executable, "-c", SHARE_AND_READ], cwd=folder)
    assert done.returncode == 42, done.stderr
