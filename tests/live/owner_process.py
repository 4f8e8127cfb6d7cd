"""A process that owns memory and does to it what a test says, through plain system calls."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

from nopin.linux.arena_file import map_at, map_somewhere
from nopin.linux.io_uring import PinnedBuffer
from nopin.linux.libc import LIBC, checked, map_shared, unmap
from nopin.linux.paging_uffd import open_paging, register_paging
from nopin.linux.userfaultfd import open_watch
from nopin.ranges import Range

PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3
MADV_DONTNEED, MADV_REMOVE = 4, 9
_MADV_PAGEOUT = 21
_MAP_PRIVATE_ANONYMOUS, _MAP_FIXED = 0x22, 0x10
_MREMAP_MAYMOVE_FIXED = 3

LIBC.mremap.restype = ctypes.c_void_p


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _size(length: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(length)


_REGISTER, _MODE_MISSING = 0xC020AA00, 1  # linux/userfaultfd.h


class Actions:
    """What the owner can be told to do; runs in the owner."""

    def __init__(self) -> None:
        self.children: list[int] = []
        self.pinned: list[PinnedBuffer] = []

    def map(self, length: int, fixed: int = 0, protection: int = PROT_RW) -> int:
        flags = _MAP_PRIVATE_ANONYMOUS | (_MAP_FIXED if fixed else 0)
        address = LIBC.mmap(_pointer(fixed), length, protection, flags, -1, 0)
        return int(address)

    def map_file(self, path: str, length: int) -> int:
        fd = os.open(path, os.O_RDWR)
        try:
            return int(LIBC.mmap(None, length, PROT_RW, 1, fd, 0))
        finally:
            os.close(fd)

    def map_paged(self, fd: int, length: int) -> tuple[int, int, int]:
        """Map a file whose faults go to a userfaultfd: the address, that descriptor's number here, its features."""
        address = map_somewhere(fd, length)
        return address, *self._page(Range.of_length(address, length))

    def map_paged_at(self, fd: int, address: int, length: int, offset: int = 0) -> tuple[int, int]:
        map_at(fd, Range.of_length(address, length), offset)
        return self._page(Range.of_length(address, length))

    def _page(self, where: Range) -> tuple[int, int]:
        uffd, features = open_paging()
        register_paging(uffd, where)
        return uffd, int(features)

    def become(self, *command: str) -> None:
        """Run another program in place of this one; there is no answer."""
        os.execv(command[0], command)

    def hold_back(self, address: int, length: int) -> None:
        """Register memory with a userfaultfd that nobody serves: touching an absent page there waits for ever."""
        fd, _ = open_paging()
        fcntl.ioctl(fd, _REGISTER, struct.pack("<4Q", address, length, _MODE_MISSING, 0))

    def put(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def get(self, address: int, length: int) -> bytes:
        return ctypes.string_at(address, length)

    def unmap(self, address: int, length: int) -> None:
        checked(LIBC.munmap(_pointer(address), _size(length)), "munmap")

    def protect(self, address: int, length: int, protection: int) -> None:
        checked(LIBC.mprotect(_pointer(address), _size(length), protection), "mprotect")

    def advise(self, address: int, length: int, advice: int) -> None:
        checked(LIBC.madvise(_pointer(address), _size(length), advice), "madvise")

    def page_out(self, address: int, length: int) -> None:
        """Have whole pages swapped out, wherever they were touched.

        The kernel passes over pages that wait on another CPU to be put in its lists; each call puts those of its own.
        """
        cpus = os.sched_getaffinity(0)
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            self.advise(address, length, _MADV_PAGEOUT)
        os.sched_setaffinity(0, cpus)

    def move(self, address: int, length: int, to: int) -> None:
        size = _size(length)
        LIBC.mremap(_pointer(address), size, size, _MREMAP_MAYMOVE_FIXED, _pointer(to))

    def fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        self.children.append(pid)
        return pid

    def fork_and_touch(self, address: int, data: bytes, other: int) -> int:
        """Fork a child that stores at two places and then waits; returns once it has."""
        done, says_done = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.put(address, data)
            self.put(other, data)
            os.write(says_done, b"!")
            signal.pause()
        os.close(says_done)
        self.children.append(pid)
        assert os.read(done, 1) == b"!"
        os.close(done)
        return pid

    def execute(self, *command: str) -> None:
        os.execv(command[0], command)

    def pin(self, address: int, length: int) -> int:
        self.pinned.append(PinnedBuffer(address, length))
        return self.pinned[-1].fd

    def scribble_on_ring(self, offset: int, length: int, value: int) -> None:
        """Overwrite what a ring shares with its user, as a hostile client may at any time."""
        address = map_shared(self.pinned[-1].fd, length, offset)
        ctypes.memset(address, value, length)
        unmap(address, length)

    def end_children(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.children.clear()


class Owner:
    """The test's handle on such a process. Use as a context manager."""

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._socket.close()
                faulthandler.disable()  # to die of a signal is for some tests what is expected
                prepare()
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def do(self, action: str, *arguments: Any) -> Any:
        """Have it done and wait for the result; raises what the action raised."""
        self.begin(action, *arguments)
        return self.finish()

    def begin(self, action: str, *arguments: Any) -> None:
        """Have it done without waiting."""
        _send(self._socket, (action, arguments))

    def finish(self) -> Any:
        """Wait for what `begin` began."""
        result = _receive(self._socket)
        if isinstance(result, BaseException):
            raise result
        return result

    def is_busy(self) -> bool:
        """True while what `begin` began has not finished."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True

    def open_watch(self) -> int:
        """Have it open a userfaultfd and pass it to us; our descriptor for it."""
        _send(self._socket, ("open_watch", ()))
        _, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
        if not fds:
            raise ConnectionError("the owner could not open a userfaultfd")
        return fds[0]

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pid:
            if not any(exception):
                self.do("end_children")
            self.kill()
        self._socket.close()


def _serve(connection: socket.socket) -> None:
    actions = Actions()
    while True:
        name, arguments = _receive(connection)
        try:
            if name == "open_watch":
                fd, _ = open_watch()
                socket.send_fds(connection, [b"-"], [fd])
                os.close(fd)
                continue
            result = getattr(actions, name)(*arguments)
        except Exception as error:
            result = error
        _send(connection, result)


def _send(connection: socket.socket, message: object) -> None:
    raw = pickle.dumps(message)
    connection.sendall(len(raw).to_bytes(8, "little") + raw)


def _receive(connection: socket.socket) -> Any:
    length = int.from_bytes(_receive_exactly(connection, 8), "little")
    return pickle.loads(_receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    raw = b""
    while len(raw) < length:
        piece = connection.recv(length - len(raw))
        if not piece:
            raise ConnectionError("the other process has ended")
        raw += piece
    return raw
