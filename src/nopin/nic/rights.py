"""Access rights as plain integers, for the checks on the data path.

`Access` is an IntFlag for those who read and write it; each `&` of flags costs as much as a small copy.
"""

from __future__ import annotations

from nopin.nic.abi import Access

NOTHING = int(Access.NONE)
LOCAL_WRITE = int(Access.LOCAL_WRITE)
REMOTE_WRITE = int(Access.REMOTE_WRITE)
REMOTE_READ = int(Access.REMOTE_READ)
REMOTE_ATOMIC = int(Access.REMOTE_ATOMIC)
ANY_REMOTE = REMOTE_WRITE | REMOTE_READ | REMOTE_ATOMIC
