"""Remote arrays: memory of another process, indexed like numpy, each access one-sided.

Nothing is registered or copied per operation: bytes go straight between the owner's memory and the array that
is returned or given. Each access takes exactly the selected bytes. Nothing is cached: reading twice asks twice.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nopin.control.dtypes import parse_dtype
from nopin.errors import Closed, UsageError
from nopin.nic.abi import Access, WrOpcode
from nopin.verbs.access import format_access
from nopin.verbs.attachment import Attachment
from nopin.verbs.objects import DeviceObject
from nopin.verbs.operation import Operation
from nopin.verbs.pieces import pieces_of
from nopin.verbs.selection import Selection, select
from nopin.verbs.transfer import Pieces

if TYPE_CHECKING:
    from nopin.verbs.device import Device

_READ, _WRITE, _ATOMIC = int(Access.REMOTE_READ), int(Access.REMOTE_WRITE), int(Access.REMOTE_ATOMIC)
_U64 = (1 << 64) - 1


class RemoteArray(DeviceObject):
    """An array in another process's memory. Made by `nopin.attach`.

    Attributes:
        shape: as the owner's array; `strides` (bytes) too.
        dtype: numpy type of the elements.
        access: rights of the share.
        device: through which it is reached.

    When a device server on the way is killed, it attaches again by itself to the successor's share, for as long as
    `attach` was told. Reads and writes under way are repeated (a write may be carried out twice, with the same bytes);
    an atomic under way raises `RegionGone`, and may or may not have been carried out.
    """

    def __init__(self, device: Device, attachment: Attachment) -> None:
        attached = attachment.told
        self.shape = tuple(attached.shape)
        self.strides = tuple(attached.strides)
        self.dtype = parse_dtype(attached.dtype)
        self.access = Access(attached.access)
        self._itemsize = self.dtype.itemsize
        self._address = attached.address
        self.device = device
        self._attachment = attachment
        super().__init__(attachment.qp)
        attachment.carry(self)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self._itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a remote array without dimensions")
        return self.shape[0]

    def _described(self) -> str:
        return f"{self.shape} {self.dtype} access={format_access(self.access)!r}"

    def _instead(self) -> str:
        return "; pass on the URL it was attached to, and attach there; numpy.array(...) of it reads all of it"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Read everything."""
        if copy is False:
            raise ValueError("a remote array cannot be used without reading it: copy=False is impossible")
        return np.asarray(self[...], dtype)

    def __getitem__(self, key: object) -> Any:
        return self.read_async(key).result()

    def __setitem__(self, key: object, value: ArrayLike) -> None:
        self.write_async(key, value).result()

    def read_async(self, key: object = ..., *, out: NDArray[Any] | None = None) -> Operation[Any]:
        """Start reading what `key` selects; the result is an array (a scalar for a single element).

        Args:
            key: as for numpy's basic indexing.
            out: where the bytes go: a contiguous array of the result's shape and this dtype, for selections whose
                order in memory is that of the result. Memory that was used before takes large reads several
                times as fast as fresh memory.

        Raises:
            IndexError: the key does not fit the shape, or is not basic indexing (also a UsageError).
            UsageError: the share may not be read, or `out` does not fit.
        """
        self._require(_READ, "read", "r")
        selection = select(key, self.shape, self.strides, self._itemsize)
        if out is None:
            buffer = np.empty(selection.n_bytes // self._itemsize, self.dtype)
        else:
            buffer = _checked_out(out, selection, self.dtype)

        def finish() -> Any:
            if out is not None:
                return out
            return selection.arrange(buffer) if selection.shape else buffer[0]

        return self._start(WrOpcode.RDMA_READ, selection, buffer, finish)

    def write_async(self, key: object, value: ArrayLike) -> Operation[None]:
        """Start writing `value` to what `key` selects; it is converted and broadcast as numpy does, and copied.

        Raises:
            IndexError: as `read_async`.
            UsageError: the share may not be written, or the value does not fit.
        """
        self._require(_WRITE, "write", "w")
        selection = select(key, self.shape, self.strides, self._itemsize)
        fitted = np.empty(selection.shape, self.dtype)  # a copy: the caller may change his before the bytes have left
        try:
            fitted[...] = value
        except (ValueError, TypeError, OverflowError) as problem:
            raise UsageError(f"cannot write this value to {selection.shape} of {self.dtype}: {problem}") from None
        return self._start(WrOpcode.RDMA_WRITE, selection, selection.flatten(fitted), _nothing)

    def fetch_add(self, index: object, value: int) -> int:
        """Add to one 8-byte integer, atomically for all attached peers; returns what it was before.

        The owner's own stores are not part of the atomicity. Sums wrap as the dtype does.

        Raises:
            UsageError: not an 8-byte integer array, not one element, or no atomic access.
        """
        return self._atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, index, self._operand(value), 0)

    def compare_swap(self, index: object, expected: int, new: int) -> int:
        """Store `new` in one 8-byte integer if it is `expected`, atomically; returns what it was before.

        Raises:
            UsageError: as `fetch_add`.
        """
        return self._atomic(WrOpcode.ATOMIC_CMP_AND_SWP, index, self._operand(expected), self._operand(new))

    def _start(
        self, opcode: WrOpcode, selection: Selection, buffer: NDArray[Any], finish: Callable[[], Any]
    ) -> Operation[Any]:
        first = self._address + selection.first_offset()
        text = "READ of {} bytes from {:#x} on" if opcode is WrOpcode.RDMA_READ else "WRITE of {} bytes from {:#x} on"
        operation = Operation(self._attachment, finish, lambda: text.format(selection.n_bytes, first))
        if not selection.n_runs:
            operation.complete()
            return operation
        pieces = pieces_of(opcode, selection, self._address, _address_of(buffer))
        self._attachment.submit(operation, pieces, (self, buffer))
        return operation

    def _atomic(self, opcode: WrOpcode, index: object, compare_add: int, swap: int) -> int:
        self._require(_ATOMIC, "be used for atomics", "a")
        selection = select(index, self.shape, self.strides, self._itemsize)
        if selection.shape:
            raise UsageError("an atomic takes the index of one element")
        before = np.zeros(1, self.dtype)
        remote = self._address + selection.first_offset()
        operation = Operation(self._attachment, lambda: int(before[0]), lambda: f"{opcode.name} at {remote:#x}")
        single = (_address_of(before), 8, remote)
        self._attachment.submit(operation, Pieces(opcode, 1, None, single, compare_add, swap), before)
        return operation.result()

    def _operand(self, value: int) -> int:
        """Check an operand of an atomic and return its 64 bits."""
        if self.dtype.kind not in "iu" or self._itemsize != 8 or not self.dtype.isnative:
            raise UsageError(f"atomics need 8-byte integers of native byte order, not {self.dtype}")
        try:
            number = operator.index(value)
        except TypeError:
            raise UsageError(f"atomics take integers, not {type(value).__name__}") from None
        bounds = np.iinfo(self.dtype)
        if not bounds.min <= number <= bounds.max:
            raise UsageError(f"{number} does not fit {self.dtype}")
        return number & _U64

    def _require(self, right: int, verb: str, letter: str) -> None:
        if self._why_closed:
            raise self._closed_error()
        if not int(self.access) & right:  # the operator of flags costs ten times as much
            have = format_access(self.access)
            raise UsageError(
                f'this share may not {verb}: its access is "{have}"; the owner has to share with "{letter}"'
            )

    def _end(self) -> None:
        self._attachment.close(Closed("this RemoteArray was closed"))

    def _let_go(self) -> None:
        self._attachment.let_go()

    def _abandon(self) -> None:
        super()._abandon()
        self._attachment.abandon(self._closed_error())


def _checked_out(out: NDArray[Any], selection: Selection, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return `out` as a flat view of the same memory.

    Raises:
        UsageError: it cannot take the bytes as they come.
    """
    if not isinstance(out, np.ndarray):
        raise UsageError(f"out is a numpy array, not {type(out).__name__}")
    if out.shape != selection.shape or out.dtype != dtype:
        raise UsageError(f"out is {out.shape} {out.dtype}; the result is {selection.shape} {dtype}")
    if not out.flags.c_contiguous or not out.flags.writeable or not selection.in_memory_order:
        raise UsageError("out has to be contiguous and writable, and the selection in the order of the owner's memory")
    return out.reshape(-1)


def _address_of(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the price of .ctypes.data
    return address


def _nothing() -> None:
    pass
