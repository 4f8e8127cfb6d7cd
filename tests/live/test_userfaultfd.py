"""The descriptor itself: who gets one, and what a server accepts from a client."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import pytest
from owner_process import Owner

from nopin.errors import HostLacks, UsageError
from nopin.linux.libc import syscall
from nopin.linux.uffd_handshake import Feature
from nopin.linux.userfaultfd import NEEDED, Userfaultfd, open_watch
from nopin.ranges import Range

SYS_USERFAULTFD = 323

pytestmark = pytest.mark.needs_userfaultfd


@pytest.fixture
def watch_fd() -> Iterator[int]:
    try:
        fd, _ = open_watch()
    except HostLacks as lack:
        pytest.skip(str(lack))
    yield fd
    with contextlib.suppress(OSError):
        os.close(fd)


def test_the_events_needed_are_there(watch_fd: int) -> None:
    fd, features = open_watch()
    os.close(fd)
    assert features & NEEDED == NEEDED


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user without privilege")
def test_an_unprivileged_user_watches_without_fork_events() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        with contextlib.suppress(HostLacks):
            _, features = open_watch()
            os.write(writer, int(features).to_bytes(8, "little"))
        os._exit(0)
    os.close(writer)
    raw = os.read(reader, 8)
    os.close(reader)
    os.waitpid(child, 0)
    features = Feature(int.from_bytes(raw, "little"))
    with open("/proc/sys/vm/unprivileged_userfaultfd") as setting:
        allowed = setting.read().strip() == "1"
    assert features & NEEDED == NEEDED
    assert allowed or Feature.EVENT_FORK not in features


def test_nothing_waits_on_a_quiet_descriptor(watch_fd: int) -> None:
    assert Userfaultfd(watch_fd).read() == []


def test_a_file_in_its_place_is_refused() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(UsageError, match="not a userfaultfd"):
        Userfaultfd(file.fileno())


def test_one_without_handshake_is_refused(watch_fd: int) -> None:
    raw = syscall(SYS_USERFAULTFD, "userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK | 1)
    with pytest.raises(UsageError, match="not open for events"):
        Userfaultfd(raw)
    os.close(raw)


def test_one_that_blocks_or_begins_to_is_refused_and_never_waited_on(watch_fd: int) -> None:
    uffd = Userfaultfd(watch_fd)
    os.set_blocking(watch_fd, True)
    with pytest.raises(UsageError, match="blocking"):
        uffd.read()
    with pytest.raises(UsageError, match="blocking"):
        Userfaultfd(watch_fd)


def test_a_range_with_nothing_mapped_cannot_be_registered(watch_fd: int) -> None:
    with Owner() as owner:
        uffd = Userfaultfd(owner.open_watch())
        address = owner.do("map", 4096)
        owner.do("unmap", address, 4096)
        with pytest.raises(OSError, match="Invalid argument"):
            uffd.register(Range.of_length(address, 4096))
        uffd.close()
        uffd.close()
