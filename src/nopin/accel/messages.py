"""What an owner and its worker say to each other, over a socket pair that only they have.

    owner                         worker
    MapWindow + memory fd   ->
                            <-    Mapped + userfaultfd, or NotMapped
    UnmapWindow             ->                              (no answer)
    Run                     ->
    Stop                    ->                              (at any time: its job may have ended, or is the next one)
                            <-    Finished, Failed or Stopped

One job at a time. Descriptors travel beside the packet.
"""

from __future__ import annotations

import msgspec

from nopin.control.codec import ProtocolError
from nopin.control.messages import MESSAGE_BYTES_MAX
from nopin.errors import UsageError


class MapWindow(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Map the file beside this at [start, start + length), and hand over a userfaultfd for it.

    Attributes:
        server: path of the device server's socket, for children that the worker may fork.
    """

    start: int
    length: int
    server: str


class UnmapWindow(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Unmap what is mapped at `start`."""

    start: int


class Run(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Run a kernel; `arguments` is a pair, positional and by name (see `arguments`)."""

    job: int
    kernel: str
    arguments: bytes


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Stop this job at its next chunk."""

    job: int


class Mapped(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The window is mapped and registered; its userfaultfd, opened with these features, is beside this."""

    features: int


class NotMapped(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The window cannot be mapped."""

    reason: str


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """What a job took.

    Attributes:
        run_ns: from the worker's taking it to its end.
        n_faults: page faults of the worker meanwhile, by the kernel's count (`getrusage`); most waited for the device
            server, those of the worker's own memory did not.
    """

    run_ns: int
    n_faults: int


class Finished(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The job is done; `result` as `arguments` writes it."""

    job: int
    result: bytes
    usage: Usage


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The kernel raised: name of the exception's type, its message, a short traceback."""

    job: int
    exception: str
    message: str
    traceback: str
    usage: Usage


class Stopped(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The job was stopped between two chunks."""

    job: int
    usage: Usage


ToWorker = MapWindow | UnmapWindow | Run | Stop
FromWorker = Mapped | NotMapped | Finished | Failed | Stopped

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """Write one message.

    Raises:
        UsageError: it is longer than a packet may be: arguments or a result that belong in an array.
    """
    data = _encoder.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise UsageError(
            f"{len(data)} bytes beside the arrays, over {MESSAGE_BYTES_MAX}; put what is long into an array in an arena"
        )
    return data


def decode_to_worker(data: bytes) -> ToWorker:
    """Read what the owner sent. Raises ProtocolError when it is nothing an owner sends."""
    try:
        return _to_worker.decode(data)
    except msgspec.MsgspecError as problem:
        raise ProtocolError(f"malformed message to a worker: {problem}") from problem


def decode_from_worker(data: bytes) -> FromWorker:
    """Read what the worker sent. Raises ProtocolError when it is nothing a worker sends."""
    try:
        return _from_worker.decode(data)
    except msgspec.MsgspecError as problem:
        raise ProtocolError(f"malformed message from a worker: {problem}") from problem
