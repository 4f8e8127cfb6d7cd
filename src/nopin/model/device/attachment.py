"""One process as one device sees it: mirror, translations, faults, and what is under way."""

from __future__ import annotations

from nopin.iommu.mirror import Mirror
from nopin.mm.subscriber import Invalidation
from nopin.model.device.engine import Engine, QuiesceTime
from nopin.model.device.faults import FaultPath, ProcessFaults
from nopin.model.device.memory import ADDRESS_BYTES, MirroredMemory
from nopin.model.device.observer import DeviceObserver
from nopin.model.device.translations import Translations
from nopin.model.host.process import Process
from nopin.model.scheduler import Scheduler
from nopin.ranges import Range
from nopin.units import PAGE_SHIFT

ADDRESS_PAGES = ADDRESS_BYTES >> PAGE_SHIFT


class Attachment:
    """See above.

    Args:
        device: its name.
        observer: hears when an invalidation is over for this device.
        path: what a fault takes.
        quiesce: what an invalidation takes.

    Raises:
        OwnerGone: the process has exited.
    """

    def __init__(
        self,
        process: Process,
        device: str,
        scheduler: Scheduler,
        observer: DeviceObserver,
        *,
        path: FaultPath | None = None,
        quiesce: QuiesceTime | None = None,
    ) -> None:
        self.process = process
        self.translations = Translations(process.host.frames)
        self.faults = ProcessFaults(process, self.translations, path)
        self.memory = MirroredMemory(process, device, self.translations, observer)
        self.mirror = Mirror(process.notifiers, self.faults, ADDRESS_PAGES, owner=device)
        name = f"{device}/{process.pid}"
        self.engine = Engine(scheduler, name, self._n_dropped, self._quiet, quiesce=quiesce)
        self._device = device
        self._observer = observer
        everything = Range(0, ADDRESS_PAGES)
        self._subscription = process.notifiers.subscribe(everything, self.engine, owner=device)

    def close(self) -> None:
        """Stop mirroring. Requires: no access is under way. Twice is fine."""
        assert not self.engine.n_under_way, "a device that is detached in the middle of an access"
        self.process.notifiers.unsubscribe(self._subscription)
        self.mirror.close()

    def _n_dropped(self) -> int:
        statistics = self.mirror.statistics()
        return statistics.invalidated + statistics.protected

    def _quiet(self, event: Invalidation) -> None:
        self._observer.invalidation_returned(self.process, self._device, event.ranges, event.cause)
