"""Arguments and results of jobs as bytes.

Plain msgpack, with extension types for what it lacks: arrays by reference, tuples, complex numbers, numpy's scalars and
dtypes, slices. Nothing that is read here can run code: there is no pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nopin.accel.memory import ArrayRef
from nopin.control.dtypes import dtype_text, parse_dtype
from nopin.errors import UsageError

Refer = Callable[[NDArray[Any]], ArrayRef]
"""Makes the reference of an array, or raises UsageError when the other side could not reach it."""
Resolve = Callable[[ArrayRef], NDArray[Any]]
"""Finds the array a reference means."""

_ARRAY, _TUPLE, _COMPLEX, _SCALAR, _DTYPE, _SLICE = range(1, 7)
_KINDS = "numbers, texts, bytes, None, slices, dtypes, and lists, tuples and mappings of them"
_NESTING_MAX = 32

_encoder = msgspec.msgpack.Encoder()
_ref_decoder = msgspec.msgpack.Decoder(ArrayRef)


def encode(value: object, refer: Refer) -> bytes:
    """Write a value.

    Raises:
        UsageError: it is of a kind that cannot be sent, too large an integer, or nested too deeply; or `refer` raised.
    """
    try:
        return _encoder.encode(_plain(value, refer, 0))
    except OverflowError:
        raise UsageError("an integer of more than 64 bits cannot be sent; give it as text or bytes") from None


def decode(data: bytes, resolve: Resolve) -> Any:
    """Read what `encode` wrote.

    Raises:
        ValueError: it is something else, or `resolve` refused a reference.
    """
    try:
        return _read(data, resolve)
    except (msgspec.MsgspecError, TypeError, IndexError, RecursionError) as problem:
        raise ValueError(f"malformed arguments: {problem}") from problem


def _read(data: bytes, resolve: Resolve) -> Any:
    def extension(code: int, payload: memoryview) -> object:
        if code == _ARRAY:
            return resolve(_ref_decoder.decode(payload))
        parts = _read(bytes(payload), resolve)
        if code == _TUPLE:
            return tuple(parts)
        if code == _COMPLEX:
            return complex(*parts)
        if code == _SCALAR:
            return np.frombuffer(parts[1], parse_dtype(parts[0]))[0]
        if code == _DTYPE:
            return parse_dtype(parts)
        if code == _SLICE:
            return slice(*parts)
        raise ValueError(f"no extension type has code {code}")

    return msgspec.msgpack.Decoder(ext_hook=extension).decode(data)


def _plain(value: Any, refer: Refer, depth: int) -> Any:
    """The value in terms of msgpack. Numpy's scalars come first: some of them are Python's as well."""
    if depth > _NESTING_MAX:
        raise UsageError(f"arguments are nested more than {_NESTING_MAX} deep")
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(_ARRAY, _encoder.encode(refer(value)))
    if isinstance(value, np.generic):
        return _scalar(value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, complex):
        return _extension(_COMPLEX, [value.real, value.imag])
    if isinstance(value, list):
        return [_plain(each, refer, depth + 1) for each in value]
    if isinstance(value, tuple):
        return _extension(_TUPLE, [_plain(each, refer, depth + 1) for each in value])
    if isinstance(value, dict):
        return {_key(key): _plain(each, refer, depth + 1) for key, each in value.items()}
    if isinstance(value, slice):
        return _extension(_SLICE, [_plain(each, refer, depth + 1) for each in (value.start, value.stop, value.step)])
    if isinstance(value, np.dtype):
        return _extension(_DTYPE, dtype_text(value))
    if isinstance(value, type) and issubclass(value, np.generic | bool | int | float | complex):
        return _extension(_DTYPE, dtype_text(np.dtype(value)))
    raise UsageError(f"{type(value).__name__} cannot be sent; what can: arrays in an arena, {_KINDS}")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise UsageError(f"a mapping with {type(key).__name__} keys cannot be sent; use texts as keys")
    return key


def _scalar(value: np.generic) -> msgspec.msgpack.Ext:
    if value.dtype.hasobject:
        raise UsageError("a scalar that holds a Python object cannot be sent")
    return _extension(_SCALAR, [dtype_text(value.dtype), value.tobytes()])


def _extension(code: int, parts: object) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, _encoder.encode(parts))
