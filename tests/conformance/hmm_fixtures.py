"""Fixtures of the tests named after the kernel's HMM self-tests; these modules name this one in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hmm_stand import BUDGET, MirrorDevice, Nic, Stand, Worker

import nopin
from nopin.lab.servers import LocalServer


@pytest.fixture
def stand(server: LocalServer) -> Iterator[Stand]:
    with nopin.Device(str(server.socket_path), budget=BUDGET) as device:
        yield Stand(device)


@pytest.fixture
def nic(stand: Stand) -> Nic:
    return Nic(stand.device, stand.device)


@pytest.fixture
def worker(stand: Stand) -> Worker:
    return Worker(stand.device)


@pytest.fixture(params=["nic", "wire", "worker"])
def mirror(request: pytest.FixtureRequest, stand: Stand) -> Iterator[MirrorDevice]:
    """Each kind of device in turn: the NIC on its direct path, the NIC over the wire, an accelerator worker."""
    if request.param == "worker":
        yield Worker(stand.device)
    elif request.param == "nic":
        yield Nic(stand.device, stand.device)
    else:
        path = request.getfixturevalue("tmp_path") / "other.sock"
        with LocalServer(path) as other, nopin.Device(str(other.socket_path)) as peer:
            yield Nic(stand.device, peer)
