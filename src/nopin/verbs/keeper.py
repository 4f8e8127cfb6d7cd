"""Keeps one device server running: starts it, and starts its successor when it was killed.

The library starts its server under this. A process whose memory is managed cannot start a new server itself when the
old one dies: all its threads may be waiting at a page fault, one of them with the interpreter lock, until somebody
serves them. So somebody else must, and that is this small process, which does nothing but wait.

Run as a file by a bare interpreter (no packages, not even ours: it should cost little and start at once):

    keeper.py OWNER_PID COMMAND...

`COMMAND --takeover` is what a successor is started with. The server ends by itself when OWNER_PID does. A server that
exits, well or badly, has decided so and is not started again; one that a signal ended has not. Too many deaths in a row
mean that the successor dies of what it takes over, and then it is over.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

RESTARTS_MAX = 8
"""Successors within `WINDOW_S`."""
WINDOW_S = 10.0


def main(arguments: list[str]) -> int:
    """Keep the server; returns its exit code once it is over."""
    owner, command = os.pidfd_open(int(arguments[0])), arguments[1:]
    inherited = _inherited_fds(command)
    server = subprocess.Popen(command, pass_fds=inherited)
    for fd in inherited:
        os.close(fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: server.send_signal(received))
    deaths: list[float] = []
    successor = [*_without_ready_fd(command), "--takeover"]
    while (status := server.wait()) < 0 and not _exited(owner):
        if -status in (signal.SIGTERM, signal.SIGINT):
            break
        now = time.monotonic()
        deaths = [*(death for death in deaths if death > now - WINDOW_S), now]
        _say(f"the device server (pid {server.pid}) was ended by {signal.Signals(-status).name}")
        if len(deaths) > RESTARTS_MAX:
            _say(f"{len(deaths)} deaths within {WINDOW_S:g} s: no successor is started")
            break
        server = subprocess.Popen(successor)
    return status if status >= 0 else 128 - status


def _inherited_fds(command: list[str]) -> list[int]:
    return [int(command[at + 1]) for at, word in enumerate(command) if word == "--ready-fd"]


def _without_ready_fd(command: list[str]) -> list[str]:
    """Nobody waits for a successor: its clients find it when they ask."""
    if "--ready-fd" not in command:
        return command
    at = command.index("--ready-fd")
    return command[:at] + command[at + 2 :]


def _exited(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def _say(text: str) -> None:
    sys.stderr.write(f"nopin keeper: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
