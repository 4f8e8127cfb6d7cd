"""Where a user's default device server is found, and the directory that keeps others out."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nopin.errors import ServerError

SOCKET_NAME = "server.sock"
SOCKET_PATH_BYTES_MAX = 107
"""sizeof(sun_path) less its final zero."""


def default_socket_path() -> Path:
    """Return the default server's socket: under XDG_RUNTIME_DIR, else in a directory of this user in /tmp.

    A relative XDG_RUNTIME_DIR is ignored, as the XDG base directory specification asks: two programs that run in two
    directories would not find each other.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "nopin" if os.path.isabs(runtime) else Path(f"/tmp/nopin-{os.getuid()}")
    return folder / SOCKET_NAME


def lock_path(socket_path: Path) -> Path:
    """Return the file whose flock says that a server owns the socket."""
    return socket_path.with_name(socket_path.name + ".lock")


def registry_path(socket_path: Path) -> Path:
    """Return the file that tells a server's successor where its arenas are."""
    return socket_path.with_name(socket_path.name + ".arenas")


def log_path(socket_path: Path) -> Path:
    """Return the file that takes the standard error of a server started as a child."""
    return socket_path.with_name(socket_path.name + ".log")


def ensure_private_directory(folder: Path) -> None:
    """Create the folder for this user alone, or check that it is so.

    Raises:
        ServerError: it is not a directory, belongs to somebody else, is open to others, or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as problem:
        text = f"cannot make {folder} for the server's socket: {problem.strerror}"
        raise ServerError(f"{text}; name another place, or another XDG_RUNTIME_DIR") from problem
    if not stat.S_ISDIR(found.st_mode):
        raise ServerError(f"{folder} is not a directory; remove it, or give the server another socket path")
    if found.st_uid != os.getuid():
        raise ServerError(f"{folder} belongs to uid {found.st_uid}, not to you; give another socket path")
    if found.st_mode & 0o077:
        ours = folder.name.startswith("nopin")  # never advise to close a directory that others need
        remedy = f"run: chmod 700 {folder}" if ours else "give a socket path in a directory of mode 700"
        raise ServerError(f"{folder} is open to other users (mode {found.st_mode & 0o777:o}); {remedy}")


def check_socket_path(path: Path) -> None:
    """Check that a Unix socket can have this path.

    Raises:
        ServerError: it is too long.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise ServerError(f"socket path of {length} bytes, over {SOCKET_PATH_BYTES_MAX}; give a shorter one: {path}")
