"""Bytes to control messages and back; whatever is malformed becomes one ProtocolError."""

from __future__ import annotations

import msgspec

from nopin.control.messages import (
    MESSAGE_BYTES_MAX,
    AnyReply,
    AnyRequest,
    CreateChannel,
    CreateCq,
    CreateQp,
    Hello,
    Reply,
    Request,
)
from nopin.errors import NopinError


class ProtocolError(NopinError):
    """The other side sent something that is no valid message; the connection has to end."""


REPLY_DESCRIPTORS: dict[type[Request], int] = {Hello: 2, CreateChannel: 1, CreateCq: 1, CreateQp: 1}
"""How many descriptors travel beside the positive reply to a request; none where it is not listed."""

_encoder = msgspec.msgpack.Encoder()
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
