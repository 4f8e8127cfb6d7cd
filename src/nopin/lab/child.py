"""A function in a fresh Python process, with a line to talk to it.

Not `multiprocessing`: nothing is forked and nothing is pickled, so the child shares no memory, lock or
descriptor with us except those named, and it works the same from a test, a script and an interactive shell.
"""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from nopin.errors import NopinError
from nopin.lab.line import Line, PartnerGone
from nopin.linux.interpreter import (
    interrupts_held_back,
    let_interrupts_through,
    python_command,
    python_environment,
)
from nopin.linux.prctl import set_parent_death_signal

END_TIMEOUT_S = 5.0
_BOOTSTRAP = "import sys; from nopin.lab.child import run; run(int(sys.argv[1]), *sys.argv[2:])"


class Child:
    """A running child process.

    Attributes:
        line: the parent's end; `receive` gives whatever the function sent, as plain values.
        pid: of the child.
    """

    def __init__(
        self, function: Callable[..., None], *args: Any, pass_fds: Sequence[int] = (), received: Any = Any
    ) -> None:
        """Start `function(line, *args)`; it must be at the top level of an importable module.

        Arguments travel as msgpack: numbers, texts, bytes, lists and mappings of them. `received` is the type
        of the messages that the child sends.
        """
        ours, theirs = socket.socketpair()
        arguments = str(theirs.fileno()), function.__module__, function.__name__
        with theirs, interrupts_held_back():
            self._process = subprocess.Popen(
                python_command("-c", _BOOTSTRAP, *arguments),
                pass_fds=(theirs.fileno(), *pass_fds),
                env=python_environment(),
                stdin=subprocess.DEVNULL,
            )
        self.pid = self._process.pid
        self.line: Line[Any] = Line(ours, received)
        self.line.send(list(args))

    def ask(self, message: Any, timeout_s: float | None = 60.0) -> Any:
        """Send a message and wait for the answer."""
        self.line.send(message)
        return self.line.receive(timeout_s)

    def kill(self) -> None:
        """End the child as kill -9 does, and reap it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> int:
        """Close the line, wait for the child and return its exit code; a child that lingers is killed."""
        self.line.close()
        try:
            return self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(fd: int, module: str, name: str) -> None:
    """Be the child: find the function, take its arguments from the line, call it."""
    set_parent_death_signal(signal.SIGKILL)
    function = getattr(importlib.import_module(module), name)
    line: Line[Any] = Line(socket.socket(fileno=fd))
    try:
        let_interrupts_through()
        function(line, *line.receive())
    except PartnerGone:
        return  # how a parent says that it needs us no more
    except (NopinError, KeyboardInterrupt) as ended:
        if str(ended):
            sys.stderr.write(f"nopin: {name}: {ended}\n")
        sys.exit(1)
