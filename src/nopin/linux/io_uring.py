"""Real long-term pins: io_uring registered buffers, and a second process that does "DMA" on them.

The client makes a ring and registers its memory as fixed buffers. From then on the kernel holds the page
frames (VmPin, RLIMIT_MEMLOCK), whatever the client does to its mappings. The server takes the ring's
descriptor by pidfd_getfd (sockets refuse to carry one), maps it, and submits WRITE_FIXED (frames to a pipe)
and READ_FIXED (pipe to frames) with the client's addresses. That is a device with a pinned region, hazards
included: it goes on reaching the old frames after the client has dropped, moved or unmapped the pages. A pipe,
because reads and writes of it complete within the submitting call (8 us); those of a memfd go through a kernel
worker thread (57 us).

The ring's memory is shared with the client, who may scribble on it; and what the server submits runs with the
server's rights. So the client must hand the ring over *disabled*, and before enabling it the server restricts
it, for good, to those two operations on files the server registered, which are the ends of the pipe. A ring
that was already enabled cannot be restricted and is refused. Completions are believed only so far that
nothing but the pipe and the client's own frames can be touched, and no wait is unbounded: a ring that did not
do what it was told once is not used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Final

from nopin.errors import HostLacks, UsageError
from nopin.linux.libc import LIBC, map_shared, syscall, unmap
from nopin.linux.pidfd import PidFd
from nopin.units import S_NS

BUFFER_BYTES: Final = 1 << 30
"""Largest fixed buffer the kernel takes; longer regions are registered as several, in order."""

MAX_BUFFERS: Final = 16384
"""IORING_MAX_REG_BUFFERS."""

RING_ENTRIES: Final = 8
STEP_BYTES: Final = 256 << 10
"""Bytes moved per submission, through the pipe: what stays in a second-level cache."""

_SYS_SETUP, _SYS_ENTER, _SYS_REGISTER = 425, 426, 427
_SETUP_R_DISABLED = 1 << 6
_FEAT_SINGLE_MMAP, _FEAT_EXT_ARG = 1 << 0, 1 << 8
_OFF_RINGS, _OFF_SQES = 0, 0x1000_0000

_REGISTER_BUFFERS, _REGISTER_FILES, _REGISTER_RESTRICTIONS, _REGISTER_ENABLE = 0, 2, 11, 12
_RESTRICT_SQE_OP, _RESTRICT_SQE_FLAGS_REQUIRED = 1, 3
_OP_READ_FIXED, _OP_WRITE_FIXED = 4, 5
_SQE_FIXED_FILE = 1
_PIPE_OUT, _PIPE_IN = 0, 1  # indices of the registered files
_ENTER_GETEVENTS, _ENTER_EXT_ARG = 1, 8
_WAIT_NS = S_NS // 5
"""A copy within memory takes microseconds; a ring that is silent for so long was tampered with."""

_SQE_BYTES = 64
_pack_sqe = struct.Struct("<BBHiQQIIQH22x").pack_into
_unpack_cqe = struct.Struct("<QiI").unpack_from
_CQE_BYTES = 16
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class _Layout:
    """Offsets within the ring mapping, as the kernel laid them out."""

    sq_head: int
    sq_tail: int
    sq_array: int
    cq_head: int
    cq_tail: int
    cqes: int
    n_cqes: int

    @property
    def length(self) -> int:
        return max(self.sq_array + 4 * RING_ENTRIES, self.cqes + _CQE_BYTES * self.n_cqes)


def _setup(flags: int) -> tuple[int, _Layout]:
    """Make a ring of RING_ENTRIES.

    Raises:
        HostLacks: io_uring is missing, disabled or too old.
        MemoryError: no room for the ring, which counts as locked memory too.
        OSError: no descriptor is left.
    """
    parameters = (ctypes.c_uint32 * 30)()
    parameters[2] = flags
    remedy = "set sysctl kernel.io_uring_disabled=0, and allow io_uring in the container's seccomp profile"
    try:
        fd = syscall(_SYS_SETUP, "io_uring_setup", RING_ENTRIES, ctypes.c_void_p(ctypes.addressof(parameters)))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError("cannot make a ring: over the RLIMIT_MEMLOCK limit, or out of memory") from None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise HostLacks("io_uring", error.strerror or str(error), remedy) from None
    if parameters[5] & (_FEAT_SINGLE_MMAP | _FEAT_EXT_ARG) != _FEAT_SINGLE_MMAP | _FEAT_EXT_ARG:
        os.close(fd)
        raise HostLacks("io_uring", "this kernel's is too old", "use Linux 5.11 or later")
    sq, cq = parameters[10:20], parameters[20:30]
    return fd, _Layout(
        sq_head=sq[0],
        sq_tail=sq[1],
        sq_array=sq[6],
        cq_head=cq[0],
        cq_tail=cq[1],
        cqes=cq[5],
        n_cqes=parameters[1],
    )


def _register(fd: int, operation: int, argument: bytes | None, count: int) -> None:
    held = None if argument is None else ctypes.create_string_buffer(argument, len(argument))
    address = ctypes.c_void_p(ctypes.addressof(held) if held is not None else None)
    syscall(_SYS_REGISTER, "io_uring_register", fd, operation, address, count)


class PinnedBuffer:
    """Client side: [address, address + length) of this process, pinned until `close`.

    Attributes:
        fd: the ring, disabled; the server takes it by number with pidfd_getfd, and must before `close`.

    Raises:
        HostLacks: no io_uring here.
        MemoryError: over RLIMIT_MEMLOCK, or out of memory; the kernel does not tell which (ENOMEM).
        OSError: EFAULT when part of the range is unmapped or not writable, EOPNOTSUPP when it is of a file
            that must not be pinned for long.
    """

    def __init__(self, address: int, length: int) -> None:
        if length <= 0 or -(-length // BUFFER_BYTES) > MAX_BUFFERS:
            raise UsageError(f"cannot pin {length} bytes: 1 to {MAX_BUFFERS} GiB")
        self.address = address
        self.length = length
        self.fd, _ = _setup(_SETUP_R_DISABLED)
        starts = range(address, address + length, BUFFER_BYTES)
        vectors = [(start, min(BUFFER_BYTES, address + length - start)) for start in starts]
        try:
            _register(self.fd, _REGISTER_BUFFERS, b"".join(struct.pack("<2Q", *v) for v in vectors), len(vectors))
        except OSError as error:
            self.close()
            if error.errno == errno.ENOMEM:
                raise MemoryError(
                    f"cannot pin {length} bytes: over the RLIMIT_MEMLOCK limit, or out of memory"
                ) from None
            raise

    def close(self) -> None:
        """Let go of the pages; they stay pinned until the server lets go too. Twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class PinnedFrames:
    """Server side: moves bytes between a client's pinned frames and our memory. Owns its descriptors.

    Args:
        process: the client; stays the caller's.
        ring_fd: the number of its `PinnedBuffer.fd`, in the client.
        address: start of the region the client says it registered. The kernel checks every access against
            what really was.

    Raises:
        UsageError: that descriptor is no disabled ring.
        OSError: EPERM when we may not take descriptors from that process.
    """

    def __init__(self, process: PidFd, ring_fd: int, address: int) -> None:
        self._process = process
        self._address = address
        self._rings = self._sqes = 0  # where they are mapped
        self._n_submitted = 0
        self._broken = False
        probe_fd, self._layout = _setup(0)  # the layout follows from the size: no need to ask the client
        os.close(probe_fd)
        self._ring_fd = process.take_fd(ring_fd)
        self._pipe_out, self._pipe_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._step_bytes = _widen_pipe(self._pipe_in)
            self._tame()
            self._map()
        except OSError as error:
            self.close()
            raise UsageError(f"not a pinned region: {error.strerror}") from None

    def alive(self) -> bool:
        """False once the process has exited."""
        return not self._process.exited()

    def load(self, address: int, length: int, local: int) -> int:
        """Copy frames to our address `local`; returns the bytes moved."""
        moved = 0
        while moved < length:
            step = self._step(address + moved, length - moved)
            count = self._submit(_OP_WRITE_FIXED, _PIPE_IN, address + moved, step)
            if count > 0 and _read(self._pipe_out, local + moved, count) != count:
                self._broken = True
                return moved
            moved += max(count, 0)
            if count < step:
                break
        return moved

    def store(self, address: int, length: int, local: int) -> int:
        """Copy from our address `local` to the frames; returns the bytes moved."""
        moved = 0
        while moved < length and not self._broken:
            step = self._step(address + moved, length - moved)
            if _write(self._pipe_in, local + moved, step) != step:
                self._broken = True
                break
            count = self._submit(_OP_READ_FIXED, _PIPE_OUT, address + moved, step)
            moved += max(count, 0)
            if count < step:
                self._drain()
                break
        return moved

    def close(self) -> None:
        """Let go of the frames. Twice is fine."""
        if self._ring_fd < 0:
            return
        if self._rings:
            unmap(self._rings, self._layout.length)
        if self._sqes:
            unmap(self._sqes, RING_ENTRIES * _SQE_BYTES)
        for fd in (self._ring_fd, self._pipe_out, self._pipe_in):
            os.close(fd)
        self._ring_fd = -1
        self._broken = True

    def _tame(self) -> None:
        """Restrict the ring to copies between its buffers and our pipe, for good, and enable it."""
        _register(self._ring_fd, _REGISTER_FILES, struct.pack("<2i", self._pipe_out, self._pipe_in), 2)
        restriction = struct.Struct("<HBB12x")
        allowed = [
            restriction.pack(_RESTRICT_SQE_OP, _OP_READ_FIXED, 0),
            restriction.pack(_RESTRICT_SQE_OP, _OP_WRITE_FIXED, 0),
            restriction.pack(_RESTRICT_SQE_FLAGS_REQUIRED, _SQE_FIXED_FILE, 0),
        ]
        _register(self._ring_fd, _REGISTER_RESTRICTIONS, b"".join(allowed), len(allowed))
        _register(self._ring_fd, _REGISTER_ENABLE, None, 0)

    def _map(self) -> None:
        self._rings = map_shared(self._ring_fd, self._layout.length, _OFF_RINGS)
        self._ring = (ctypes.c_uint8 * self._layout.length).from_address(self._rings)
        self._sqes = map_shared(self._ring_fd, RING_ENTRIES * _SQE_BYTES, _OFF_SQES)
        self._entries = (ctypes.c_uint8 * (RING_ENTRIES * _SQE_BYTES)).from_address(self._sqes)
        for slot in range(RING_ENTRIES):
            _U32.pack_into(self._ring, self._layout.sq_array + 4 * slot, slot)
        self._timeout = ctypes.create_string_buffer(struct.pack("<2q", *divmod(_WAIT_NS, S_NS)))
        wait = struct.pack("<QIIQ", 0, 0, 0, ctypes.addressof(self._timeout))
        self._wait = ctypes.create_string_buffer(wait, len(wait))

    def _step(self, address: int, length: int) -> int:
        """How much one submission moves: what fits the pipe, up to the end of the registered buffer."""
        return min(length, self._step_bytes, BUFFER_BYTES - (address - self._address) % BUFFER_BYTES)

    def _submit(self, operation: int, file_index: int, address: int, length: int) -> int:
        """Run one operation; bytes moved, or a negative errno."""
        if self._broken:
            return -errno.EIO
        tail = self._load(self._layout.sq_tail)
        slot = tail % RING_ENTRIES * _SQE_BYTES
        self._n_submitted += 1
        buffer = (address - self._address) // BUFFER_BYTES
        # opcode, flags, priority, file, offset, address, length, flags, id, buffer
        entry = (operation, _SQE_FIXED_FILE, 0, file_index, 0, address, length, 0, self._n_submitted, buffer)
        _pack_sqe(self._entries, slot, *entry)
        _U32.pack_into(self._ring, self._layout.sq_tail, (tail + 1) & 0xFFFF_FFFF)
        n_unsubmitted = 1
        while not self._has_completion():
            if not self._enter(n_unsubmitted):
                break
            n_unsubmitted = 0
        return self._completion()

    def _enter(self, n_submit: int) -> bool:
        """Submit, and wait for one completion; False if the ring does not do what it should."""
        flags = _ENTER_GETEVENTS | _ENTER_EXT_ARG
        argument = ctypes.c_void_p(ctypes.addressof(self._wait))
        try:
            syscall(_SYS_ENTER, "io_uring_enter", self._ring_fd, n_submit, 1, flags, argument, len(self._wait))
        except InterruptedError:
            return True
        except OSError:  # ETIME, EINVAL, EBUSY ...
            return False
        return True

    def _has_completion(self) -> bool:
        return self._load(self._layout.cq_head) != self._load(self._layout.cq_tail)

    def _completion(self) -> int:
        """Take the one completion there should be; anything else breaks the ring."""
        head = self._load(self._layout.cq_head)
        slot = self._layout.cqes + head % self._layout.n_cqes * _CQE_BYTES
        done_id, count, _ = _unpack_cqe(self._ring, slot)
        if not self._has_completion() or done_id != self._n_submitted:
            self._broken = True
            return -errno.EIO
        _U32.pack_into(self._ring, self._layout.cq_head, (head + 1) & 0xFFFF_FFFF)
        return int(count)

    def _drain(self) -> None:
        """Empty the pipe of what did not go into the frames."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._pipe_out, 1 << 16):
                pass

    def _load(self, offset: int) -> int:
        value: int = _U32.unpack_from(self._ring, offset)[0]
        return value


def _widen_pipe(fd: int) -> int:
    """Give a pipe room for STEP_BYTES if the user's pipe quota allows; returns the room it has."""
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, STEP_BYTES)
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def _read(fd: int, local: int, length: int) -> int:
    return int(LIBC.read(fd, ctypes.c_void_p(local), ctypes.c_size_t(length)))


def _write(fd: int, local: int, length: int) -> int:
    return int(LIBC.write(fd, ctypes.c_void_p(local), ctypes.c_size_t(length)))
