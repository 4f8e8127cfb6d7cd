"""Shares outlive their server: the successor has them under the same URL, whether their owner knows of it or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import read_until_it_fails, replace

from nopin import Device, attach
from nopin.errors import AttachRefused, RegionGone
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer

N = 1 << 16
N_MANAGED = 1 << 20  # 8 MiB


def own(line: Line[Any], socket_path: str) -> None:
    """Share an array of ordinary memory and say what is in it when asked; never talk to a server again."""
    device = Device(server=socket_path)
    array = np.arange(N)
    line.send(device.share(array).url)
    while True:
        at = line.receive()
        line.send(int(array[at]))


def own_managed(line: Line[Any], socket_path: str) -> None:
    """Share an array of managed memory, most of it in swap; wait in a page fault once told to."""
    device = Device(server=socket_path, budget="5MiB")
    array = device.zeros(N_MANAGED, np.int64)
    array[:] = np.arange(N_MANAGED)
    line.send(device.share(array).url)
    line.receive()
    line.send(int(array.sum()))
    while True:
        at = line.receive()
        line.send(int(array[at]))


def test_a_share_of_ordinary_memory_has_the_same_url_at_the_successor(
    path: Path, servers: list[LocalServer], peer: Device
) -> None:
    with Child(own, str(path)) as owner:
        url = owner.line.receive()
        for value in (-1, -2):
            replace(servers)
            with attach(url, device=peer) as remote:
                assert np.array_equal(remote[10:], np.arange(10, N))
                remote[3] = value
                assert owner.ask(3) == value
                remote[3] = 3


@pytest.mark.needs_userfaultfd
def test_a_share_of_managed_memory_is_reached_while_its_owner_waits_in_a_fault(
    path: Path, servers: list[LocalServer], peer: Device
) -> None:
    with Child(own_managed, str(path)) as owner:
        url = owner.line.receive()
        servers[-1].kill()
        owner.line.send("add up")  # it waits at the first page that is out
        servers.append(LocalServer(path, ["--takeover"]))
        with attach(url, device=peer) as remote:
            assert np.array_equal(remote[...], np.arange(N_MANAGED))
            assert owner.line.receive(30.0) == N_MANAGED * (N_MANAGED - 1) // 2
            remote[N_MANAGED - 1] = -5
            assert owner.ask(N_MANAGED - 1) == -5


def test_the_shares_of_an_owner_that_is_gone_are_gone(path: Path, servers: list[LocalServer], peer: Device) -> None:
    with Child(own, str(path)) as owner, Child(own, str(path)) as other:
        url, other_url = owner.line.receive(), other.line.receive()
        servers[-1].kill()
        owner.kill()
        servers.append(LocalServer(path, ["--takeover"]))
        with pytest.raises(AttachRefused):
            attach(url, device=peer)
        with attach(other_url, device=peer) as remote:
            other.kill()
            with pytest.raises(RegionGone, match="owner exited"):
                read_until_it_fails(remote)
