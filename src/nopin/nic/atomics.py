"""Eight-byte atomics on process memory.

They are atomic with respect to every other RDMA atomic of this device, because one loop executes them all
(``IBV_ATOMIC_HCA``); a CPU store of the owner between the read and the write is not excluded, as on such hardware.
"""

from __future__ import annotations

from nopin.iommu.access import PARKED, Access, Span
from nopin.nic.core import Core, Waiter
from nopin.nic.mr import Region
from nopin.nic.work import ATOMIC_BYTES
from nopin.units import U64_MAX


def execute(
    core: Core, region: Region, va: int, *, compare: int | None, operand: int, waiter: Waiter | None
) -> int | None:
    """Carry out one atomic on the native-endian u64 at va.

    Args:
        compare: the value that makes a swap happen; None for fetch-and-add.
        operand: the value to store, or to add modulo 2^64.

    Returns:
        The original value, PARKED when the page is on its way, None when the memory cannot be written.
    """
    scratch, meter = core.scratch, region.meter
    where = Access(Span(region.pasid, va, meter, waiter), ATOMIC_BYTES, write=True)
    if waiter is not None and not core.iommu.admit_all((where,)):
        return PARKED
    if core.iommu.read(region.pasid, va, ATOMIC_BYTES, scratch, 0, meter, None) != ATOMIC_BYTES:
        return None
    original = int.from_bytes(scratch.view[:ATOMIC_BYTES], "little")
    value = original
    if compare is None:
        value = (original + operand) & U64_MAX
    elif original == compare:
        value = operand
    # Written even when nothing changes: an atomic needs write permission whatever it finds.
    scratch.view[:ATOMIC_BYTES] = value.to_bytes(ATOMIC_BYTES, "little")
    if core.iommu.write(region.pasid, va, ATOMIC_BYTES, scratch, 0, meter, None) != ATOMIC_BYTES:
        return None
    return original
