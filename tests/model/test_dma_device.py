"""A device with a mirror of a modelled process: data, faults, what it is told, and what it must not touch any more."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hosts import PAGE, host_of, run

from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.device.dma import DmaDevice
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Procedure, Quiesce, Work
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import Prot
from nopin.model.streams import Streams
from nopin.ranges import Range
from nopin.units import MS_NS


class Log(DeviceObserver):
    """Writes down what a device tells."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        self.words.append(f"read {len(data)}")

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        self.words.append(f"wrote {len(data)}")

    def invalidation_returned(self, process: Process, device: str, pages: Sequence[Range], cause: Cause) -> None:
        self.words.append(f"quiet {cause.value} {sum(part.length for part in pages)}")

    def fault_raised(self, device: str, process: Process, pages: PageRun, *, write: bool) -> None:
        self.words.append(f"fault {pages.n}{' write' if write else ''}")

    def fault_answered(self, device: str, process: Process, pages: PageRun, reason: Reason | None) -> None:
        self.words.append(f"answer {reason.name if reason else 'ok'}")


def mapped(host: Host, n_pages: int = 4, prot: Prot = Prot.READ | Prot.WRITE) -> tuple[Process, int]:
    process = host.spawn_process()
    return process, run(host, process.mmap(n_pages, prot=prot))


def test_a_device_reads_what_the_cpu_stored_and_the_cpu_loads_what_it_wrote() -> None:
    host = host_of()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler)
    run(host, process.store(va + 100, b"from the cpu"))
    assert run(host, device.read(process, va + 100, 12)) == b"from the cpu"
    assert run(host, device.write(process, va + PAGE - 3, b"across")) is None
    assert run(host, process.load(va + PAGE - 3, 6)) == b"across"
    device.attach(process).check()


def test_an_access_faults_once_and_then_hits() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, observer=log)
    for _ in range(2):
        assert run(host, device.read(process, va, 2 * PAGE)) == bytes(2 * PAGE)
    assert log.words == ["fault 2", "answer ok", *["read 4096"] * 4]
    assert run(host, device.write(process, va, b"x")) is None
    assert log.words[6:] == ["fault 1 write", "quiet cow 1", "answer ok", "wrote 1"], "zeros are shared until written"


def test_a_page_unmapped_is_not_reached_again() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, observer=log)
    assert run(host, device.write(process, va, b"old")) is None
    run(host, process.munmap(va, PAGE))
    assert run(host, device.read(process, va, 3)) is Reason.NO_ACCESS
    assert run(host, process.mmap(1, at=va)) == va
    assert run(host, device.read(process, va, 3)) == bytes(3)
    assert log.words[-1] == "read 3"
    assert device.attach(process).statistics().n_present == 1


def test_what_cannot_be_had_is_said_exactly() -> None:
    host = host_of()
    process, va = mapped(host, 2, Prot.READ)
    device = DmaDevice("dma", host.scheduler)
    assert run(host, device.write(process, va, b"x")) is Reason.NO_ACCESS
    assert run(host, device.read(process, va + PAGE, PAGE + 1)) is Reason.NO_ACCESS
    run(host, process.exit())
    assert run(host, device.read(process, va, 1)) is Reason.OWNER_GONE


def test_prefetched_pages_do_not_fault() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, observer=log)
    came = run(host, device.prefetch(process, va >> 12, 3, write=True))
    assert came == (3, None)
    log.words.clear()
    assert run(host, device.write(process, va, b"x" * 3 * PAGE)) is None
    assert log.words == ["wrote 4096"] * 3


def test_nothing_is_pinned_by_a_device() -> None:
    host = host_of()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler)
    run(host, device.write(process, va, b"x" * 4 * PAGE))
    host.check()
    run(host, process.exit())
    host.check()


def invalidate(process: Process, first: int, n: int, cause: Cause) -> Procedure[None]:
    bracket = process.begin([Range(first, first + n)], cause)
    yield Quiesce(bracket.fences)
    bracket.end()


def under_way(device: DmaDevice, process: Process) -> Procedure[None]:
    """Wait until an access is translated and moves bytes."""
    while not device.attachment(process).engine.n_under_way:
        yield Work("watch")


