"""A device that reads and writes the memory of processes by their own addresses, through a mirror.

It is the simplest user of a mirror there can be, and shows the whole rule of it: ask the mirror; if it does not allow
the access, fill; then touch frames, by what the last fill took down and never by the process's own table.

A *slow* device takes several steps from the translation to the last byte, as DMA engines do; others may go on in
between. What it owes to invalidations then is in `engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.iommu.mirror import Mirror
from nopin.iommu.windows import page_run
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.device.attachment import Attachment
from nopin.model.device.engine import QuiesceTime
from nopin.model.device.faults import FaultPath
from nopin.model.device.observer import DeviceObserver
from nopin.model.device.translations import Piece
from nopin.model.effects import Procedure, Work
from nopin.model.host.process import Process
from nopin.model.scheduler import Scheduler


class DmaDevice:
    """See above.

    Args:
        name: unique, stable from run to run.
        slow: an access takes a step a page.
        observer: hears of every access and fault.
        path: what a fault takes; see `FaultPath`.
        quiesce: what an invalidation takes.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        *,
        slow: bool = False,
        observer: DeviceObserver | None = None,
        path: FaultPath | None = None,
        quiesce: QuiesceTime | None = None,
    ) -> None:
        self.name = name
        self.slow = slow
        self._scheduler = scheduler
        self._observer = observer or DeviceObserver()
        self._path = path
        self._quiesce = quiesce
        self._attached: dict[int, Attachment] = {}

    def attach(self, process: Process) -> Mirror:
        """Mirror a process. Twice is fine: the same mirror.

        Raises:
            OwnerGone: it has exited.
        """
        return self.attachment(process).mirror

    def attachment(self, process: Process) -> Attachment:
        """Return what the device has of a process, and mirror it if it does not yet."""
        found = self._attached.get(process.pid)
        if found is None:
            found = self._attached[process.pid] = Attachment(
                process, self.name, self._scheduler, self._observer, path=self._path, quiesce=self._quiesce
            )
        return found

    def detach(self, process: Process) -> None:
        """Forget a process. Requires: no access to it is under way. Twice is fine."""
        attachment = self._attached.pop(process.pid, None)
        if attachment is not None:
            attachment.close()

    # Accesses

    def read(self, process: Process, va: int, length: int) -> Procedure[bytes | Reason]:
        """Read bytes [va, va + length), or say why they cannot be had; then some may have been read."""
        frames, observer = process.host.frames, self._observer
        parts: list[bytes] = []

        def touch(piece: Piece) -> None:
            start, frame, at, _, n = piece
            data = frames.read(frame, at, n)
            parts.append(data)
            observer.device_read(self.name, process, start, frame, data)

        reason = yield from self._access(self.attachment(process), va, length, touch, write=False)
        return b"".join(parts) if reason is None else reason

    def write(self, process: Process, va: int, data: bytes) -> Procedure[Reason | None]:
        """Write bytes from `va` on, or say why that cannot be done; then some may have been written."""

        def touch(piece: Piece) -> None:
            start, frame, at, offset, n = piece
            part = data[offset : offset + n]
            process.host.frames.write(frame, at, part)
            self._observer.device_wrote(self.name, process, start, frame, part)

        return (yield from self._access(self.attachment(process), va, len(data), touch, write=True))

    def prefetch(self, process: Process, first: int, n: int, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages ahead of their use; returns how far that came."""
        return (yield from self._fill(self.attachment(process), PageRun(first, n), write=write))

    def _access(
        self, to: Attachment, va: int, length: int, touch: Callable[[Piece], None], *, write: bool
    ) -> Procedure[Reason | None]:
        """Touch all pieces of an access, in order, as often translated anew as it is stopped.

        BUSY is no answer: who waits for memory that keeps changing asks again.
        """
        done = 0
        while done < length:
            first, n = page_run(va + done, length - done)
            while not to.mirror.use(first, n, write=write):
                came = yield from self._fill(to, PageRun(first, n), write=write)
                if came.reason not in (None, Reason.BUSY):
                    return came.reason
            # from here on in the step in which the mirror allowed it
            pieces = to.translations.pieces(va, length, done)
            if self.slow:
                done = yield from self._touch_slowly(to, PageRun(first, n), pieces, done, touch, write=write)
                continue
            for piece in pieces:
                touch(piece)
            return None
        return None

    def _touch_slowly(
        self,
        to: Attachment,
        pages: PageRun,
        pieces: list[Piece],
        done: int,
        touch: Callable[[Piece], None],
        *,
        write: bool,
    ) -> Procedure[int]:
        """Touch pieces, one a step, up to the last or until stopped; returns how many bytes are done by then."""
        access = to.engine.begin(pages, write=write)
        for piece in pieces:
            yield Work("dma under way")
            if access.stopped:
                break
            touch(piece)
            *_, offset, n = piece
            done = offset + n
        to.engine.finish(access)
        return done

    def _fill(self, to: Attachment, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        self._observer.fault_raised(self.name, to.process, pages, write=write)
        came = yield from to.mirror.fill(pages, write=write)
        to.mirror.unhold(pages, came)
        self._observer.fault_answered(self.name, to.process, pages, came.reason)
        return came
