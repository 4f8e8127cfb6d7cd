"""The disciplines on the same work, the hazards of the pinned one, and what an owner is told of its memory."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from own_memory import PAGE, Pages, anonymous, forked
from owner_process import MADV_DONTNEED, PROT_NONE, PROT_READ
from serving import eventually
from verbs_pair import PATHS, PATIENCE_S, Pair, Servers, connected, figures, running_servers

from nopin import (
    AsyncEvent,
    AsyncEventType,
    Device,
    MemoryRegion,
    ServerRefused,
    UsageError,
    WcStatus,
    WrOpcode,
    attach,
)
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.linux.libc import LIBC, checked
from nopin.linux.proc import pinned_bytes

N_PAGES = 16
MIB = 1 << 20

on_demand_like = ("on-demand", "implicit", "short-term")
needs_pin = pytest.param("pinned", marks=pytest.mark.needs_io_uring)
every_discipline = pytest.mark.parametrize("discipline", [*on_demand_like, needs_pin])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("disciplines")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(servers: Servers, path: str) -> Iterator[Pair]:
    with connected(servers, path, path_mtu=1024) as pair:
        yield pair


@pytest.fixture
def pages() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


@pytest.fixture
def buffer() -> Iterator[Pages]:
    with anonymous(N_PAGES) as pages:
        yield pages


def register(pair: Pair, pages: Pages, discipline: str) -> MemoryRegion:
    if discipline == "implicit":
        return pair.owner.pd.register(access="rwa")
    return pair.owner.register(pages.address, pages.length, discipline=discipline)


def read(pair: Pair, region: MemoryRegion, address: int, buffer: Pages, length: int) -> bytes:
    assert pair.peer.read(address, region.rkey, buffer.address, length) is WcStatus.SUCCESS
    return buffer.get(0, length)


def write(pair: Pair, region: MemoryRegion, address: int, buffer: Pages, data: bytes) -> None:
    buffer.put(0, data)
    assert pair.peer.write(address, region.rkey, buffer.address, len(data)) is WcStatus.SUCCESS


@every_discipline
def test_the_same_work_gives_the_same_bytes(pair: Pair, pages: Pages, buffer: Pages, discipline: str) -> None:
    region = register(pair, pages, discipline)
    data = bytearray(pages.fill(1))
    assert read(pair, region, pages.address + 100, buffer, 9 * PAGE) == data[100 : 100 + 9 * PAGE]
    write(pair, region, pages.address + 3 * PAGE - 7, buffer, b"across a page")
    data[3 * PAGE - 7 : 3 * PAGE + 6] = b"across a page"
    status = pair.peer.atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, pages.address, region.rkey, buffer.address, 1)
    assert (status, buffer.get(0, 8)) == (WcStatus.SUCCESS, bytes(data[:8]))
    data[:8] = (int.from_bytes(data[:8], "little") + 1 & (1 << 64) - 1).to_bytes(8, "little")
    assert pages.get(0, pages.length) == data


@every_discipline
def test_memory_never_touched_reads_as_zeros_and_takes_writes(
    pair: Pair, pages: Pages, buffer: Pages, discipline: str
) -> None:
    region = register(pair, pages, discipline)
    assert read(pair, region, pages.address, buffer, pages.length) == bytes(pages.length)
    write(pair, region, pages.at(5) - 2, buffer, b"here")
    assert pages.get(0, pages.length) == b"here".rjust(5 * PAGE + 2, b"\0").ljust(pages.length, b"\0")


@pytest.mark.parametrize("discipline", on_demand_like)
def test_unpinned_memory_is_always_what_the_process_sees(
    pair: Pair, pages: Pages, buffer: Pages, discipline: str
) -> None:
    pin_before = pinned_bytes(os.getpid())
    region = register(pair, pages, discipline)
    assert pinned_bytes(os.getpid()) <= pin_before  # the kernel may still be at releasing an earlier one
    pages.fill(2)
    pages.advise(1, MADV_DONTNEED)
    pages.put(PAGE, b"stored afterwards")
    pages.unmap(2)
    pages.map_fresh(2)
    pages.put(2 * PAGE, b"mapped afterwards")
    with forked():
        pages.put(3 * PAGE, b"stored beside a child")
        assert read(pair, region, pages.address, buffer, pages.length) == pages.get(0, pages.length)
    pages.protect(4, PROT_NONE)  # not unmapped: anything of this process may be mapped into a hole
    assert pair.peer.read(pages.at(4), region.rkey, buffer.address, 8) is WcStatus.REM_ACCESS_ERR


@pytest.mark.parametrize("discipline", ["on-demand", "short-term", needs_pin])
def test_remote_arrays_work_under_every_discipline(servers: Servers, path: str, pages: Pages, discipline: str) -> None:
    data = pages.fill(3)
    with Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs:
        share = ours.share(pages.address, pages.length, discipline=discipline)
        with attach(share.url, device=theirs) as remote:
            assert remote[5:-5].tobytes() == data[5:-5]
            remote[7] = 250
            assert pages.get(7, 1) == b"\xfa"


def test_an_implicit_share_reaches_any_address_with_the_mappings_rights(
    servers: Servers, path: str, pages: Pages
) -> None:
    data = pages.fill(4)
    with (
        Device(servers.owner_path()) as ours,
        Device(servers.peer_path(path)) as theirs,
        ours.share() as share,
        attach(share.url, device=theirs) as remote,
    ):
        at = pages.address
        assert remote[at : at + 100].tobytes() == data[:100]
        remote[at + 1] = 9
        assert pages.get(1, 1) == b"\x09"
        pages.protect(2, PROT_READ)
        assert remote[pages.at(2)] == data[2 * PAGE]
        failure = remote.write_async(pages.at(2), 1).exception(PATIENCE_S)
        assert getattr(failure, "status", None) == WcStatus.REM_ACCESS_ERR


# --- pinned


@pytest.mark.needs_io_uring
def test_a_pin_is_charged_as_long_as_the_region_lives(pair: Pair, pages: Pages) -> None:
    assert eventually(lambda: pinned_bytes(os.getpid()) == 0)  # earlier ones are released
    region = register(pair, pages, "pinned")
    assert pinned_bytes(os.getpid()) == pages.length
    region.close()
    assert eventually(lambda: pinned_bytes(os.getpid()) == 0)


@pytest.mark.needs_io_uring
def test_a_pinned_region_misses_what_the_process_does_to_its_mappings(pair: Pair, pages: Pages, buffer: Pages) -> None:
    """The hazards: bytes the process no longer has are read, and what is written never reaches it."""
    old = pages.fill(5)
    region = register(pair, pages, "pinned")
    pages.advise(1, MADV_DONTNEED)
    pages.put(PAGE, b"new")
    pages.unmap(2)
    pages.map_fresh(3)
    assert read(pair, region, pages.address, buffer, pages.length) == old
    write(pair, region, pages.at(1), buffer, b"device")
    write(pair, region, pages.at(2), buffer, b"device")
    assert pages.get(PAGE, 6) == b"new\0\0\0"
    assert read(pair, region, pages.at(1), buffer, 6) == b"device"


@pytest.mark.needs_io_uring
def test_a_pinned_region_survives_fork(pair: Pair, pages: Pages, buffer: Pages) -> None:
    pages.put(0, b"before")
    region = register(pair, pages, "pinned")
    with forked() as child:
        pages.put(0, b"parent")
        assert read(pair, region, pages.address, buffer, 6) == b"parent"
        write(pair, region, pages.address, buffer, b"device")
        assert (pages.get(0, 6), child.get(pages.address, 6)) == (b"device", b"before")


def pin_without_privilege(line: Line[Any], server: str) -> None:
    """Pin 1 MiB, then 64 KiB, under a limit of 256 KiB; then register on demand, with no limit left."""
    obey_the_limit()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (256 << 10, 256 << 10))
    with Device(server) as device, anonymous(MIB // PAGE) as pages:
        try:
            device.share(pages.address, MIB, discipline="pinned")
            line.send(["pinned", 0, ""])
        except ServerRefused as refused:
            line.send([refused.code, refused.errno, str(refused)])
        device.share(pages.address, 64 << 10, discipline="pinned")
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        device.share(pages.address, MIB)
        line.send("done")


_CAP_IPC_LOCK = 14
_CAPABILITY_VERSION_3 = 0x20080522


def obey_the_limit() -> None:
    """Give up the capability that lifts the limit of locked memory, if we have it."""
    header = ctypes.create_string_buffer(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    checked(LIBC.capget(header, data), "capget")
    words = list(struct.unpack("<6I", data.raw[:24]))
    for word in range(3):  # effective, permitted, inheritable; the second three are for capabilities from 32 on
        words[word] &= ~(1 << _CAP_IPC_LOCK)
    checked(LIBC.capset(header, ctypes.create_string_buffer(struct.pack("<6I", *words), 24)), "capset")


@pytest.mark.needs_io_uring
def test_pinning_beyond_the_limit_is_refused_with_the_limit_named(servers: Servers) -> None:
    with Child(pin_without_privilege, servers.owner_path()) as child:
        code, number, message = child.line.receive(PATIENCE_S)
        assert (code, number) == ("memlock", 12)
        assert "over RLIMIT_MEMLOCK (256 KiB)" in message
        assert "register on demand" in message
        assert child.line.receive(PATIENCE_S) == "done"


@pytest.mark.needs_io_uring
def test_what_cannot_be_pinned_is_refused_at_registration(pair: Pair, pages: Pages) -> None:
    pages.unmap(3)
    with pytest.raises(ServerRefused, match="not mapped") as refused:
        register(pair, pages, "pinned")
    assert (refused.value.code, refused.value.errno) == ("efault", 14)
    with pytest.raises(UsageError, match="whole process cannot be pinned"):
        pair.owner.pd.register(access="rw", discipline="pinned")


# --- overlap


@pytest.mark.needs_io_uring
def test_regions_of_all_kinds_overlap_and_end_independently(pair: Pair, pages: Pages, buffer: Pages) -> None:
    kinds = ("on-demand", "implicit", "short-term", "pinned", "on-demand", "pinned")
    regions = [register(pair, pages, kind) for kind in kinds]
    for number, region in enumerate(regions):
        text = b"by region %d" % number
        write(pair, region, pages.address + 100, buffer, text)
        for other in regions:
            assert read(pair, other, pages.address + 100, buffer, len(text)) == text
    while len(regions) > 1:
        regions.pop(0).close()
        for other in regions:
            assert read(pair, other, pages.address + 100, buffer, 11) == b"by region 5"


# --- events to the owner


def told(pair: Pair, n: int) -> list[AsyncEvent]:
    return pair.owner.events_of(AsyncEventType.REGION_INVALIDATED, n)


def row_of(pair: Pair, region: MemoryRegion) -> dict[str, Any]:
    return next(row for row in figures(pair.owner.device, "mr") if row["rkey"] == region.rkey)


@pytest.mark.needs_userfaultfd
def test_the_owner_is_told_what_happened_to_its_region_with_cause_and_range(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.at(2) + 10, 8 * PAGE - 20)
    assert region.watched
    pages.fill(6)
    pages.advise(0, MADV_DONTNEED, 4)
    pages.unmap(9, 3)
    with anonymous(1) as elsewhere:
        pages.move(5, elsewhere.address)
    assert pages.get(6 * PAGE, 1)
    events = told(pair, 4)
    assert [(event.cause, event.start, event.end) for event in events] == [
        ("remove", pages.at(2) + 10, pages.at(4)),
        ("unmap", pages.at(9), pages.at(10) - 10),
        ("remap", pages.at(5), pages.at(6)),
        ("unmap", pages.at(5), pages.at(6)),
    ]
    assert {event.target for event in events} == {region}
    assert [event.generation for event in events] == [1, 2, 3, 4]
    row = row_of(pair, region)
    assert (row["page_invalidations"], row["page_invalidations_handled"]) == (2 + 1 + 1 + 1, 4)


@pytest.mark.needs_userfaultfd
@pytest.mark.needs_root
def test_the_owner_is_told_of_a_fork(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, pages.length)
    with forked():
        (event,) = told(pair, 1)
    assert (event.cause, event.start, event.end) == ("fork", pages.address, pages.at(N_PAGES))
    assert event.target is region


@pytest.mark.needs_userfaultfd
def test_what_lies_outside_every_region_is_not_told(pair: Pair, pages: Pages) -> None:
    pair.owner.register(pages.at(4), PAGE)
    pages.advise(0, MADV_DONTNEED, 4)
    pages.unmap(5, 3)
    pages.advise(4, MADV_DONTNEED)
    (event,) = told(pair, 1)
    assert (event.start, event.generation) == (pages.at(4), 1)


def test_faults_of_a_region_are_counted_in_pages(pair: Pair, pages: Pages, buffer: Pages) -> None:
    region = pair.owner.register(pages.address, pages.length)
    write(pair, region, pages.at(2) - 1, buffer, b"xy")
    assert row_of(pair, region)["page_faults"] == 2
    write(pair, region, pages.at(2) - 1, buffer, b"xy")
    row = row_of(pair, region)
    assert (row["page_faults"], row["page_faults_handled"]) == (2, 1)


_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_BPF_LOAD_WORD, _BPF_JUMP_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
_SECCOMP_ERRNO_EPERM, _SECCOMP_ALLOW = 0x00050001, 0x7FFF0000
_SYS_USERFAULTFD = 323


def forbid_userfaultfd() -> None:
    """Have the kernel refuse it to this process, by the filter that container runtimes use."""
    steps = [
        (_BPF_LOAD_WORD, 0, 0, 0),  # the number of the system call
        (_BPF_JUMP_EQUAL, 0, 1, _SYS_USERFAULTFD),
        (_BPF_RETURN, 0, 0, _SECCOMP_ERRNO_EPERM),
        (_BPF_RETURN, 0, 0, _SECCOMP_ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    filtered = ctypes.create_string_buffer(struct.pack("<H6xQ", len(steps), ctypes.addressof(program)))
    checked(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    checked(LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filtered), "prctl")


def share_without_userfaultfd(line: Line[Any], server: str) -> None:
    forbid_userfaultfd()
    with Device(server) as device, anonymous(N_PAGES) as pages:
        pages.put(0, b"unwatched")
        share = device.share(pages.address, pages.length)
        line.send([share.url, device.info.watching, share.region.watched])
        line.receive()
        pages.unmap(1)
        pages.map_fresh(1)
        pages.put(PAGE, b"remapped")
        line.send(len(device.events()))
        line.receive()


def test_sharing_works_without_userfaultfd_and_says_that_nothing_is_watched(servers: Servers, path: str) -> None:
    with Child(share_without_userfaultfd, servers.owner_path()) as owner, Device(servers.peer_path(path)) as device:
        url, watching, watched = owner.line.receive(PATIENCE_S)
        assert (watching, watched) == (False, False)
        with attach(url, device=device) as remote:
            assert remote[:9].tobytes() == b"unwatched"
            remote[0] = ord("U")
            assert owner.ask("go on", PATIENCE_S) == 0
            assert remote[PAGE : PAGE + 8].tobytes() == b"remapped"
            assert remote[:9].tobytes() == b"Unwatched"
