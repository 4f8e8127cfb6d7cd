"""Hosts for scenarios: what their memory management costs on a machine of the presets."""

from __future__ import annotations

from typing import Any

from nopin.model.costs import Costs
from nopin.model.host.costs import HostCosts
from nopin.model.host.host import Host
from nopin.model.machine import Machine


def host_costs(costs: Costs) -> HostCosts:
    """Return what the steps of a host's memory management cost.

    A fault by write is dearer than one by read by what it takes to fill a page with zeros.
    """
    return HostCosts(
        fault_ns=costs.cpu_minor_fault_read_ns,
        zero_ns=max(0, costs.cpu_minor_fault_write_ns - costs.cpu_minor_fault_read_ns),
        copy_ns=costs.cow_copy_ns,
        flush_ns=costs.cpu_shootdown_ns,
        medium_read_ns=costs.major_fault_ns - costs.medium_page_deep_ns,
        medium_write_ns=costs.major_fault_ns - costs.medium_page_deep_ns,
        medium_page_ns=costs.medium_page_deep_ns,
    )


def priced_host(machine: Machine, n_frames: int, **settings: Any) -> Host:
    """Make a host of so many pages on a machine that has costs; settings as of `Host`."""
    assert machine.costs is not None
    costs = host_costs(machine.costs)
    return Host("host", machine.scheduler, n_frames, costs=costs, pages_per_step=512, **settings)
