"""Copies between two real processes with the copier's help: the bytes, the failures, and the copier's own end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from own_memory import anonymous
from owner_process import PROT_NONE, PROT_READ, Owner
from serving import eventually
from verbs_pair import End, connect

from nopin import Device, WcStatus
from nopin.iommu.relay import TURN_BYTES, UNTIL_DONE, Copy, Ends, Relayed, Turn, relay_in_turn
from nopin.lab.servers import LocalServer
from nopin.linux.cpus import n_cpus
from nopin.linux.process_memory import ProcessMemory
from nopin.mm.plain import PlainSpace
from nopin.mm.space import Staging
from nopin.server.copier import MIN_BYTES, RESTART_NS, Copier
from nopin.testing.memory_space import MemorySpace
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
GRAIN = 1024
MIB = 1 << 20
N_PAGES = 512
LENGTH = N_PAGES * PAGE

pytestmark = pytest.mark.skipif(n_cpus() < 2, reason="the copier is for hosts with two CPUs")


class Clock:
    """Stands still, so that help never seems slower; every second copy is helped, or more."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Side:
    """A process with a buffer, and the space through which it is reached."""

    def __init__(self) -> None:
        self.owner = Owner()
        self.space = PlainSpace(ProcessMemory.open(self.owner.pid))
        self.address: int = self.owner.do("map", LENGTH)

    def fill(self, seed: int) -> bytes:
        data = np.random.default_rng(seed).bytes(LENGTH)
        self.owner.do("put", self.address, data)
        return data

    def get(self, offset: int = 0, length: int = LENGTH) -> bytes:
        data = self.owner.do("get", self.address + offset, length)
        assert isinstance(data, bytes)
        return data

    def protect(self, page: int, protection: int) -> None:
        self.owner.do("protect", self.address + page * PAGE, PAGE, protection)

    def close(self) -> None:
        self.space.close()
        self.owner.kill()


class Copying:
    """Source, target and a copier that is up."""

    def __init__(self) -> None:
        self.source, self.target = Side(), Side()
        self.spaces = Ends(self.source.space, self.target.space)
        self.clock = Clock()
        self.staging = Staging.of_size(1 << 20)
        self.copier = Copier(self.clock)
        self.start_copier()

    def start_copier(self) -> int:
        """Have a copy start the process; returns its number."""
        self.copy(0, LENGTH)
        assert eventually(lambda: self.copier.pid is not None)
        assert self.copier.pid is not None
        return self.copier.pid

    def part(self, offset: int, length: int, source_offset: int | None = None) -> Copy:
        at = offset if source_offset is None else source_offset
        return Copy(self.source.address + at, self.target.address + offset, length)

    def relay(self, *copies: Copy, turn: Turn = UNTIL_DONE) -> Relayed:
        return self.copier(self.spaces, copies, self.staging, GRAIN, turn)

    def copy(self, offset: int, length: int) -> Relayed:
        return self.relay(self.part(offset, length))

    def copy_with_help(self, *copies: Copy) -> Relayed:
        """Copy until the process had its part in it: on a busy host it may come too late at first."""
        n_before = self.copier.n_helped
        outcome = Relayed(0, 0)

        def helped() -> bool:
            nonlocal outcome
            outcome = self.relay(*copies)
            self.clock.now += RESTART_NS  # if it was given up, a new one comes at once
            return self.copier.n_helped > n_before

        assert eventually(helped)
        return outcome

    def close(self) -> None:
        self.copier.close()
        self.source.close()
        self.target.close()


@pytest.fixture
def ends() -> Iterator[Copying]:
    ends = Copying()
    yield ends
    ends.close()


@pytest.mark.parametrize("length", [MIN_BYTES, MIN_BYTES + 1, (1 << 20) - 1, 1 << 20, LENGTH - 77])
def test_exactly_the_range_arrives(ends: Copying, length: int) -> None:
    data, before = ends.source.fill(1), ends.target.fill(2)
    assert ends.copy_with_help(ends.part(77, length)) == Relayed(length, length)
    assert ends.target.get() == before[:77] + data[77 : 77 + length] + before[77 + length :]


def test_it_wakes_up_for_work_and_keeps_up(ends: Copying) -> None:
    for seed in range(40):
        data = ends.source.fill(seed)
        if seed % 2:
            time.sleep(0.002)  # long enough to fall asleep
        assert ends.copy(0, LENGTH) == Relayed(LENGTH, LENGTH)
        assert ends.target.get() == data
    assert ends.copier.n_helped


def test_several_copies_go_together(ends: Copying) -> None:
    data, before = ends.source.fill(1), ends.target.fill(2)
    copies = [ends.part(0, 300_000), ends.part(300_000, 300_000, 1_000_000), ends.part(700_001, 1_000_000, 3)]
    assert ends.copy_with_help(*copies) == Relayed(1_600_000, 1_600_000)
    expected = bytearray(before)
    expected[:300_000] = data[:300_000]
    expected[300_000:600_000] = data[1_000_000:1_300_000]
    expected[700_001:1_700_001] = data[3:1_000_003]
    assert ends.target.get() == expected


