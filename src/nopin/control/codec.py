"""Bytes to control messages and back; whatever is malformed becomes one ProtocolError."""

from __future__ import annotations

import operator

import msgspec

from nopin.control.arena_messages import ArenaReply, ArenaRequest, CreateArena, MapArena, MapperKind, ReclaimArena
from nopin.control.messages import (
    MESSAGE_BYTES_MAX,
    AllocPd,
    CreateChannel,
    CreateCq,
    CreateQp,
    DeallocPd,
    Deregister,
    DestroyChannel,
    DestroyCq,
    DestroyQp,
    Done,
    Event,
    GetStat,
    Handle,
    Hello,
    ModifyQp,
    Publish,
    Published,
    QpAttributes,
    QpCreated,
    QueryQp,
    Reclaim,
    Reclaimed,
    Refused,
    Register,
    Registered,
    Reply,
    Request,
    Stat,
    Welcome,
    Withdraw,
)
from nopin.errors import NopinError, UsageError


class ProtocolError(NopinError):
    """The other side sent something that is no valid message; the connection has to end."""


AnyRequest = (
    Hello
    | Reclaim
    | AllocPd
    | DeallocPd
    | Register
    | Deregister
    | Publish
    | Withdraw
    | CreateChannel
    | DestroyChannel
    | CreateCq
    | DestroyCq
    | CreateQp
    | ModifyQp
    | QueryQp
    | DestroyQp
    | GetStat
    | ArenaRequest
)
AnyReply = (
    Done
    | Refused
    | Welcome
    | Reclaimed
    | Handle
    | Registered
    | Published
    | QpCreated
    | QpAttributes
    | Stat
    | Event
    | ArenaReply
)

REPLY_DESCRIPTORS: dict[type[Request], int] = {Hello: 3, CreateChannel: 1, CreateCq: 1, CreateQp: 1, CreateArena: 4}
"""How many descriptors travel beside the positive reply to a request; none where it is not listed."""

REQUEST_DESCRIPTORS_MAX = 2


def request_descriptors(request: Request) -> int:
    """Return how many descriptors travel beside a request."""
    if isinstance(request, Hello):
        return int(request.has_uffd) + int(request.has_book)
    if isinstance(request, ReclaimArena):
        return 1
    if isinstance(request, MapArena):
        return 1 if request.kind is MapperKind.OWNER else 2
    return 0


_encoder = msgspec.msgpack.Encoder(enc_hook=operator.index)  # numpy's integers are integers
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_replies: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)

MALFORMED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What msgspec raises on malformed input."""


def encode(message: Request | Reply) -> bytes:
    """Encode one message.

    Raises:
        ProtocolError: it takes more than MESSAGE_BYTES_MAX, or holds an integer beyond 64 bits.
    """
    try:
        data = _encoder.encode(message)
    except (OverflowError, TypeError) as problem:
        raise ProtocolError(f"{type(message).__name__} cannot be sent: {problem}") from problem
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"{type(message).__name__} takes {len(data)} bytes, over {MESSAGE_BYTES_MAX}")
    return data


def encode_request(message: Request) -> bytes:
    """Encode a request such that the server understands it: it ends the connection of who sends what it does not.

    Raises:
        UsageError: a field has a value of the wrong type, is beyond 64 bits, or is too long.
    """
    try:
        data = encode(message)
        _requests.decode(data)
    except (ProtocolError, *MALFORMED) as problem:
        raise UsageError(f"{type(message).__name__} makes no sense: {problem}") from problem
    return data


def decode_request(data: bytes) -> AnyRequest:
    """Decode what a client sent.

    Raises:
        ProtocolError: not a request, or too long.
    """
    _check_length(data)
    try:
        return _requests.decode(data)
    except MALFORMED as problem:
        raise ProtocolError(f"malformed request: {problem}") from problem


def decode_reply(data: bytes) -> AnyReply:
    """Decode what a server sent.

    Raises:
        ProtocolError: not a reply or event, or too long.
    """
    _check_length(data)
    try:
        return _replies.decode(data)
    except MALFORMED as problem:
        raise ProtocolError(f"malformed reply: {problem}") from problem


def _check_length(data: bytes) -> None:
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"message of {len(data)} bytes, over {MESSAGE_BYTES_MAX}")
