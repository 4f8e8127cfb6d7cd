"""A limit on the memory of some processes, as if the machine had no more.

By cgroup v1 only: there a group can be told that nobody is killed when memory is out, and who asked for it hears so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import eventually

_ROOT = Path("/sys/fs/cgroup/memory")


class MemoryLimit:
    """A group of processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, pid: int, n_bytes: int) -> None:
        """Let a process have no more than so much from now on, what it has already aside."""
        (self._folder / "memory.oom_control").write_text("1")  # nobody is killed for want of memory
        (self._folder / "cgroup.procs").write_text(str(pid))
        self.change(n_bytes)

    def change(self, n_bytes: int) -> None:
        (self._folder / "memory.limit_in_bytes").write_text(str(n_bytes))

    @property
    def n_refused(self) -> int:
        """Times somebody met the limit."""
        return int((self._folder / "memory.failcnt").read_text())


@contextlib.contextmanager
def memory_limit() -> Iterator[MemoryLimit]:
    """Make a group; it is gone afterwards. Skips the test where there can be none."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    mine = next((line.split(":", 2)[2] for line in lines if ":memory:" in line), None)
    if mine is None:
        pytest.skip("needs a memory cgroup of version 1")
    parent = _ROOT / mine.lstrip("/")
    folder = (parent if parent.is_dir() else _ROOT) / f"nopin-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as problem:
        pytest.skip(f"cannot make a memory cgroup: {problem}")
    limit = MemoryLimit(folder)
    try:
        yield limit
    finally:
        limit.change(1 << 40)  # whoever waits for memory goes on and ends
        assert eventually(lambda: _removed(folder)), f"{folder} cannot be removed: processes are left in it"


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
