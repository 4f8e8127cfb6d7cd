"""What page faults of managed memory cost, each beside the barest thing that could be done instead.

All runs on one CPU, the touching process, the server and the floors, by turns: a wake-up across CPUs costs several
faults, and how often it comes is the scheduler's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nopin.lab.device_read import PageReader
from nopin.lab.figures import BandwidthFigure, Figure, LatencyFigure
from nopin.lab.floor_fault import FirstTouchFloor, OneFaultFloor, ReadIntoPlaceFloor
from nopin.lab.rounds import Floor, alternate
from nopin.lab.scratch import scratch_folder
from nopin.lab.servers import LocalServer
from nopin.lab.touch import load_rate, one_cpu, scattered_pages, store_rate, touch_each
from nopin.units import PAGE_BYTES
from nopin.verbs.device import Device

N_ROUNDS = 5
ROUND_S = 0.1
N_PAGES = 1 << 14
"""64 MiB: a stream far longer than any window of readahead."""
N_FAULTS = 2000
BATCHES_PAGES = (16, 64, 512)
N_READS = 64
"""Far apart, so that no READ brings another's page."""
SWAP_DIR = Path("/var/tmp")
"""As the server's default; the file that is read for comparison lies beside its swap."""


class FaultFigure(msgspec.Struct, kw_only=True, frozen=True):
    """One kind of fault.

    Attributes:
        asked: the ratio to the floor that is asked for: at most for latencies, at least for rates.
    """

    name: str
    asked: float
    figure: Figure

    @property
    def reached(self) -> bool:
        """Whether the ratio is as asked."""
        ratio = self.figure.ratio_to_floor
        assert ratio is not None
        return ratio <= self.asked if isinstance(self.figure, LatencyFigure) else ratio >= self.asked

    def as_json(self) -> dict[str, Any]:
        """Return the figure's keys, and what was asked for."""
        return {"fault": self.name, **self.figure.as_json(), "asked": self.asked, "reached": self.reached}


@contextmanager
def fault_bench() -> Iterator[FaultBench]:
    """Start a server on one CPU, and an arena there.

    Raises:
        HostLacks: no userfaultfd for this user.
    """
    with ExitStack() as held:
        held.enter_context(one_cpu())
        folder = held.enter_context(scratch_folder())
        server = held.enter_context(LocalServer(folder / "managed.sock"))
        device = held.enter_context(Device(server=str(server.socket_path)))
        yield FaultBench(device)


class FaultBench:
    """Measures in an arena that has room for twice the pages it touches."""

    def __init__(self, device: Device, *, n_pages: int = N_PAGES, n_rounds: int = N_ROUNDS) -> None:
        self._device = device
        self._n_pages = n_pages
        self._n_rounds = n_rounds
        self._seeds = count(1000)
        self._budget_bytes = 2 * n_pages * PAGE_BYTES
        self._arena = device.arena(4 * self._budget_bytes, self._budget_bytes, name="bench")

    def all(self) -> Iterator[FaultFigure]:
        """Measure everything, one after the other."""
        yield self.cpu_fault()
        yield self.first_touch()
        yield self.reread()
        yield from self.device_faults()

    def cpu_fault(self) -> FaultFigure:
        """Time single stores to missing pages."""
        with closing(OneFaultFloor(self._n_pages)) as floor:
            (rounds,), floor_ns = alternate([self._fault_round], floor, n_rounds=self._n_rounds, floor_s=ROUND_S)
        samples = [float(sample) for each in rounds for sample in each]
        figure = LatencyFigure(size_bytes=PAGE_BYTES, samples_ns=samples, floor_name=floor.name, floor_ns=floor_ns)
        return FaultFigure(name="cpu_fault", asked=1.3, figure=figure)

    def _fault_round(self) -> list[int]:
        return touch_each(self._fresh(), scattered_pages(self._n_pages, N_FAULTS, next(self._seeds)))

    def first_touch(self) -> FaultFigure:
        """Rate of touching missing memory in order, against the barest loop at its best batch size."""
        with ExitStack() as held:
            floors = [held.enter_context(closing(FirstTouchFloor(self._n_pages, n))) for n in BATCHES_PAGES]
            best = max(floors, key=lambda floor: floor.measure(ROUND_S))
            figure = self._rate(lambda: store_rate(self._fresh()), best)
        return FaultFigure(name="first_touch", asked=0.7, figure=figure)

    def reread(self) -> FaultFigure:
        """Rate of reading in order what was swapped out, bytes that do not compress, against pread of a file.

        The file's bytes are in the page cache in both cases, so that the medium does not hide the difference.
        """
        array = self._fresh()
        array[:] = np.frombuffer(np.random.default_rng(2).bytes(array.nbytes), np.uint8)

        def again() -> float:
            self._swap_out()
            return load_rate(array)

        with closing(ReadIntoPlaceFloor(array.nbytes, SWAP_DIR)) as floor:
            figure = self._rate(again, floor)
        return FaultFigure(name="reread", asked=0.7, figure=figure)

    def device_faults(self) -> Iterator[FaultFigure]:
        """Time READs of pages that the device has to fault in, and take off what READs of mapped pages take.

        A page that is in memory is held against a fault of a process, a first touch as in `cpu_fault`, but in an arena
        that has pages in swap, where it takes longer; one in swap against three of these and the medium: reading such a
        page, by one call, from a file that is as cached as swap. All of it by turns.
        """
        minor: list[float] = []
        major: list[float] = []
        cpu: list[float] = []
        read: list[float] = []
        memory = self._fresh().reshape(-1, PAGE_BYTES)
        with ExitStack() as held:
            medium = held.enter_context(closing(ReadIntoPlaceFloor(memory.nbytes, SWAP_DIR)))
            reader = held.enter_context(closing(PageReader(self._device, memory, self._swap_out)))
            medium.measure(0)  # so that its place has frames
            for _ in range(self._n_rounds):
                pages = scattered_pages(self._n_pages, N_READS, next(self._seeds), apart=self._n_pages // N_READS)
                added = reader.round(pages)
                minor += added.minor
                major += added.major
                cpu += self._fault_round()
                read += medium.read_each(pages)
        del memory
        fault_ns = median(cpu)
        yield _device_figure("device_minor", minor, 3.0, "cpu_fault", fault_ns)
        yield _device_figure("device_major", major, 1.0, "medium_and_3_cpu_faults", median(read) + 3 * fault_ns)

    def _swap_out(self) -> None:
        self._arena.set_budget(PAGE_BYTES)
        self._arena.set_budget(self._budget_bytes)

    def _rate(self, run: Callable[[], float], floor: Floor) -> BandwidthFigure:
        run()  # the first time, frames come from the host
        (rounds,), floor_rate = alternate([run], floor, n_rounds=self._n_rounds, floor_s=ROUND_S)
        return BandwidthFigure(
            size_bytes=PAGE_BYTES,
            n_iterations=self._n_rounds * self._n_pages,
            rounds_bytes_per_s=rounds,
            floor_name=floor.name,
            floor_bytes_per_s=floor_rate,
        )

    def _fresh(self) -> NDArray[np.uint8]:
        """Return an array that nobody has touched."""
        self._arena.trim()
        return self._arena.zeros(self._n_pages * PAGE_BYTES, np.uint8)


def _device_figure(name: str, samples_ns: list[float], asked: float, floor: str, floor_ns: float) -> FaultFigure:
    figure = LatencyFigure(size_bytes=PAGE_BYTES, samples_ns=samples_ns, floor_name=floor, floor_ns=floor_ns)
    return FaultFigure(name=name, asked=asked, figure=figure)
