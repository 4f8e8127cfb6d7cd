"""A device server of our own: for two ends on one machine that must not share one, and for tests."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nopin.errors import ServerError
from nopin.linux.interpreter import python_command, python_environment

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


class LocalServer:
    """A `nopin serve` process that ends with us.

    Attributes:
        socket_path: where its clients connect: `Device(server=str(socket_path))`.
        pid: of the server.
    """

    def __init__(self, socket_path: Path, options: Sequence[str] = ()) -> None:
        """Start it and wait until it listens; `options` are further ones of `nopin serve`.

        Raises:
            ServerError: it ended at once; the message is its last words.
        """
        self.socket_path = socket_path
        ready, theirs = os.pipe()
        command = python_command("-m", "nopin", "serve", "--socket", str(socket_path))
        command += ["--child-of", str(os.getpid()), "--ready-fd", str(theirs), *options]
        self._log_path = socket_path.with_suffix(".log")
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs,),
                env=python_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we end it in order
            )
        os.close(theirs)
        self.pid = self._process.pid
        try:
            self._await_ready(ready)
        except BaseException:  # Ctrl-C too: nobody else knows of it yet
            self.close()
            raise
        finally:
            os.close(ready)

    def _await_ready(self, ready: int) -> None:
        readable, _, _ = select.select([ready], [], [], START_TIMEOUT_S)
        if readable and os.read(ready, 1):
            return
        raise ServerError(f"a device server did not start: {self.last_words() or 'it said nothing'}")

    def last_words(self) -> str:
        """Return what it wrote last on its standard error."""
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> int:
        """Stop it in order and return its exit code; twice is fine."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
