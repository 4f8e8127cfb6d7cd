"""Memory on devices, and private pages that live there.

A device with memory of its own may have pages of a process moved into it (`Host.migrate` with `to`). If the memory is
*private* no CPU can reach it: the entry is then a `Private` one, which only devices of that memory may use, and a CPU
that touches the page, or another device, has it moved back first. Of a shared page, or one of a file, that is not
possible.

Memory that CPUs can reach (a window of the device's bus, persistent memory) is mapped like a file: `Host.new_file` with
`memory`. Its pages are found, moved and taken away as those of files are, so its exporter can evict and revoke ranges;
it is never pinned for long.

Source: mm/migrate_device.c and do_swap_page (device private entries) of Linux, and p2pdma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nopin.model.effects import Procedure
from nopin.model.host.errors import NoMemory
from nopin.model.host.migrate import migrate
from nopin.model.host.pool import Pool
from nopin.model.host.table import Private

if TYPE_CHECKING:
    from nopin.model.host.process import Process


@dataclass(slots=True, eq=False)
class DeviceMemory:
    """Frames on a device.

    Attributes:
        name: of the device.
        pool: which are free.
        private: CPUs cannot reach them.
    """

    name: str
    pool: Pool
    private: bool


def bring_back(process: Process, number: int, entry: Private) -> Procedure[None]:
    """Move a page back to where a CPU can reach it (migrate_to_ram), or wait for who does: the caller looks again.

    Raises:
        NoMemory: there is no frame for it.
    """
    host = process.host
    if entry.page.busy is not None:
        yield from host.until_unlocked(entry.page)
        return
    n_moved = yield from migrate(process, [number])
    if not n_moved and process.table.get(number) is entry and not host.frames.n_free:
        raise NoMemory(f"{process}: no frame to bring page {number:#x} back to from {entry.memory.name}")
