"""What a device of the modelled machine tells whoever watches it, for instance an oracle.

Told at the moment it happens, in the step in which it happens. A watcher never acts.
"""

from __future__ import annotations

from collections.abc import Sequence

from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.host.process import Process
from nopin.ranges import Range


class DeviceObserver:
    """Base of those who watch devices; every method does nothing.

    Devices are named, pages and ranges of pages are page numbers of the process, addresses are bytes.
    """

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """A device took bytes of one page from a frame."""

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """A device put bytes of one page into a frame."""

    def invalidation_returned(self, process: Process, device: str, pages: Sequence[Range], cause: Cause) -> None:
        """From here on the device reaches nothing that it was told to let go of: no fence of it is left."""

    def fault_raised(self, device: str, process: Process, pages: PageRun, *, write: bool) -> None:
        """A device lacks pages and asks for them."""

    def fault_answered(self, device: str, process: Process, pages: PageRun, reason: Reason | None) -> None:
        """What it asked for has come, or will not."""
