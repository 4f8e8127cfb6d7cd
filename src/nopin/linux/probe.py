"""What this host allows, found by trying each thing in a small way: the substance of `nopin doctor`."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nopin.errors import HostLacks, NopinError
from nopin.linux import memfd
from nopin.linux.io_uring import PinnedBuffer, PinnedFrames
from nopin.linux.pagemap import Pagemap
from nopin.linux.pidfd import PidFd
from nopin.linux.proc import Maps
from nopin.linux.process_vm import ProcessVm
from nopin.linux.uffd_handshake import Feature as UffdFeature
from nopin.linux.userfaultfd import open_watch
from nopin.units import PAGE_BYTES, format_bytes

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_ENOUGH_SOCKET_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing a host may allow.

    Attributes:
        name: short, stable, as errors and `nopin doctor` print it.
        available: it was tried and worked.
        detail: what was found.
        remedy: one sentence on what would allow it; empty when available.
    """

    name: str
    available: bool
    detail: str
    remedy: str = ""


def probe_all() -> list[Feature]:
    """Try everything nopin may use on this host, in a fraction of a second. Never raises."""
    return [_guarded(name, probe) for name, probe in _PROBES.items()]


def _guarded(name: str, probe: Callable[[str], Feature]) -> Feature:
    try:
        return probe(name)
    except HostLacks as lack:
        return Feature(name, False, lack.reason, lack.remedy)
    except (OSError, NopinError, MemoryError) as error:
        return Feature(name, False, getattr(error, "strerror", None) or str(error), _REMEDIES[name])