def test_a_slow_read_under_way_is_waited_for() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, slow=True, observer=log)
    run(host, process.store(va, b"a" * 3 * PAGE))
    reading = host.scheduler.spawn("reads", device.read(process, va, 3 * PAGE))

    def unmap() -> Procedure[None]:
        yield from under_way(device, process)
        yield from process.munmap(va, PAGE)
        log.words.append("unmapped")

    host.scheduler.spawn("unmaps", unmap())
    assert host.scheduler.run()
    assert reading.result == b"a" * 3 * PAGE
    assert log.words == ["fault 3", "answer ok", *["read 4096"] * 3, "quiet unmap 1", "unmapped"]


def test_a_slow_write_under_way_stops_at_once_and_goes_on_by_a_new_translation() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, slow=True, observer=log)
    writing = host.scheduler.spawn("writes", device.write(process, va, b"b" * 3 * PAGE))

    def disturb() -> Procedure[None]:
        yield from under_way(device, process)
        yield from invalidate(process, (va >> 12) + 2, 1, Cause.RECLAIM)

    host.scheduler.spawn("disturbs", disturb())
    assert host.scheduler.run()
    assert writing.result is None
    assert run(host, process.load(va, 3 * PAGE)) == b"b" * 3 * PAGE
    assert "quiet reclaim 1" in log.words
    assert sum(word.startswith("fault") for word in log.words) == 2
    assert not device.attachment(process).engine.n_under_way


def test_bytes_written_after_a_write_back_make_the_page_dirty_again() -> None:
    host = host_of()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, slow=True)
    page = va >> 12
    host.scheduler.spawn("writes", device.write(process, va, b"c" * 2 * PAGE))

    def sync() -> Procedure[None]:
        yield from under_way(device, process)
        yield from invalidate(process, page, 2, Cause.SYNC)

    host.scheduler.spawn("syncs", sync())
    assert host.scheduler.run()
    bracket = process.notifiers.invalidate_start([Range(page, page + 2)], Cause.RECLAIM)
    assert bracket.harvest.dirty == {page, page + 1}
    bracket.end()


def test_a_device_takes_its_time_to_be_quiet() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    asked: list[tuple[int, Cause]] = []

    def quiesce(n_entries: int, cause: Cause) -> int:
        asked.append((n_entries, cause))
        return 30 * MS_NS

    device = DmaDevice("dma", host.scheduler, observer=log, quiesce=quiesce)
    run(host, device.read(process, va, 2 * PAGE))
    run(host, invalidate(process, va >> 12, 4, Cause.UNMAP))
    assert host.scheduler.now_ns == 30 * MS_NS
    assert asked == [(2, Cause.UNMAP)]
    assert log.words[-1] == "quiet unmap 4"


def test_a_detached_device_is_told_nothing() -> None:
    host, log = host_of(), Log()
    process, va = mapped(host)
    device = DmaDevice("dma", host.scheduler, observer=log)
    run(host, device.read(process, va, 1))
    log.words.clear()
    for _ in range(2):
        device.detach(process)
    run(host, process.munmap(va, PAGE))
    assert not log.words
    assert process.notifiers.statistics().n_subscriptions == 0


@pytest.mark.parametrize("seed", range(12))
def test_two_slow_devices_and_a_process_that_remaps_see_no_stale_byte(seed: int) -> None:
    """Each byte read is zero, or of a mapping that existed at some moment of the read; mappings hold their number."""
    host = host_of(seed=seed)
    process, va = mapped(host, 2)
    devices = [DmaDevice(f"dma {number}", host.scheduler, slow=True) for number in range(2)]
    draws = Streams(seed)["test"]
    alive, open_reads = {0}, dict[str, set[int]]()
    n_bytes_read = 0

    def remaps() -> Procedure[None]:
        for number in range(1, 6):
            for possible in (alive, *open_reads.values()):
                possible.add(number)
            yield from process.store(va, bytes([number]) * 2 * PAGE)
            yield from process.munmap(va, 2 * PAGE)
            alive.discard(number)
            yield from process.mmap(2, at=va)

    def reads(device: DmaDevice) -> Procedure[None]:
        nonlocal n_bytes_read
        for _ in range(12):
            possible = open_reads[device.name] = set(alive)
            got = yield from device.read(process, va + draws.randrange(2 * PAGE - 8), 8)
            del open_reads[device.name]
            if isinstance(got, bytes):
                assert set(got) <= possible
                n_bytes_read += len(got)
            else:
                assert got is Reason.NO_ACCESS

    host.scheduler.spawn("remaps", remaps())
    for device in devices:
        host.scheduler.spawn(f"{device.name} reads", reads(device))
    assert host.scheduler.run(max_steps=100_000)
    assert n_bytes_read
    for device in devices:
        device.attach(process).check()
    run(host, process.exit())
    host.check()
