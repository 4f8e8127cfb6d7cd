"""Frames of the connection exchange on a byte stream: a length, then one message. No I/O here."""

from __future__ import annotations

import struct

import msgspec

from nopin.control.codec import MALFORMED, ProtocolError
from nopin.control.exchange import FRAME_BYTES_MAX, AnyFrame, Frame

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyFrame] = msgspec.msgpack.Decoder(AnyFrame)


def encode_frame(frame: Frame) -> bytes:
    """Encode one frame, its length in front.

    Raises:
        ProtocolError: it takes more than FRAME_BYTES_MAX.
    """
    try:
        data = _encoder.encode(frame)
    except (OverflowError, TypeError) as problem:
        raise ProtocolError(f"{type(frame).__name__} cannot be sent: {problem}") from problem
    if len(data) > FRAME_BYTES_MAX:
        raise ProtocolError(f"{type(frame).__name__} takes {len(data)} bytes, over {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Puts frames together from pieces of a stream.

    It never holds more than one frame and the piece just fed: a length beyond the bound is refused when it is
    seen, before anything is kept for it.
    """

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, piece: bytes) -> list[AnyFrame]:
        """Take bytes of the stream, return the frames they complete.

        Raises:
            ProtocolError: an impossible length or a malformed message; the stream cannot be used any more.
        """
        self._held += piece
        frames: list[AnyFrame] = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> AnyFrame | None:
        if len(self._held) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._held)
        if length > FRAME_BYTES_MAX:
            raise ProtocolError(f"a frame of {length} bytes, over {FRAME_BYTES_MAX}")
        end = _LENGTH.size + length
        if len(self._held) < end:
            return None
        data = bytes(self._held[_LENGTH.size : end])
        del self._held[:end]
        try:
            return _decoder.decode(data)
        except MALFORMED as problem:
            raise ProtocolError(f"malformed frame: {problem}") from problem
