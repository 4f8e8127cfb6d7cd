"""A folder for the sockets and logs of one run. It goes with the run, whatever ends that."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "nopin-run-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder that is ours alone, and remove it in the end with what is in it.

    After kill -9 nobody is left to do so; then whoever makes the next folder does. A lock says which are in use: it
    goes with its process, and holds for processes of other containers that share the temporary folder, too.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose processes are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():  # root can open everybody's
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """Make a folder and lock it; again, where somebody took it for abandoned in between."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)
