"""How a modelled NIC reaches the memory of processes, and how faults on it are served.

Three ways, as in the world, and all of them through the real Iommu:

    mirrored    the whole address space is one window, reached through the mirror the NIC has of it (on-demand paging)
    walked      by PASID, through the process's own page table (shared virtual addresses)
    pinned      frames held since registration, through the real `PinnedSpace`
"""

from __future__ import annotations

from collections.abc import Iterator

from nopin.iommu.iommu import Iommu
from nopin.iommu.managed import Fault
from nopin.iommu.page_requests import PageRequest
from nopin.iommu.windows import DeviceArena
from nopin.mm.effects import PageRun
from nopin.mm.pinned import PinnedSpace
from nopin.mm.space import FaultResult
from nopin.model.device.attachment import Attachment
from nopin.model.device.engine import QuiesceTime
from nopin.model.device.faults import FaultPath
from nopin.model.device.memory import ADDRESS_BYTES
from nopin.model.device.observer import DeviceObserver
from nopin.model.device.pinned_frames import PinnedFrames
from nopin.model.device.walked import WalkedSpace
from nopin.model.effects import Procedure
from nopin.model.host.pins import Pin
from nopin.model.host.process import Process
from nopin.model.net.nothing import NothingMapped
from nopin.model.scheduler import Scheduler
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_SHIFT


class NicMemory:
    """See above.

    Args:
        name: of the NIC.
        queue_limit: page requests outstanding at most.
        observer: hears of every access. path: what a fault takes. quiesce: what an invalidation takes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        *,
        observer: DeviceObserver | None = None,
        path: FaultPath | None = None,
        quiesce: QuiesceTime | None = None,
        queue_limit: int = 4096,
    ) -> None:
        self.iommu = Iommu(queue_limit=queue_limit)
        self._scheduler = scheduler
        self._name = name
        self._observer = observer or DeviceObserver()
        self._path, self._quiesce = path, quiesce
        self._mirrored: dict[Process, tuple[int, Attachment]] = {}
        self._process_of: dict[int, Process] = {}  # by arena key
        self._walked: dict[Process, tuple[int, WalkedSpace]] = {}
        self._walked_by_pasid: dict[int, WalkedSpace] = {}
        self._pinned: dict[int, PinnedSpace] = {}

    def mirror(self, process: Process) -> int:
        """Return the PASID of a process's mirrored memory. Raises `OwnerGone` if it has exited."""
        if process not in self._mirrored:
            attachment = Attachment(
                process, self._name, self._scheduler, self._observer, path=self._path, quiesce=self._quiesce
            )
            pasid = self.iommu.bind(NothingMapped())
            arena = DeviceArena(attachment.mirror, attachment.memory)
            self.iommu.attach(arena)
            self.iommu.map_window(pasid, Range(0, ADDRESS_BYTES), arena, 0)
            self._mirrored[process] = pasid, attachment
            self._process_of[arena.key] = process
        return self._mirrored[process][0]

    def attachment(self, process: Process) -> Attachment:
        """Return what the NIC has of a process. Requires: it is mirrored."""
        return self._mirrored[process][1]

    def walk(self, process: Process) -> int:
        """Return the PASID of a process whose table the NIC walks."""
        if process not in self._walked:
            space = WalkedSpace(process, self._name, self._observer)
            pasid = self.iommu.bind(space)
            self._walked[process] = pasid, space
            self._walked_by_pasid[pasid] = space
        return self._walked[process][0]

    def pin(self, pin: Pin) -> int:
        """Return a PASID for pinned pages and nothing else; `unpin` ends it."""
        where = Range(pin.first << PAGE_SHIFT, (pin.first + len(pin.pages)) << PAGE_SHIFT)
        space = PinnedSpace(PinnedFrames(pin, self._name, self._observer), where)
        pasid = self.iommu.bind(space)
        self._pinned[pasid] = space
        return pasid

    def unpin(self, pasid: int) -> None:
        """Let go of pinned pages. One that is no pin's PASID is fine."""
        space = self._pinned.pop(pasid, None)
        if space is not None:
            self.iommu.unbind(pasid)
            space.close()

    def take_faults(self) -> Iterator[Procedure[None]]:
        """Yield what answers each page request made since this was last asked."""
        for request in self.iommu.take_requests():
            yield self._answer(request, self._walked_by_pasid[request.pasid])
        for fault in self.iommu.take_faults():
            yield self._told(fault, self._process_of[fault.arena.key])

    def _told(self, fault: Fault, process: Process) -> Procedure[None]:
        """Have a fault run, and whoever watches know of it."""
        request = fault.request
        pages = PageRun(request.start, request.end - request.start)
        self._observer.fault_raised(self._name, process, pages, write=request.write)
        yield from fault.procedure
        self._observer.fault_answered(self._name, process, pages, None)

    def _answer(self, request: PageRequest, space: WalkedSpace) -> Procedure[None]:
        pages = PageRun(request.start >> PAGE_SHIFT, (request.end - request.start) >> PAGE_SHIFT)
        if self._path is None:
            came = yield from space.resolve(pages, request.write)
        else:
            came = yield from self._path.serve(pages, request.write, space.resolve)
        self.iommu.respond(request, FaultResult(came.n_done * PAGE_BYTES))
