"""A device server of our own: for two ends on one machine that must not share one, and for tests."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nopin.verbs.child_server import start_server

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
            ServerError: it ended at once; the message holds its last words.
        """
        self.socket_path = socket_path
        self._process = start_server(socket_path, options)
        self.pid = self._process.pid

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
