"""What a modelled host tells whoever watches it: an oracle that knows only what programs may observe.

All hooks are called in the very step in which it is so. Those in pairs bracket a system call: between `begins` and
`ends` the old and the new state may both be seen, after it only the new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.model.host.frames import FrameObserver

if TYPE_CHECKING:
    from nopin.model.host.files import File
    from nopin.model.host.process import Process
    from nopin.ranges import Range


class HostObserver(FrameObserver):
    """See above. Addresses are bytes, and so are ranges; what a watcher does not want it does not override."""

    def cpu_loaded(self, process: Process, va: int, data: bytes) -> None:
        """The process read these bytes; never across a page."""

    def cpu_stored(self, process: Process, va: int, data: bytes) -> None:
        """The process wrote these bytes; never across a page."""

    def mapped(self, process: Process, where: Range) -> None:
        """New private memory is mapped there from here on: zeros."""

    def file_mapped(self, process: Process, where: Range, file: File, offset: int, *, shared: bool) -> None:
        """A file is mapped there from here on, from its page `offset`."""

    def unmap_begins(self, process: Process, where: Range) -> None:
        """The range is being unmapped, or mapped over."""

    def unmap_ends(self, process: Process, where: Range) -> None:
        """Nothing of the range is mapped."""

    def discard_begins(self, process: Process, where: Range) -> None:
        """The bytes there are being given up: zeros, or the file's, take their place at some moment."""

    def discard_ends(self, process: Process, where: Range) -> None:
        """They are given up."""

    def give_up_begins(self, process: Process, where: Range) -> None:
        """The bytes there may become zeros at any moment from here on, until they are written (MADV_FREE)."""

    def give_up_ends(self, process: Process, where: Range) -> None:
        """What is written from here on stays."""

    def protected(self, process: Process, where: Range, *, read: bool, write: bool) -> None:
        """Accesses are allowed so from here on; raised rights hold already when they are told."""

    def move_begins(self, process: Process, source: Range, target: Range) -> None:
        """The pages of `source` are moving to `target`, of the same length."""

    def move_ends(self, process: Process, source: Range, target: Range) -> None:
        """They have."""

    def fork_begins(self, parent: Process) -> None:
        """The memory of the process is being copied: what is stored from here on may or may not be in the copy."""

    def fork_ends(self, parent: Process, child: Process) -> None:
        """The child has its memory; nothing stored from here on is seen on the other side, private memory's."""

    def truncate_begins(self, file: File, length_bytes: int) -> None:
        """The file is being made longer or shorter."""

    def truncate_ends(self, file: File, length_bytes: int) -> None:
        """It is. Of pages that are cut off no process has anything any more; what was cut off of a page is zeros."""

    def punch_begins(self, file: File, first: int, end: int) -> None:
        """Pages [first, end) of the file are becoming zeros."""

    def punch_ends(self, file: File, first: int, end: int) -> None:
        """They have; private copies of them stay what they are."""

    def released(self, process: Process) -> None:
        """The address space is gone: devices were told, and none of its pages has been freed yet."""

    def fault_raised(self, process: Process, page: int, *, write: bool) -> None:
        """The process, or a device in its name, faults at a page."""

    def fault_answered(self, process: Process, page: int, *, write: bool) -> None:
        """That fault is over, whatever came of it."""
