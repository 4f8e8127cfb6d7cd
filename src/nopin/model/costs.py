"""What things cost on a machine: every parameter by name, with where its figure comes from.

A modelled machine spends time as a real one does: in stages that queue on different resources (a device's firmware, a
driver's worker, a link, a peer's timer). So a fault is never one constant here but the chain of its stages, and how
faults batch and crowd each other comes out of the model instead of going into it.

All fields are flat and have names that can be said on a command line (``--set pin_page_ns=300``). Units last: ``_ns``
are integer nanoseconds, ``_permille`` thousandths. Laws over several fields are methods.

Each field carries the kind of its evidence and its source, which `fields_of` lists. Kinds: P read in the primary paper,
A its abstract, S second-hand, C source code or a data file, L measured on a small virtual machine, D arithmetic on
tagged figures, X an assumption. The values of a particular machine are in `model/presets.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nopin.errors import UsageError
from nopin.units import MS_NS, PAGE_BYTES, S_NS, parse_bytes


def cost(default: int, tag: str, source: str, meaning: str = "") -> int:
    """Make a field: its default, the kind of evidence, where it comes from, and what it means if its name does not."""
    made: int = field(default=default, metadata={"tag": tag, "source": source, "meaning": meaning})
    return made


@dataclass(frozen=True, kw_only=True)
class FaultCosts:
    """A device's page fault, stage by stage, and a CPU's."""

    nic_fault_report_ns: int = cost(129_100, "P", "NPF Fig 3a", "device notices until the driver runs, first page")
    nic_fault_report_page_ns: int = cost(24, "D", "NPF Fig 3a, slope", "each further page of the request")
    driver_fault_ns: int = cost(5_400, "P", "NPF Fig 3a", "the driver asks for the pages, first page")
    driver_fault_page_ns: int = cost(98, "D", "NPF Fig 3a, slope", "each further page of the request")
    pt_update_ns: int = cost(6_800, "P", "NPF Fig 3a", "the device's table is written, first page")
    pt_update_page_ns: int = cost(13, "D", "NPF Fig 3a, slope", "each further page of the request")
    nic_resume_ns: int = cost(78_100, "P", "NPF Fig 3a", "the device sees its table and starts again")
    fault_tail_min_permille: int = cost(888, "D", "NPF Fig 3a over Table 4", "so that mean and median are as published")
    fault_tail_p95_permille: int = cost(1_160, "D", "NPF Table 4", "of the median service time, one page")
    fault_tail_p99_permille: int = cost(1_210, "D", "NPF Table 4", "of the median service time, one page")
    fault_tail_max_permille: int = cost(2_160, "D", "NPF Table 4", "of the median service time, one page")
    fault_tail_many_min_permille: int = cost(793, "D", "NPF Fig 3a over Table 4", "the same of 1,024 pages")
    fault_tail_many_p95_permille: int = cost(1_220, "D", "NPF Table 4", "the same of 1,024 pages")
    fault_tail_many_p99_permille: int = cost(1_250, "D", "NPF Table 4", "the same of 1,024 pages")
    fault_tail_many_max_permille: int = cost(1_950, "D", "NPF Table 4", "the same of 1,024 pages")
    pages_per_fault_request: int = cost(0, "P", "NPF sec 4", "0: all pages of the work request in one report")
    outstanding_faults: int = cost(4, "P", "NPF sec 4", "a channel; repeats of an open one are swallowed")
    iopf_service_ns: int = cost(700_000, "P", "VIO, OSDI'25", "mean I/O page fault of a cloud's device")
    iopf_snoop_hit_ns: int = cost(3_500, "P", "VIO, OSDI'25")
    iopf_snoop_miss_ns: int = cost(4_500, "P", "VIO, OSDI'25")
    cpu_minor_fault_read_ns: int = cost(800, "P", "bpf_fault draft")
    cpu_minor_fault_write_ns: int = cost(2_000, "X", "estimate beside the read of the bpf_fault draft")
    uffd_round_trip_ns: int = cost(10_900, "P", "bpf_fault draft", "a missing page by write, answered by a handler")
    wake_same_cpu_ns: int = cost(3_700, "L", "numbers of a virtual machine", "sleep and wake, on one CPU")
    wake_other_cpu_ns: int = cost(45_000, "L", "numbers of a virtual machine", "the same between two CPUs")

    def fault_report_ns(self, n_pages: int) -> int:
        """Return how long the report of a request of n pages takes."""
        return self.nic_fault_report_ns + (n_pages - 1) * self.nic_fault_report_page_ns

    def fault_driver_ns(self, n_pages: int) -> int:
        """Return how long the driver takes for it."""
        return self.driver_fault_ns + (n_pages - 1) * self.driver_fault_page_ns

    def fault_table_ns(self, n_pages: int) -> int:
        """Return how long the update of the device's table takes."""
        return self.pt_update_ns + (n_pages - 1) * self.pt_update_page_ns

    def fault_service_ns(self, n_pages: int) -> int:
        """Return the whole of a fault nobody else stands in the way of, minor, without protocol recovery."""
        stages = self.fault_report_ns(n_pages) + self.fault_driver_ns(n_pages) + self.fault_table_ns(n_pages)
        return stages + self.nic_resume_ns


