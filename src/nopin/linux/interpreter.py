"""Other Python processes of our own: they find the modules that this process finds, and none but those."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

_STDERR = 2
"""The last of the standard streams."""


def python_command(*arguments: str) -> list[str]:
    """Return the command that runs this interpreter with `-m MODULE` or `-c TEXT` and their arguments.

    Without -P the working directory would come first where modules are looked for, and a `numpy.py` that lies there
    would be run in place of numpy.
    """
    return [sys.executable, "-P", *arguments]


def python_environment() -> dict[str, str]:
    """Return our environment, with the modules of this process on the path.

    The working directory is on it only where it is on ours: in an interactive shell, and with `python -c`.
    """
    here = ""
    with contextlib.suppress(FileNotFoundError):  # it has been removed: nothing is found there any more
        here = os.getcwd()
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (entry or here for entry in sys.path)))}


def fill_standard_streams() -> None:
    """Open /dev/null in place of standard streams that are closed.

    A descriptor of ours would take their number otherwise, and be what processes that are started from here write to.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Have what this thread starts inside begin with SIGINT blocked.

    Ctrl-C reaches every process of a terminal, and one that is still importing could only answer with a traceback. It
    takes the signal when it calls `let_interrupts_through`, or never.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_interrupts_through() -> None:
    """Take SIGINT from now on; one that came meanwhile arrives here."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
