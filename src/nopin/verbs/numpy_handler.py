"""NumPy's own way of allocating array data elsewhere: a memory handler (NEP 49), filled in through ctypes.

While a handler is set, in one thread or task, every array NumPy makes gets its bytes from it, owns them, and gives
them back to the same handler when it dies, whenever that is. So arrays in an arena are plain numpy arrays.

NumPy keeps the address of a handler's table for as long as an array lives, which can be until after the interpreter
took Python functions apart. So tables are kept for ever, and at exit `free` becomes a C function that does nothing.

Source: numpy/core/include/numpy/ndarraytypes.h (PyDataMem_Handler), numpy_api.py (slots of the C API table), NEP 49.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from ctypes import c_char, c_char_p, c_size_t, c_uint8, c_void_p, py_object
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nopin.linux.libc import FAST_LIBC
from nopin.verbs.heap import Heap

P = ParamSpec("P")
R = TypeVar("R")

_SET_HANDLER_SLOT = 304
_HANDLER_VERSION = 1
_CAPSULE_NAME = b"mem_handler"

_Malloc = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t)
_Calloc = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t)
_Realloc = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t)
_Free = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_size_t)

_libc_malloc = ctypes.CFUNCTYPE(c_void_p, c_size_t)(("malloc", FAST_LIBC))
_libc_calloc = ctypes.CFUNCTYPE(c_void_p, c_size_t, c_size_t)(("calloc", FAST_LIBC))
_libc_realloc = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t)(("realloc", FAST_LIBC))
_libc_free = ctypes.CFUNCTYPE(None, c_void_p)(("free", FAST_LIBC))


class _Table(ctypes.Structure):
    """PyDataMem_Handler."""

    _fields_ = (
        ("name", c_char * 127),
        ("version", c_uint8),
        ("context", c_void_p),
        ("malloc", _Malloc),
        ("calloc", _Calloc),
        ("realloc", _Realloc),
        ("free", _Free),
    )


class NumpyHandler:
    """A heap as NumPy's allocator.

    In a child after fork the heap gives nothing out: arrays made there while the handler is set are in ordinary
    memory, as are those a finaliser makes inside the allocator. `free` and `realloc` tell by the address.
    """

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._table = _Table(
            name=b"nopin",
            version=_HANDLER_VERSION,
            malloc=_Malloc(self._malloc),
            calloc=_Calloc(self._calloc),
            realloc=_Realloc(self._realloc),
            free=_Free(self._free),
        )
        _tables.append(self._table)
        self._capsule = _new_capsule(ctypes.addressof(self._table), _CAPSULE_NAME, None)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Have arrays that this thread (or task) makes inside allocated here."""
        before = _set_handler(self._capsule)
        try:
            yield
        finally:
            _set_handler(before)

    def call(self, function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
        """Call a function while it is active; quicker than a `with` block."""
        before = _set_handler(self._capsule)
        try:
            return function(*args, **named)
        finally:
            _set_handler(before)

    # What NumPy calls. An exception cannot leave these: ctypes would print it and return 0, "no memory".

    def _malloc(self, _context: int | None, length: int) -> int | None:
        if self._heap.usable:
            return self._heap.allocate(length, zero=False)
        return _as_address(_libc_malloc(length))

    def _calloc(self, _context: int | None, n: int, each: int) -> int | None:
        if self._heap.usable:
            return self._heap.allocate(n * each, zero=True)
        return _as_address(_libc_calloc(n, each))

    def _realloc(self, _context: int | None, address: int | None, length: int) -> int | None:
        if address is None:
            return self._malloc(None, length)
        if not self._heap.owns(address):
            return _as_address(_libc_realloc(address, length))
        return self._heap.reallocate(address, length)

    def _free(self, _context: int | None, address: int | None, _length: int) -> None:
        if address is None:
            return
        if self._heap.owns(address):
            self._heap.free(address)
        else:
            _libc_free(address)


_tables: list[_Table] = []


def _as_address(found: object) -> int | None:
    assert found is None or isinstance(found, int)
    return found


def _find_set_handler() -> Any:
    """Look PyDataMem_SetHandler up in NumPy's C API table."""
    core = "numpy._core" if int(np.__version__.split(".")[0]) >= 2 else "numpy.core"
    capsule = importlib.import_module(f"{core}._multiarray_umath")._ARRAY_API
    pointer_of: Any = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    slots = (c_void_p * (_SET_HANDLER_SLOT + 1)).from_address(pointer_of(capsule, None))
    address = slots[_SET_HANDLER_SLOT]
    assert address is not None
    return ctypes.PYFUNCTYPE(py_object, py_object)(address)


_set_handler = _find_set_handler()
_new_capsule: Any = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))


def _disarm() -> None:
    """Let arrays die without us: the process ends, and its memory with it."""
    harmless = ctypes.cast(FAST_LIBC.getppid, _Free)  # it takes no argument and changes nothing
    for table in _tables:
        table.free = harmless


atexit.register(_disarm)