@dataclass(frozen=True, kw_only=True)
class InvalidationCosts:
    """Taking translations away: from a NIC, an IOMMU, a GPU, other CPUs."""

    invalidate_checks_ns: int = cost(2_700, "P", "NPF Fig 3b", "all there is for pages the device never mapped")
    invalidate_checks_page_ns: int = cost(1, "D", "NPF Fig 3b, slope")
    invalidate_table_ns: int = cost(13_700, "P", "NPF Fig 3b", "the device's table, its quiescing included")
    invalidate_table_page_ns: int = cost(31, "D", "NPF Fig 3b, slope")
    invalidate_bookkeeping_ns: int = cost(400, "P", "NPF Fig 3b")
    invalidate_bookkeeping_page_ns: int = cost(11, "D", "NPF Fig 3b, slope")
    device_quiesce_min_ns: int = cost(0, "P", "NPF Fig 3b", "beyond invalidate_table_ns, until reads have drained")
    device_quiesce_max_ns: int = cost(0, "P", "NPF Fig 3b", "drawn uniformly from the minimum to here")
    iommu_map_ns: int = cost(1_490, "P", "rIOMMU Table 1", "strict mode, whole")
    iommu_unmap_ns: int = cost(970, "P", "rIOMMU Table 1", "strict mode, whole")
    iommu_map_deferred_ns: int = cost(230, "P", "rIOMMU Table 1")
    iommu_unmap_deferred_ns: int = cost(400, "P", "rIOMMU Table 1")
    iommu_flush_batch: int = cost(250, "P", "rIOMMU Table 1", "unmaps of deferred mode between two flushes")
    iotlb_invalidate_ns: int = cost(690, "P", "rIOMMU Table 1")
    iotlb_table_part_ns: int = cost(140, "P", "rIOMMU Table 1")
    iotlb_miss_ns: int = cost(500, "P", "rIOMMU sec 5.3")
    gpu_shootdown_ns: int = cost(4_200, "S", "ISPASS'16", "one entry; they are serialised")
    gpu_shootdown_all_ns: int = cost(4_400, "S", "ISPASS'16", "all entries")
    cpu_shootdown_ns: int = cost(2_600, "P", "EuroSys'20 Fig 5", "one page, to a CPU of the same socket, PTI on")
    cpu_shootdown_far_ns: int = cost(3_600, "P", "EuroSys'20 Fig 5", "to another socket")
    cpu_shootdown_page_ns: int = cost(511, "D", "EuroSys'20 Figs 5 and 6, slope", "each further page")

    def invalidate_ns(self, n_pages: int, *, mapped: bool = True) -> int:
        """Return how long an invalidation of n pages takes the driver."""
        if not mapped:
            return self.invalidate_checks_ns
        first = self.invalidate_checks_ns + self.invalidate_table_ns + self.invalidate_bookkeeping_ns
        more = self.invalidate_checks_page_ns + self.invalidate_table_page_ns + self.invalidate_bookkeeping_page_ns
        return first + (n_pages - 1) * more