@contextlib.contextmanager
def _another_process() -> Iterator[int]:
    """A child with a copy of our memory that does nothing until it is told to end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(writer)
            os.read(reader, 1)
        os._exit(0)
    try:
        yield pid
    finally:
        os.close(reader)
        os.close(writer)
        os.waitpid(pid, 0)


def _process_vm(name: str) -> Feature:
    word = ctypes.c_uint64(0x6E6F70696E)
    copy = ctypes.c_uint64()
    with _another_process() as pid:
        count = ProcessVm(pid).read(ctypes.addressof(word), 8, ctypes.addressof(copy))
    if count != 8 or copy.value != word.value:
        return Feature(name, False, os.strerror(-count), _REMEDIES[name])
    return Feature(name, True, "memory of another process of this user can be read")


def _pagemap(name: str) -> Feature:
    pagemap = Pagemap(os.getpid())
    pagemap.close()
    return Feature(name, True, "page tables can be read")


def _pagemap_scan(name: str) -> Feature:
    pagemap = Pagemap(os.getpid())
    pagemap.close()
    detail = "PAGEMAP_SCAN works" if pagemap.has_scan else "missing; the table is read entry by entry"
    return Feature(name, pagemap.has_scan, detail, "" if pagemap.has_scan else _REMEDIES[name])


def _procmap_query(name: str) -> Feature:
    maps = Maps(os.getpid())
    maps.close()
    detail = "PROCMAP_QUERY works" if maps.has_query else "missing; mappings are read as text"
    return Feature(name, maps.has_query, detail, "" if maps.has_query else _REMEDIES[name])


def _uffd_features() -> UffdFeature:
    fd, features = open_watch()
    os.close(fd)
    return features


def _userfaultfd(name: str) -> Feature:
    features = _uffd_features()
    names = sorted(flag.name.lower() for flag in UffdFeature if flag in features and flag.name)
    return Feature(name, True, ", ".join(names))


def _userfaultfd_fork(name: str) -> Feature:
    if UffdFeature.EVENT_FORK in _uffd_features():
        return Feature(name, True, "forks of an owner are heard")
    return Feature(name, False, "the kernel reserves fork events for privileged users", _REMEDIES[name])


def _io_uring(name: str) -> Feature:
    memory = mmap.mmap(-1, PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    copy = ctypes.c_uint64()
    with contextlib.ExitStack() as cleanup:
        pinned = PinnedBuffer(address, PAGE_BYTES)
        cleanup.callback(pinned.close)
        process = PidFd.open(os.getpid())
        cleanup.callback(process.close)
        frames = PinnedFrames(process, pinned.fd, address)
        cleanup.callback(frames.close)
        count = frames.load(address, 8, ctypes.addressof(copy))
    if count != 8:
        return Feature(name, False, "a copy from pinned memory did not complete", _REMEDIES[name])
    return Feature(name, True, "memory can be pinned and reached by its frames")


def _memlock(name: str) -> Feature:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_capability = _effective_capabilities() >> 14 & 1  # CAP_IPC_LOCK
    if soft == resource.RLIM_INFINITY or has_capability:
        return Feature(name, True, "pinned regions are not limited")
    return Feature(name, soft > 0, f"pinned regions up to {format_bytes(soft)}", "" if soft else _REMEDIES[name])


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _pidfd(name: str) -> Feature:
    PidFd.open(os.getpid()).close()
    return Feature(name, True, "processes can be held by descriptor")


def _pidfd_getfd(name: str) -> Feature:
    reader, writer = os.pipe()
    try:
        with _another_process() as pid:
            process = PidFd.open(pid)
            try:
                os.close(process.take_fd(reader))
            finally:
                process.close()
    finally:
        os.close(reader)
        os.close(writer)
    return Feature(name, True, "descriptors of another process of this user can be taken")


def _udp_option(name: str, option: int, value: int) -> Feature:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(_SOL_UDP, option, value)
    return Feature(name, True, "the kernel takes it")


def _udp_gso(name: str) -> Feature:
    return _udp_option(name, _UDP_SEGMENT, 1024)


def _udp_gro(name: str) -> Feature:
    return _udp_option(name, _UDP_GRO, 1)


def _raw_sockets(name: str) -> Feature:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP).close()
    return Feature(name, True, "whole IP packets can be received, so foreign ICRCs can be checked")


def _socket_buffers(name: str) -> Feature:
    sizes: dict[str, int] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for word, option, force in (("receive", socket.SO_RCVBUF, 33), ("send", socket.SO_SNDBUF, 32)):
            try:
                probe.setsockopt(socket.SOL_SOCKET, force, _ENOUGH_SOCKET_BYTES)  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
            except PermissionError:
                probe.setsockopt(socket.SOL_SOCKET, option, _ENOUGH_SOCKET_BYTES)
            sizes[word] = probe.getsockopt(socket.SOL_SOCKET, option) // 2  # the kernel reports it doubled
    detail = ", ".join(f"{word} {format_bytes(size)}" for word, size in sizes.items())
    enough = min(sizes.values()) >= _ENOUGH_SOCKET_BYTES
    return Feature(name, enough, detail, "" if enough else _REMEDIES[name])


def _yama(name: str) -> Feature:
    setting = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not setting.exists():
        return Feature(name, True, "no Yama: processes of one user reach each other")
    scope = int(setting.read_text())
    if scope == 0:
        return Feature(name, True, "ptrace_scope 0: processes of one user reach each other")
    if scope == 1:
        return Feature(name, True, "ptrace_scope 1: clients name the server with PR_SET_PTRACER by themselves")
    return Feature(name, scope == 2 and os.geteuid() == 0, f"ptrace_scope {scope}", _REMEDIES[name])


def _memfd(name: str) -> Feature:
    fd = memfd.create("nopin-probe", PAGE_BYTES)
    try:
        memfd.map_array(fd)[:4] = (1, 2, 3, 4)
        intact = os.pread(fd, 4, 0) == struct.pack("<4B", 1, 2, 3, 4)
    finally:
        os.close(fd)
    return Feature(name, intact, "shared memory files work")


_PTRACE = "run client and server as one user, set sysctl kernel.yama.ptrace_scope=1 or lower, and allow ptrace"
_PROBES: dict[str, Callable[[str], Feature]] = {
    "process_vm": _process_vm,
    "pagemap": _pagemap,
    "pagemap_scan": _pagemap_scan,
    "procmap_query": _procmap_query,
    "userfaultfd": _userfaultfd,
    "userfaultfd_fork": _userfaultfd_fork,
    "io_uring": _io_uring,
    "memlock": _memlock,
    "pidfd": _pidfd,
    "pidfd_getfd": _pidfd_getfd,
    "udp_gso": _udp_gso,
    "udp_gro": _udp_gro,
    "raw_sockets": _raw_sockets,
    "socket_buffers": _socket_buffers,
    "yama": _yama,
    "memfd": _memfd,
}
_REMEDIES: dict[str, str] = {
    "process_vm": _PTRACE + " and process_vm_readv in the container's seccomp profile",
    "pagemap": "mount /proc without hidepid, and run client and server as one user",
    "pagemap_scan": "use Linux 6.7 or later for speed; nothing is lost without it",
    "procmap_query": "use Linux 6.11 or later for speed; nothing is lost without it",
    "userfaultfd": "use a kernel with CONFIG_USERFAULTFD; without it sharing works unwatched, none is managed",
    "userfaultfd_fork": "run as root or set sysctl vm.unprivileged_userfaultfd=1; without it forks go unheard",
    "io_uring": "set sysctl kernel.io_uring_disabled=0; only the pinned discipline needs it",
    "memlock": "raise the limit with `ulimit -l` or in /etc/security/limits.conf",
    "pidfd": "use Linux 5.3 or later",
    "pidfd_getfd": _PTRACE + "; only the pinned discipline needs it",
    "udp_gso": "use Linux 4.18 or later; packets are sent one by one without it",
    "udp_gro": "use Linux 5.0 or later; packets are received one by one without it",
    "raw_sockets": "run as root or grant CAP_NET_RAW; only raw receive mode needs it",
    "socket_buffers": "set sysctl net.core.rmem_max and net.core.wmem_max to 4194304 or more",
    "yama": "set sysctl kernel.yama.ptrace_scope=1 or lower",
    "memfd": memfd.REMEDY,
}
