"""Cold starts of small virtual machines from a snapshot on an SSD: pages faulted in one by one, or fetched ahead.

The SSD takes a fixed time per command that any number may spend at once, and a time per command and byte that it spends
on one at a time. Its three published points (one read at a time, sixteen, large ones) give the three numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from nopin.model.effects import Gate, Lane, Open, Pause, Procedure, Work
from nopin.model.pool import Pool
from nopin.model.scheduler import Scheduler
from nopin.units import PAGE_BYTES, S_NS

VARIANTS = ("vanilla", "parallel", "ws_file", "reap")


@dataclass(frozen=True)
class Ssd:
    """A device.

    Attributes:
        latency_ns: of a command, shared by all that are under way. command_ns: one at a time.
    """

    latency_ns: int
    command_ns: int
    bytes_per_s: int

    def turn_ns(self, n_bytes: int) -> int:
        """Return how long a command keeps the device from others."""
        return self.command_ns + n_bytes * S_NS // self.bytes_per_s


@dataclass(frozen=True)
class ColdStarts:
    """Some cold starts at once; a point of the experiment."""

    variant: str
    n_starts: int
    ssd: Ssd
    n_cpus: int
    n_workers: int
    n_pages: int
    run_pages: int
    leftover_pages: int
    load_ns: int
    run_ns: int
    fault_ns: int
    user_fault_ns: int
    install_call_ns: int
    install_page_ns: int
    readahead_bytes: int
    cached_page_ns: int


@dataclass
class Split:
    """Where the time of the starts went.

    Attributes:
        mean_ns: of each phase ("load", "fetch", "install", "leftover", "run"), and of all ("total").
        bytes_per_s: read from the SSD by all, while any was fetching.
    """

    mean_ns: dict[str, float]
    bytes_per_s: float


class _Host:
    """The machine all starts share."""

    def __init__(self, starts: ColdStarts) -> None:
        self.starts = starts
        self.scheduler = Scheduler()
        self.device = Lane("ssd")
        self.cpus = Pool(starts.n_cpus)
        self.splits: list[dict[str, int]] = []
        self.reading_ns = [1 << 62, 0]

    def read(self, n_bytes: int) -> Procedure[None]:
        """Read: wait for the command's own time, and for its turn."""
        ssd = self.starts.ssd
        yield Work("latency", ssd.latency_ns)
        done = Gate()
        self.scheduler.spawn("turn", self._turn(ssd.turn_ns(n_bytes), done), lane=self.device)
        yield Pause(done)

    def _turn(self, cost_ns: int, done: Gate) -> Procedure[None]:
        yield Work("transfer", cost_ns)
        yield Open(done)

    def start(self) -> Procedure[None]:
        """One cold start."""
        starts, clock = self.starts, self.scheduler
        split: dict[str, int] = {}
        begun_ns = clock.now_ns
        for name, phase in (
            ("load", self.cpus.serve("load", starts.load_ns)),
            ("fetch", self._fetch()),
            ("install", self._install()),
            ("leftover", self._leftovers()),
            ("run", self.cpus.serve("run", starts.run_ns)),
        ):
            before_ns = clock.now_ns
            yield from phase
            split[name] = clock.now_ns - before_ns
            if name == "fetch":
                self.reading_ns = [min(self.reading_ns[0], before_ns), max(self.reading_ns[1], clock.now_ns)]
        split["total"] = clock.now_ns - begun_ns
        self.splits.append(split)

    def _fetch(self) -> Procedure[None]:
        starts = self.starts
        wanted_bytes = starts.n_pages * PAGE_BYTES
        if starts.variant == "vanilla":
            for _ in range(starts.n_pages):
                yield Work("fault", starts.fault_ns)
                yield from self.read(PAGE_BYTES)
        elif starts.variant == "parallel":
            shares = [starts.n_pages // starts.n_workers] * starts.n_workers
            shares[0] += starts.n_pages - sum(shares)
            gates = [Gate() for _ in shares]
            for share, gate in zip(shares, gates, strict=True):
                self.scheduler.spawn("worker", self._worker(share, gate))
            for gate in gates:
                yield Pause(gate)
        elif starts.variant == "ws_file":
            yield from self._read_ahead(wanted_bytes)
        else:
            yield from self.read(wanted_bytes)

    def _worker(self, n_pages: int, done: Gate) -> Procedure[None]:
        for _ in range(n_pages):
            yield from self.read(PAGE_BYTES)
        yield Open(done)

    def _read_ahead(self, n_bytes: int) -> Procedure[None]:
        """A buffered read: the kernel asks for the next window while it copies from the last."""
        starts, window = self.starts, self.starts.readahead_bytes
        n_windows = -(-n_bytes // window)
        arrived = [Gate() for _ in range(n_windows)]

        def fetch(at: int) -> Procedure[None]:
            yield from self.read(window)
            yield Open(arrived[at])

        for at in range(n_windows):
            for ahead in (at, at + 1):
                if ahead < n_windows and (ahead == at + 1 or at == 0):
                    self.scheduler.spawn("readahead", fetch(ahead))
            yield Pause(arrived[at])
            yield Work("copy", window // PAGE_BYTES * starts.cached_page_ns)

    def _install(self) -> Procedure[None]:
        """Give the pages to the machine: an ioctl a run, of neighbours only."""
        starts = self.starts
        if starts.variant == "vanilla":
            return
        n_calls = starts.n_pages // starts.run_pages
        yield Work("install", n_calls * starts.install_call_ns + starts.n_pages * starts.install_page_ns)

    def _leftovers(self) -> Procedure[None]:
        """Pages that were not recorded: faults to user space, each with a read of its own."""
        starts = self.starts
        if starts.variant == "vanilla":
            return
        for _ in range(starts.leftover_pages):
            yield Work("fault", starts.user_fault_ns)
            yield from self.read(PAGE_BYTES)


def run_starts(starts: ColdStarts) -> Split:
    """Start all at once."""
    host = _Host(starts)
    for at in range(starts.n_starts):
        host.scheduler.spawn(f"start {at}", host.start())
    host.scheduler.run()
    n = len(host.splits)
    assert n == starts.n_starts
    mean_ns = {name: sum(split[name] for split in host.splits) / n for name in host.splits[0]}
    begun_ns, ended_ns = host.reading_ns
    fetched = starts.n_starts * starts.n_pages * PAGE_BYTES
    return Split(mean_ns, bytes_per_s=fetched * S_NS / (ended_ns - begun_ns))
