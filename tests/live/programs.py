"""Programs of users, run as users run them: in processes of their own, by one interpreter."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

WAIT_S = 60


def said(environment: Mapping[str, str], *arguments: str, cwd: Path | None = None) -> str:
    """Run the interpreter with these arguments; returns what it printed once it has ended well."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Owner:
    """A program that prints the URL of what it shares, and goes on when it is given a line.

    Attributes:
        url: its first line.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.url = process.stdout.readline().strip()

    def go_on(self) -> str:
        """Give it its line; returns what else it printed once it has ended well."""
        rest, _ = self._process.communicate("\n", timeout=WAIT_S)
        assert self._process.returncode == 0
        return rest


@contextlib.contextmanager
def owner(environment: Mapping[str, str], *arguments: str, cwd: Path | None = None) -> Iterator[Owner]:
    """Run the interpreter with these arguments as an owner; it is ended with the block at the latest."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Owner(process)
        finally:
            process.kill()
