"""What the two ends of a benchmark tell each other: coordinates of queue pairs, and when a round begins.

The active end leads. Over TCP this is as plain as perftest's own exchange: no secret is in it, and the passive
end that listens offers nothing but a scratch buffer, to one partner, for one run.

    active  -> passive  Setup      what will be measured, the active end's queue pairs
    passive -> active   Ready      its queue pairs and its buffer          (or Refusal)
    active  -> passive  Go         a round of n messages begins
    passive -> active   Going      it has posted what the round needs
    passive -> active   Finished   it has seen the round's last message    (two-sided tests only)
"""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec

from nopin.errors import PeerError, UsageError
from nopin.lab.line import Line

RENDEZVOUS_VERSION = 2
DEFAULT_PORT = 18515
"""perftest's."""
CONNECT_TIMEOUT_S = 10.0


class Coordinates(msgspec.Struct, kw_only=True, frozen=True):
    """One queue pair as its partner has to know it."""

    gid: bytes
    port: int
    qpn: int
    psn: int


class Word(msgspec.Struct, tag_field="word", kw_only=True):
    """Base of every message."""


class Setup(Word, tag="setup"):
    """What will be measured; see `nopin.lab.bench_spec` for the fields' meaning."""

    version: int
    test: str
    memory: str
    size_bytes_max: int
    tx_depth: int
    path_mtu: int
    queue_pairs: list[Coordinates]
    address: int
    rkey: int


class Ready(Word, tag="ready"):
    """The passive end is connected; `path_mtu` is the smaller of both ends'."""

    queue_pairs: list[Coordinates]
    address: int
    rkey: int
    path_mtu: int


class Refusal(Word, tag="refusal"):
    """The passive end cannot do it."""

    message: str


class Go(Word, tag="go"):
    """A round begins: n_messages of size_bytes on each queue pair."""

    size_bytes: int
    n_messages: int


class Going(Word, tag="going"):
    """The passive end is prepared for the round."""


class Finished(Word, tag="finished"):
    """The passive end has seen the round's last message."""


AnyWord = Setup | Ready | Refusal | Go | Going | Finished
BenchLine = Line[AnyWord]
Expected = TypeVar("Expected", bound=Word)


def connect(host: str, port: int) -> BenchLine:
    """Connect to a waiting passive end.

    Raises:
        PeerError: nobody listens there.
    """
    try:
        sock = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
    except OSError as refused:
        raise PeerError(
            f"no benchmark partner at {host}:{port} ({refused.strerror or refused}); "
            f"start one there: nopin bench TEST --listen"
        ) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Line(sock, AnyWord)


def listen(address: str, port: int) -> socket.socket:
    """Listen for active ends on a TCP address.

    Raises:
        UsageError: that cannot be done there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as problem:
        reason, *_ = str(problem.strerror).split(" (")  # where Python says what it was at
        raise UsageError(
            f"cannot listen on {address} port {port}: {reason}; give an address of this host and a free --port"
        ) from None


def accept(listener: socket.socket) -> BenchLine:
    """Wait for one active end and return the line to it."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Line(sock, AnyWord)


def expect(line: BenchLine, kind: type[Expected], timeout_s: float = 60.0) -> Expected:
    """Receive the one kind of message that may come now.

    Raises:
        PeerError: the partner refuses, says something else, or is gone.
    """
    word = line.receive(timeout_s)
    if isinstance(word, Refusal):
        raise PeerError(f"the partner refuses: {word.message}")
    if not isinstance(word, kind):
        raise PeerError(f"the partner said {type(word).__name__} when {kind.__name__} was due")
    return word
