"""Watch a device fault, as a driver engineer would: counters of the region, and events of what its owner did to it."""

import mmap

import numpy as np

import nopin

PAGE = mmap.PAGESIZE


def tell(what: str) -> None:
    """Print what the device has counted of the region so far."""
    (row,) = (row for row in device.stat() if row["kind"] == "mr" and row["rkey"] == share.region.rkey)
    print(f"{what:<40} page faults {row['page_faults']}, invalidations {row['page_invalidations']}")


memory = mmap.mmap(-1, 16 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with nopin.Device() as device, device.share(np.frombuffer(memory, np.uint8)) as share:
    remote = nopin.attach(share.url, device=device)
    tell("shared 16 pages, none was ever touched")
    remote[: 4 * PAGE]
    tell("a peer has read four of them")
    remote[: 4 * PAGE]
    tell("and again")
    memory.madvise(mmap.MADV_DONTNEED, 0, 2 * PAGE)
    for event in device.events(timeout=1.0):  # none where userfaultfd is forbidden: nopin doctor
        print("  ", event)
    tell("their owner has dropped two")
    print("   the peer reads", remote[:4], "there")
    tell("the device has faulted one in again")
