"""A device that exchanges words atomically though its bus cannot: it has their page to itself meanwhile.

The rule of exclusive access is short: ask for the page; when it is there, and nobody is taking it back, begin in that
very step; when told that somebody does, do not write any more. So an exchange that was told of in its middle has not
happened, and is tried again.

Source: the atomics of nouveau on system memory (nouveau_atomic_range_fault), and make_device_exclusive of Linux.
"""

from __future__ import annotations

from nopin.mm.effects import Backoff
from nopin.mm.sequence import overlap_any
from nopin.mm.space import Reason
from nopin.mm.subscriber import Invalidation, Subscriber
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Procedure, Work
from nopin.model.host.errors import ModelFault
from nopin.model.host.exclusive import lookup_exclusive
from nopin.model.host.process import Process
from nopin.model.host.vma import NO_PAGE
from nopin.ranges import Range
from nopin.units import PAGE_MASK, PAGE_SHIFT, US_NS

WORD_BYTES = 8
PAUSE_NS = US_NS
"""Before another try: who took the page back shall have it."""


class AtomicDevice(Subscriber):
    """See above, for one process.

    Args:
        name: unique, stable from run to run.
        observer: hears of each exchange as a read and a write, when it has happened: in one moment.
    """

    def __init__(self, name: str, process: Process, observer: DeviceObserver) -> None:
        self.name = name
        self._process = process
        self._observer = observer
        self._page: Range | None = None  # in use
        process.notifiers.subscribe(Range(0, NO_PAGE), self, owner=self)

    def exchange(self, va: int, word: bytes) -> Procedure[Reason | None]:
        """Put a word where another was, in one moment; or say why that cannot be."""
        number, at = va >> PAGE_SHIFT, va & PAGE_MASK
        frames = self._process.host.frames
        while True:
            try:
                yield from self._process.make_exclusive(number, self)
            except ModelFault as failed:
                return failed.reason
            frame = lookup_exclusive(self._process, number, self)
            if frame is None:  # somebody takes it back
                yield Backoff(PAUSE_NS)
                continue
            self._page = Range(number, number + 1)
            before = frames.read(frame, at, WORD_BYTES)
            yield Work("has read, and will write")
            if self._page is not None:
                frames.write(frame, at, word)
                self._observer.device_read(self.name, self._process, va, frame, before)
                self._observer.device_wrote(self.name, self._process, va, frame, word)
                self._page = None
                return None
            yield Backoff(PAUSE_NS)

    def invalidate_start(self, event: Invalidation) -> None:
        """Let go of the page."""
        if self._page is not None and overlap_any(event.ranges, self._page):
            self._page = None