@pytest.mark.parametrize("length", [MIB, MIB - PAGE, 300_000])
def test_a_long_relay_ends_with_a_copy_after_a_turn_if_others_wait(ends: Copying, length: int) -> None:
    data, before = ends.source.fill(1), ends.target.fill(2)
    n_turn = -(-TURN_BYTES // length)
    copies = [ends.part(0, length)] * (4 * n_turn)

    def outcome() -> Relayed:
        return ends.relay(*copies, turn=Turn(lambda: True))

    for _ in range(20):  # with help and without
        n_done, rest = divmod(outcome().n_written, length)
        assert rest == 0
        assert n_turn // 2 <= n_done <= n_turn + TURN_BYTES // (2 * length)  # what was tried in vain counts, too
    assert ends.target.get() == data[:length] + before[length:]


@pytest.mark.parametrize("page", [0, 1, 40, 63, 64, 100, 255, 300, N_PAGES - 1])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_bad_page_ends_a_copy_as_it_does_without_help(ends: Copying, side: str, page: int) -> None:
    ends.source.fill(1)
    outcomes, contents = [], []
    for relay in (ends.copier, relay_in_turn):
        ends.target.fill(2)
        bad = ends.source if side == "source" else ends.target
        bad.protect(page, PROT_NONE if side == "source" else PROT_READ)
        outcomes.append(relay(ends.spaces, [ends.part(100, LENGTH - 200)], ends.staging, GRAIN))
        bad.protect(page, 3)
        contents.append(ends.target.get())
    assert contents[0] == contents[1]
    assert outcomes[0].n_written == outcomes[1].n_written
    refused = [outcome.n_written < outcome.n_read - outcome.n_read % GRAIN for outcome in outcomes]
    assert refused == [side == "target"] * 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_copier_that_does_not_answer_is_done_without_and_replaced(ends: Copying, how: signal.Signals) -> None:
    data, first = ends.source.fill(1), ends.copier.pid
    assert first is not None
    os.kill(first, how)
    assert ends.copy(0, LENGTH) == Relayed(LENGTH, LENGTH)
    assert ends.target.get() == data
    assert not Path(f"/proc/{first}").exists(), "it cannot write any more"
    ends.clock.now += RESTART_NS
    assert ends.start_copier() != first
    assert ends.copy_with_help(ends.part(0, LENGTH)) == Relayed(LENGTH, LENGTH)


@pytest.mark.parametrize("side", ["source", "target"])
def test_an_owner_that_ends_is_not_mistaken_for_anybody_else(ends: Copying, side: str) -> None:
    gone = ends.source if side == "source" else ends.target
    gone.owner.kill()
    assert eventually(lambda: gone.space.gone)
    outcome = ends.copy(0, LENGTH)
    assert outcome == (Relayed(0, 0) if side == "source" else Relayed(len(ends.staging.array) - PAGE, 0))
    assert ends.copier.n_helped == 0


def test_memory_that_a_process_number_does_not_reach_is_copied_without_help(ends: Copying) -> None:
    ends.source.fill(1)
    held = MemorySpace(0x10000, N_PAGES)
    copy = ends.part(0, LENGTH)._replace(target_address=0x10000)
    assert ends.copier(Ends(ends.source.space, held), [copy], ends.staging, GRAIN) == Relayed(LENGTH, LENGTH)
    assert held.memory.tobytes() == ends.source.get()
    assert ends.copier.n_helped == 0


def test_it_ends_when_it_is_closed(ends: Copying) -> None:
    pid = ends.copier.pid
    ends.copier.close()
    assert not Path(f"/proc/{pid}").exists()


# --- in a server


def copier_of(server_pid: int) -> int | None:
    """The process number of a server's copier."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes come and go
            is_child = f"PPid:\t{server_pid}\n" in (folder / "status").read_text()
            if is_child and "copier_process" in (folder / "cmdline").read_text():
                return int(folder.name)
    return None


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_server_has_help_and_takes_it_along_when_it_is_killed(tmp_path: Path) -> None:
    server = LocalServer(tmp_path / "server.sock")
    path = str(server.socket_path)
    try:
        with (
            anonymous(2 * N_PAGES) as pages,
            Device(path) as ours,
            Device(path) as theirs,
        ):
            owner, peer = End(ours), End(theirs)
            connect(owner.qp, peer.qp)
            region = owner.register(pages.address, LENGTH)
            for seed in range(8):
                data = np.random.default_rng(seed).bytes(LENGTH)
                pages.put(LENGTH, data)
                assert peer.write(pages.address, region.rkey, pages.at(N_PAGES), LENGTH) is WcStatus.SUCCESS
                assert pages.get(0, LENGTH) == data
            copier = copier_of(server.pid)
            assert copier is not None
            os.kill(server.pid, signal.SIGKILL)
            assert eventually(lambda: not is_running(copier))
    finally:
        server.close()
