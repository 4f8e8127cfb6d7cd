"""A real device server in a process of its own, and raw clients of it, for the tests of server and exchange."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nopin.control.codec import encode
from nopin.control.messages import (
    PROTOCOL_VERSION,
    AllocPd,
    CreateCq,
    CreateQp,
    GetStat,
    Handle,
    Hello,
    QpCreated,
    Register,
    Registered,
    Request,
    Stat,
    Welcome,
)
from nopin.control.packets import close_all, send_packet
from nopin.control.socket import ControlSocket
from nopin.lab.servers import LocalServer
from nopin.nic.abi import Access
from nopin.nic.attributes import QpCaps
from nopin.verbs.remote import RemoteArray

_MAIN = """
import sys
from pathlib import Path
from nopin.server.limits import Limits
from nopin.server.service import ServeConfig, serve
path, ready, limits = sys.argv[1:]
serve(ServeConfig(socket_path=Path(path), ready_fd=int(ready), limits=Limits(**eval(limits))))
"""
ALL_ACCESS = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)
PATIENCE_S = 10.0


class Server:
    """A running server."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Figures of one kind, asked over a connection of its own."""
        with client(self) as asking:
            stat, _ = asking.request(GetStat(seq=0))
        assert isinstance(stat, Stat)
        return [row for row in stat.rows if row["kind"] == kind]

    def count(self, name: str) -> int:
        """One count of the device row."""
        return int(self.rows("dev")[0][name])

    def n_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def running_server(folder: Path, **limits: int) -> Iterator[Server]:
    """Start a server and end it in good order."""
    path = folder / "server.sock"
    ready, theirs = os.pipe()
    command = [sys.executable, "-c", _MAIN, str(path), str(theirs), repr(limits)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, pass_fds=[theirs], env=environment, stdin=subprocess.DEVNULL)
    os.close(theirs)
    try:
        assert os.read(ready, 1), "the server did not come up"
        yield Server(path, process)
        assert process.poll() is None, "the server has ended"
    finally:
        os.close(ready)
        process.terminate()
        try:
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def client(server: Server) -> Iterator[ControlSocket]:
    """Connect and say hello."""
    connection = ControlSocket(server.path)
    try:
        hello(connection)
        yield connection
    finally:
        connection.close()


def hello(connection: ControlSocket) -> Welcome:
    welcome, fds = connection.request(Hello(seq=0, version=PROTOCOL_VERSION))
    close_all(fds)
    assert isinstance(welcome, Welcome)
    return welcome


def handle_of(connection: ControlSocket, request: Request) -> int:
    """Carry out a request that makes an object; its descriptors are not kept."""
    reply, fds = connection.request(request)
    close_all(fds)
    assert isinstance(reply, Handle)
    return reply.handle


def register(connection: ControlSocket, pd: int, address: int, length: int, access: int = ALL_ACCESS) -> Registered:
    request = Register(seq=0, pd=pd, address=address, length=length, iova=address, access=access, discipline=0)
    reply, _ = connection.request(request)
    assert isinstance(reply, Registered)
    return reply


def create_qp(connection: ControlSocket, pd: int, cq: int, caps: QpCaps | None = None) -> tuple[QpCreated, int]:
    """Make a queue pair; returns it with the descriptor of its rings."""
    request = CreateQp(seq=0, pd=pd, send_cq=cq, recv_cq=cq, caps=caps or QpCaps())
    reply, fds = connection.request(request)
    assert isinstance(reply, QpCreated)
    return reply, fds[0]


def one_of_each(connection: ControlSocket) -> tuple[int, int, int]:
    """Make a domain, a completion queue and a queue pair; returns their names."""
    pd = handle_of(connection, AllocPd(seq=0))
    cq = handle_of(connection, CreateCq(seq=0, depth=16))
    qp, fd = create_qp(connection, pd, cq)
    os.close(fd)
    return pd, cq, qp.qpn


class RawClient:
    """A client that may send anything."""

    def __init__(self, server: Server, *, greeted: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(server.path))
        if greeted:
            self.send(encode(Hello(seq=1, version=PROTOCOL_VERSION)))
            _, fds, _, _ = socket.recv_fds(self.sock, 65536, 8)
            close_all(fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        send_packet(self.sock, data, fds)

    def is_disconnected(self) -> bool:
        """Wait for the server's end of the connection, past what it still says."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.sock.close()


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds; False if it does not come to hold."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def replace(servers: list[LocalServer]) -> None:
    """Kill the last server; its successor is the last from now on."""
    servers[-1].kill()
    servers.append(LocalServer(servers[-1].socket_path, ["--takeover"]))


def read_until_it_fails(remote: RemoteArray) -> None:
    """Read and read, until a read raises."""
    for _ in range(100_000):
        remote[0]


def damage_swap(pid: int) -> None:
    """Overwrite what a server has in its swap files."""
    folder = Path(f"/proc/{pid}/fd")
    files = [each for each in folder.iterdir() if "/var/tmp/" in os.readlink(each)]
    assert files
    for file in files:
        length = file.stat().st_size
        file.write_bytes(b"\xa5" * length)
