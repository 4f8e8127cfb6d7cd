"""Machines whose figures have been published, as complete sets of cost parameters.

A preset names only what differs from `connectib56`, the machine most figures are known of; everything else is
*inherited*, which `Preset.rows` says of each parameter, because an inherited figure is a guess about that machine.
Overlays change a few parameters of any preset: ``connectib56+slow_quiesce``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nopin.errors import UsageError
from nopin.model.costs import Costs, fields_of, override
from nopin.units import MS_NS, US_NS

BASE = "connectib56"


class Figure(NamedTuple):
    """A parameter's value on one machine, its kind of evidence (see `model.costs`) and source."""

    value: int
    tag: str
    source: str


class ParameterRow(NamedTuple):
    """A parameter of a preset, for printing.

    Attributes:
        inherited: not known of this machine; the value is that of `BASE`.
    """

    name: str
    value: int
    tag: str
    source: str
    meaning: str
    inherited: bool


@dataclass(frozen=True)
class Preset:
    """A machine.

    Attributes:
        title: what it is, in a line.
        figures: what is known of it.
        notes: what a user must know before believing a prediction.
    """

    name: str
    title: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    notes: str = ""

    def costs(self) -> Costs:
        """Return the complete set of parameters."""
        return override(Costs(), {name: figure.value for name, figure in self.figures.items()})

    def rows(self) -> Iterator[ParameterRow]:
        """Yield every parameter, with whether it is known of this machine or inherited."""
        for each in fields_of():
            known = self.figures.get(each.name)
            inherited = known is None and self.name != BASE
            value, tag, source = known or Figure(each.default, each.tag, each.source)
            yield ParameterRow(each.name, value, tag, source, each.meaning, inherited)

    def with_overlay(self, overlay: Preset) -> Preset:
        """Return the preset with an overlay's figures in place of its own."""
        return Preset(
            name=f"{self.name}+{overlay.name}",
            title=f"{self.title}; {overlay.title}",
            figures={**self.figures, **overlay.figures},
            notes=" ".join(filter(None, (self.notes, overlay.notes))),
        )


