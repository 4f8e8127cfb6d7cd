"""The probes, as root and as nobody, and the memfd they and the rings are made of."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from nopin.linux import memfd
from nopin.linux.credentials import peer_credentials
from nopin.linux.libc import LIBC
from nopin.linux.probe import probe_all
from nopin.units import PAGE_BYTES

PR_SET_DUMPABLE = 4


def test_every_feature_has_a_detail_and_each_lack_a_remedy() -> None:
    features = probe_all()
    assert len({feature.name for feature in features}) == len(features) >= 12
    for feature in features:
        assert feature.detail
        assert bool(feature.remedy) != feature.available, feature


def test_probing_leaves_no_descriptor_and_no_child() -> None:
    probe_all()
    before = sorted(os.listdir("/proc/self/fd"))
    probe_all()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user without privilege")
def test_nobody_can_do_the_main_job_but_has_no_raw_sockets() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        LIBC.prctl(PR_SET_DUMPABLE, ctypes.c_ulong(1), 0, 0, 0)  # changing the user took it away
        os.write(writer, " ".join(f.name for f in probe_all() if f.available).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        available = stream.read().split()
    os.waitpid(child, 0)
    assert {"process_vm", "pagemap", "memfd", "pidfd_getfd", "udp_gso"} <= set(available)
    assert "raw_sockets" not in available


def test_a_memfd_keeps_its_size_and_its_mapping_outlives_the_descriptor() -> None:
    fd = memfd.create("test", 2 * PAGE_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE_BYTES)
    array, view = memfd.map_array(fd), memfd.map_array(fd, writable=False)
    os.close(fd)
    array[-4:] = (1, 2, 3, 4)
    assert view[-4:].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_part_of_a_mapping_keeps_all_of_it() -> None:
    fd = memfd.create("test", PAGE_BYTES)
    part = memfd.map_array(fd)[100:200].view(np.uint32)
    os.close(fd)
    gc.collect()
    part[:] = 7
    assert int(part.sum()) == 7 * 25


def test_a_file_that_is_too_short_is_told() -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    with pytest.raises(ValueError, match="cannot map"):
        memfd.map_array(fd, PAGE_BYTES)
    os.close(fd)


def test_the_kernel_says_who_connected() -> None:
    ours, theirs = socket.socketpair()
    found = peer_credentials(ours)
    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.getuid(), os.getgid())
    ours.close()
    theirs.close()
