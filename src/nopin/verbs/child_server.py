"""A device server as a child of this process, for programs that use the library without starting one.

Programs that start at once share one server: a lock decides who starts it. It ends with the process that
started it, so where several programs share one for long, `nopin serve` is started by itself.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nopin.control.paths import check_socket_path, ensure_private_directory, log_path
from nopin.control.readiness import heard_ready
from nopin.errors import ServerError, ServerGone
from nopin.linux.interpreter import python_command, python_environment
from nopin.linux.pidfd import PidFd
from nopin.verbs import keeper
from nopin.verbs.session import Session

START_TIMEOUT_S = 20.0

_children: list[subprocess.Popen[bytes]] = []
"""Kept, so that nobody reports a running child as forgotten."""


def connect_or_start(path: Path) -> Session:
    """Connect to the server at `path`; start one there if there is none.

    Raises:
        ServerError: it does not start; the message holds its last words.
        HostLacks: it does not start for want of a feature.
        ServerRefused: it does not want us.
    """
    try:
        return Session(path)
    except ServerGone:
        pass
    check_socket_path(path)
    ensure_private_directory(path.parent)
    lock = os.open(path.with_name(path.name + ".start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Session(path)  # somebody started it while we waited for the lock
        except ServerGone:
            return _start(path)
    finally:
        os.close(lock)


def _start(path: Path) -> Session:
    """Start a server and connect to it; to another one where that was first, such as a killed server's successor."""
    try:
        _start_child(path)
    except ServerError as problem:
        try:
            return Session(path)
        except ServerGone:
            raise ServerError(f"{problem} (its log: {log_path(path)})") from None
    return Session(path)


def _start_child(path: Path) -> None:
    PidFd.open(os.getpid()).close()  # the keeper needs such, and could not say what is wrong
    _children.append(start_server(path, under=[sys.executable, "-I", "-S", keeper.__file__, str(os.getpid())]))


def start_server(path: Path, options: Sequence[str] = (), under: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process, and wait until it listens at `path`.

    Args:
        options: of `nopin serve`, besides.
        under: a command that is given the server's, and runs it.

    Raises:
        ServerError: it does not start; the message holds its last words.
        HostLacks: it does not start for want of a feature.
    """
    ready, theirs = os.pipe()
    command = [*under, *python_command("-m", "nopin", "serve", "--socket", str(path), "--child-of", str(os.getpid()))]
    command += ["--ready-fd", str(theirs), *options]
    try:
        with log_path(path).open("wb") as log:
            child = subprocess.Popen(
                command,
                pass_fds=(theirs,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=python_environment(),
                start_new_session=True,  # Ctrl-C is for this program; the server ends with it anyway
            )
        os.close(theirs)
        theirs = -1
        _await_ready(ready, child, log_path(path))
        return child
    finally:
        os.close(ready)
        if theirs >= 0:
            os.close(theirs)


def _await_ready(ready: int, child: subprocess.Popen[bytes], log: Path) -> None:
    waiter = select.poll()
    waiter.register(ready, select.POLLIN)
    try:
        if waiter.poll(START_TIMEOUT_S * 1000) and heard_ready(ready):
            return
        lines = log.read_text(errors="replace").strip().splitlines()
        words = lines[-1].removeprefix("nopin: ") if lines else "it said nothing"
        raise ServerError(f"the device server did not start: {words}")
    except BaseException:  # Ctrl-C too: nobody else knows of it yet
        child.terminate()  # or the keeper, which passes it on
        child.wait()
        raise