_NPF = "NPF, ASPLOS'17"
_NOTES_CX6 = "ConnectX-6 notes"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(BASE, "Connect-IB 56 Gb/s, 2 x 12-core E5-2697v2, 128 GB, Linux 3.10, one switch"),
        Preset(
            "connectx3",
            "ConnectX-3 Ethernet prototype, 4-core E3-1220, 8 GB, Linux 3.11, back to back, 802.3x",
            {
                "host_memory_bytes": Figure(8 << 30, "P", _NPF),
                "n_cpus": Figure(4, "P", _NPF),
                "link_bits_per_s": Figure(40_000_000_000, "X", "link of the card"),
                "line_rate_bits_per_s": Figure(12_000_000_000, "P", "NPF sec 5: 24 Gb/s of PCIe, packets twice"),
            },
            notes="No RNR NAK on Ethernet. Its fault stages were not published and are inherited.",
        ),
        Preset(
            "connectx6",
            "a modern RoCE card of 100 Gb/s; its timers",
            {
                "link_bits_per_s": Figure(100_000_000_000, "X", "as sold"),
                "line_rate_bits_per_s": Figure(97_600_000_000, "S", "notes, 4 KiB messages on 100 G"),
                "rnr_wait_permille": Figure(3_300, "S", _NOTES_CX6),
                "ack_floor_exponent": Figure(16, "S", _NOTES_CX6),
                "ack_interval_factor": Figure(2, "S", _NOTES_CX6),
            },
        ),
        Preset(
            "connectx6_no_floor",
            "the same card with the floor of its ACK timeout off",
            {
                "link_bits_per_s": Figure(100_000_000_000, "X", "as sold"),
                "line_rate_bits_per_s": Figure(97_600_000_000, "S", "notes, 4 KiB messages on 100 G"),
                "rnr_wait_permille": Figure(3_300, "S", _NOTES_CX6),
                "ack_floor_exponent": Figure(0, "S", _NOTES_CX6),
                "ack_interval_factor": Figure(1, "S", _NOTES_CX6),
                "ack_first_min_permille": Figure(570, "D", _NOTES_CX6),
                "ack_first_max_permille": Figure(1_050, "D", _NOTES_CX6),
                "ack_timeouts_less": Figure(0, "S", _NOTES_CX6),
                "ack_timeouts_more": Figure(1, "S", _NOTES_CX6),
            },
        ),
        Preset(
            "part_arm_fpga",
            "Zynq MPSoC, 4 x A53 1.2 GHz, 16 GB, network interface in an FPGA, 10 Gb/s",
            {
                "host_memory_bytes": Figure(16 << 30, "P", "PART, TPDS'22"),
                "n_cpus": Figure(4, "P", "PART, TPDS'22"),
                "nic_fault_report_ns": Figure(1 * US_NS, "P", "PART, interrupt handler"),
                "nic_fault_report_page_ns": Figure(0, "P", "PART, one report a block"),
                "driver_fault_ns": Figure(9 * US_NS, "P", "PART, page-in 6 + 3n"),
                "driver_fault_page_ns": Figure(3 * US_NS, "P", "PART, page-in 6 + 3n"),
                "nic_resume_ns": Figure(1 * US_NS, "P", "PART, retransmit request"),
                "iotlb_miss_ns": Figure(600, "P", "PART, SMMU walk"),
                "link_bits_per_s": Figure(10_000_000_000, "P", "PART"),
                "line_rate_bits_per_s": Figure(10_000_000_000, "D", "PART: a page streams in 3.2 us"),
                "cpu_minor_fault_write_ns": Figure(3 * US_NS, "P", "PART, first touch"),
                "send_4k_ns": Figure(4 * US_NS, "P", "PART, first packet of a 4 KiB write"),
            },
        ),
        Preset(
            "softroce",
            "the kernel's software RoCE: CPU faults only",
            {
                "rnr_wait_permille": Figure(1_000, "C", "drivers/infiniband/sw/rxe"),
                "ack_floor_exponent": Figure(0, "C", "drivers/infiniband/sw/rxe"),
                "ack_interval_factor": Figure(1, "C", "drivers/infiniband/sw/rxe"),
                "ack_first_min_permille": Figure(1_000, "C", "drivers/infiniband/sw/rxe"),
                "ack_first_max_permille": Figure(1_000, "C", "drivers/infiniband/sw/rxe"),
                "ack_timeouts_less": Figure(0, "C", "drivers/infiniband/sw/rxe"),
                "nic_fault_report_ns": Figure(0, "C", "there is no device to report"),
                "nic_fault_report_page_ns": Figure(0, "C", "there is no device to report"),
                "nic_resume_ns": Figure(0, "C", "there is no device to resume"),
            },
            notes="No throughput of it that can be trusted was found: figures of the link are inherited.",
        ),
        Preset(
            "pri_iommu",
            "a device with ATS and PRI",
            {
                "pages_per_fault_request": Figure(1, "S", "PCIe PRI: one page a request"),
                "outstanding_faults": Figure(32, "S", "PCIe PRI: 32 a device"),
                "invalidate_table_ns": Figure(690, "P", "rIOMMU Table 1"),
            },
        ),
        Preset(
            "amd_ppr_gpu",
            "A10-7850K, GPU and CPU share page tables",
            {
                "pages_per_fault_request": Figure(1, "S", "ISPASS'16"),
                "ppr_idle_ns": Figure(5_000, "S", "ISPASS'16"),
                "ppr_saturated_ns": Figure(140_000, "S", "ISPASS'16"),
                "cpu_minor_fault_read_ns": Figure(1_700, "S", "ISPASS'16"),
                "cpu_minor_fault_write_ns": Figure(1_700, "S", "ISPASS'16"),
                "gpu_shootdown_ns": Figure(4_200, "S", "ISPASS'16"),
                "gpu_shootdown_all_ns": Figure(4_400, "S", "ISPASS'16"),
            },
        ),
        Preset(
            "volta_uvm",
            "Titan V 12 GB, EPYC 7551P, CUDA 11.2, driver 460.27.04, PCIe 3 x16",
            {
                "n_cpus": Figure(32, "P", "SC'21"),
                "gpu_batch_ns": Figure(50_000, "P", "SC'21 Fig 6, by eye"),
                "gpu_batch_faults": Figure(256, "P", "SC'21"),
                "gpu_block_bytes": Figure(2 << 20, "P", "SC'21"),
            },
        ),
        Preset(
            "rtx5080_uvm",
            "RTX 5080 on PCIe 5 x16",
            {
                "gpu_fault_ns": Figure(31_800, "S", "MSched"),
                "gpu_fault_transfer_ns": Figure(1_350, "S", "MSched"),
                "interconnect_bytes_per_s": Figure(55_000_000_000, "X", "PCIe 5 x16: 63 GB/s less its packets"),
            },
        ),
        Preset(
            "mi300a",
            "APU with a mirrored page table, no migration",
            {
                "gpu_minor_ns": Figure(16_000, "S", "arXiv 2508.12743"),
                "gpu_major_ns": Figure(18_000, "S", "arXiv 2508.12743"),
                "cpu_minor_fault_read_ns": Figure(9_000, "S", "arXiv 2508.12743"),
                "cpu_minor_fault_write_ns": Figure(9_000, "S", "arXiv 2508.12743"),
            },
        ),
        Preset(
            "cloud_dpu",
            "a cloud's data processing unit, after VIO",
            {
                "iopf_service_ns": Figure(700 * US_NS, "P", "VIO, OSDI'25"),
                "major_fault_ns": Figure(700 * US_NS, "P", "VIO, OSDI'25"),
            },
        ),
        Preset(
            "ideal_silicon",
            "what if a card reported and resumed in a microsecond",
            {
                "nic_fault_report_ns": Figure(1 * US_NS, "X", "what if"),
                "nic_resume_ns": Figure(1 * US_NS, "X", "what if"),
            },
        ),
    )
}

OVERLAYS = {
    "slow_quiesce": Preset(
        "slow_quiesce",
        "with devices that take 10 to 50 ms to quiesce",
        {
            "device_quiesce_min_ns": Figure(10 * MS_NS, "X", "stress"),
            "device_quiesce_max_ns": Figure(50 * MS_NS, "X", "stress"),
        },
    )
}

THIS_HOST = "this_host"
"""The preset that a calibration run on this host fills; `lab/calibration.py` reads it."""


def preset_named(name: str, measured: Mapping[str, Preset] | None = None) -> Preset:
    """Return a preset, with overlays if the name has any after ``+``.

    Args:
        measured: more presets by name, as read from calibration files.

    Raises:
        UsageError: there is none of that name.
    """
    first, *overlays = name.split("+")
    known = {**PRESETS, **(measured or {})}
    if first not in known:
        if first == THIS_HOST:
            raise UsageError("this host was never calibrated; run: nopin model calibrate")
        raise UsageError(f"no machine {first!r}; {_hint(first, list(known))}")
    preset = known[first]
    for each in overlays:
        if each not in OVERLAYS:
            raise UsageError(f"no overlay {each!r}; {_hint(each, list(OVERLAYS))}")
        preset = preset.with_overlay(OVERLAYS[each])
    return preset


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