@dataclass(frozen=True, kw_only=True)
class MemoryCosts:
    """Pinning, copying, media, and the links between."""

    host_memory_bytes: int = cost(128 << 30, "P", "NPF sec 6")
    n_cpus: int = cost(24, "P", "NPF sec 6")
    pcie_rtt_ns: int = cost(550, "S", "pcie-bench notes", "a DMA read of 64 bytes")
    pin_ns: int = cost(16_000, "C", "UCX defaults", "registering, before its pages")
    pin_page_ns: int = cost(250, "C", "UCX defaults")
    pin_cache_hit_ns: int = cost(90, "C", "UCX defaults")
    major_fault_ns: int = cost(82_000, "C", "umap data file", "read 4 KiB of NVMe at queue depth 1; adds to a fault")
    medium_page_deep_ns: int = cost(1_400, "C", "umap data file", "each page at queue depth 256")
    disk_ns: int = cost(8 * MS_NS, "X", "a hard disk's seek and half a turn")
    swap_ram_out_ns: int = cost(4_300, "L", "swap to compressed RAM", "a page")
    swap_ram_in_ns: int = cost(4_900, "L", "swap to compressed RAM", "a page")
    cow_copy_ns: int = cost(1_500, "S", "LKML quotation")
    cow_reuse_ns: int = cost(420, "S", "LKML quotation")
    memcpy_bytes_per_s: int = cost(20_000_000_000, "L", "numbers of a virtual machine")
    link_bits_per_s: int = cost(56_000_000_000, "P", "NPF sec 6", "signalled")
    line_rate_bits_per_s: int = cost(47_800_000_000, "D", "NPF Fig 10", "payload of a stream without faults")
    send_32b_ns: int = cost(820, "S", "thesis table, card unnamed", "one way")
    send_1k_ns: int = cost(1_550, "S", "thesis table, card unnamed")
    send_4k_ns: int = cost(2_260, "S", "thesis table, card unnamed")
    send_32k_ns: int = cost(4_570, "S", "thesis table, card unnamed")

    def pin_range_ns(self, n_bytes: int) -> int:
        """Return how long it takes to pin and register a range whose pages are resident."""
        return self.pin_ns + -(-n_bytes // PAGE_BYTES) * self.pin_page_ns

    def copy_ns(self, n_bytes: int) -> int:
        """Return how long a CPU takes to copy so many bytes."""
        return n_bytes * S_NS // self.memcpy_bytes_per_s

    def wire_ns(self, n_bytes: int) -> int:
        """Return how long so many payload bytes keep the link busy."""
        return n_bytes * 8 * S_NS // self.line_rate_bits_per_s


@dataclass(frozen=True, kw_only=True)
class TimerCosts:
    """What protocols wait for when something goes wrong."""

    rnr_wait_permille: int = cost(3_300, "S", "ConnectX-6 notes", "of the nominal time of the RNR code")
    rnr_floor_ns: int = cost(0, "X", "free until calibrated", "a wait is never shorter")
    ack_floor_exponent: int = cost(16, "S", "ConnectX-6 notes", "of the ACK timeout 4.096 us x 2^T; 0: no floor")
    ack_interval_factor: int = cost(2, "S", "ConnectX-6 notes", "of 4.096 us x 2^T")
    ack_first_min_permille: int = cost(1_800, "D", "ConnectX-6 notes", "first timeout, of the interval, at least")
    ack_first_max_permille: int = cost(2_000, "D", "ConnectX-6 notes", "at most")
    ack_timeouts_less: int = cost(2, "S", "ConnectX-6 notes", "than retry_cnt + 1, until a request fails")
    ack_timeouts_more: int = cost(0, "S", "ConnectX-6 notes", "the other way round")
    access_error_nak_ns: int = cost(320_000, "S", "ConnectX-6 notes", "5 of 6 cases")
    flush_first_ns: int = cost(225_000, "S", "ConnectX-6 notes", "of a dead queue pair")
    flush_next_ns: int = cost(9_350, "S", "ConnectX-6 notes")
    tcp_min_rto_ns: int = cost(200 * MS_NS, "C", "Linux headers, TCP_RTO_MIN")
    tcp_first_rto_ns: int = cost(1 * S_NS, "C", "Linux headers, TCP_TIMEOUT_INIT")
    tcp_max_rto_ns: int = cost(120 * S_NS, "C", "Linux headers, TCP_RTO_MAX")
    tcp_syn_retries: int = cost(6, "C", "Linux headers, TCP_SYN_RETRIES")
    tcp_syn_ack_retries: int = cost(5, "C", "Linux headers, TCP_SYNACK_RETRIES")
    tcp_data_retries: int = cost(15, "C", "Linux headers, TCP_RETR2")


@dataclass(frozen=True, kw_only=True)
class AcceleratorCosts:
    """A GPU whose driver migrates, and one that shares the process's tables."""

    gpu_fault_ns: int = cost(31_800, "S", "MSched, RTX 5080", "one, driver-managed, its transfer included")
    gpu_fault_transfer_ns: int = cost(1_350, "S", "MSched, RTX 5080", "the transfer in it")
    gpu_batch_ns: int = cost(50_000, "P", "SC'21 Fig 6, by eye", "a batch, before its bytes")
    gpu_batch_kib_ns: int = cost(700, "P", "SC'21 Fig 6, by eye", "a KiB of it, regular access")
    gpu_batch_kib_scattered_ns: int = cost(1_300, "P", "SC'21 Fig 6, by eye", "a KiB of it, sgemm")
    gpu_batch_faults: int = cost(256, "P", "SC'21; driver [C]", "at most in a batch; more are dropped and come again")
    gpu_block_bytes: int = cost(2 << 20, "P", "SC'21", "blocks are handled separately")
    gpu_upgrade_bytes: int = cost(64 << 10, "P", "SC'21", "a fault of 4 KiB grows to this")
    gpu_utlb_outstanding: int = cost(56, "P", "SC'21", "faults of one uTLB")
    gpu_prefetch_percent: int = cost(51, "S", "half of a subtree", "resident, to have the rest of it brought")
    ppr_idle_ns: int = cost(5_000, "S", "ISPASS'16", "a page request over shared tables")
    ppr_saturated_ns: int = cost(140_000, "S", "ISPASS'16")
    gpu_minor_ns: int = cost(16_000, "S", "arXiv 2508.12743", "mirrored table, no migration")
    gpu_major_ns: int = cost(18_000, "S", "arXiv 2508.12743")
    gpu_minor_pages_per_s: int = cost(9_000_000, "S", "arXiv 2508.12743")
    gpu_major_pages_per_s: int = cost(1_100_000, "S", "arXiv 2508.12743")
    interconnect_bytes_per_s: int = cost(12_300_000_000, "X", "PCIe 3 x16 in practice", "host to device")


@dataclass(frozen=True, kw_only=True)
class Costs(AcceleratorCosts, TimerCosts, MemoryCosts, InvalidationCosts, FaultCosts):
    """All parameters of a machine; listed from the last of these bases to the first."""


class CostField(NamedTuple):
    """What is known of a parameter."""

    name: str
    default: int
    tag: str
    source: str
    meaning: str


def fields_of() -> list[CostField]:
    """Return all parameters, in order of subject."""
    return [
        CostField(
            name=each.name,
            default=int(each.default) if isinstance(each.default, int) else 0,
            tag=each.metadata["tag"],
            source=each.metadata["source"],
            meaning=each.metadata["meaning"],
        )
        for each in dataclasses.fields(Costs)
    ]


NAMES = frozenset(each.name for each in fields_of())


def override(costs: Costs, changes: Mapping[str, int]) -> Costs:
    """Return costs with some parameters changed.

    Raises:
        UsageError: a name that is no parameter, with those that look like it; or a negative value.
    """
    for name, value in changes.items():
        if name not in NAMES:
            raise UsageError(f"{name!r} is no cost parameter; {_alike(name)}")
        if value < 0:
            raise UsageError(f"{name} cannot be negative: {value}")
    return dataclasses.replace(costs, **changes)


def _alike(name: str) -> str:
    """Say which names were perhaps meant."""
    close = difflib.get_close_matches(name, sorted(NAMES), n=3)
    return f"did you mean {', '.join(close)}?" if close else "`nopin model list --machine connectib56` shows all"


_TIME_NS = {"ns": 1, "us": 1_000, "ms": MS_NS, "s": S_NS}


def parse_value(name: str, text: str) -> int:
    """Read the value of a parameter: digits; with ns, us, ms or s for a time; with k, m, g for bytes.

    Raises:
        UsageError: it is none of these.
    """
    number = text.strip().lower().rstrip("nmus")
    suffix = text.strip().lower()[len(number) :]
    try:
        if name.endswith("_ns") and suffix in _TIME_NS:
            return round(float(number) * _TIME_NS[suffix])
        return parse_bytes(text)
    except ValueError:
        forms = "20, 20us, 1.5ms" if name.endswith("_ns") else "20, 64k, 1g"
        raise UsageError(f"{name}={text!r} is not a value; write for example {forms}") from None
