"""Who may have a userfaultfd that stops more than its own process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_DEVICE = "/dev/userfaultfd"
_CAP_SYS_PTRACE = 19


def may_hold_back_copies(pid: int) -> bool:
    """True if a process may have a userfaultfd that stops the kernel's own accesses to its memory, and so our copies.

    That takes CAP_SYS_PTRACE, the device file or the sysctl; whoever has none of them gets a userfaultfd for
    user-mode faults only, at which a copy fails instead of waiting (fs/userfaultfd.c, userfaultfd_syscall_allowed
    and handle_userfault). Asked once: a privilege given up earlier, or a sysctl set later, is not noticed.

    Raises:
        OSError: the process is gone.
    """
    if _read_word(Path("/proc/sys/vm/unprivileged_userfaultfd")) == "1":
        return True
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if int(fields["CapPrm"], 16) >> _CAP_SYS_PTRACE & 1:
        return True
    return _may_open_device({*fields["Uid"].split()}, {*fields["Gid"].split(), *fields["Groups"].split()})


def _may_open_device(users: set[str], groups: set[str]) -> bool:
    try:
        device = os.stat(_DEVICE)
    except OSError:
        return False
    mode = device.st_mode
    ours = str(device.st_uid) in users and mode & stat.S_IWUSR
    our_group = str(device.st_gid) in groups and mode & stat.S_IWGRP
    return bool(ours or our_group or mode & stat.S_IWOTH)


def _read_word(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a kernel without userfaultfd
        return ""
