"""V8: what fetching ahead is worth: snapshots of virtual machines, and a GPU's memory.

The machines are in `v8_snapshot.py` and `v8_gpu.py`; this file has the points and the parameters.
"""

from __future__ import annotations

from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.lab.validate.v8_gpu import Sgemm, run_sgemm
from nopin.lab.validate.v8_snapshot import VARIANTS, ColdStarts, Ssd, run_starts
from nopin.model.presets import preset_named
from nopin.units import PAGE_BYTES, S_NS

_MB = 1_000_000


def _run(settings: Settings) -> list[Row]:
    return _snapshot_rows(settings) + _gpu_rows(settings) + _single_rows(settings)


def cold_starts(settings: Settings, variant: str, n_starts: int) -> ColdStarts:
    """Return a point of (a) or (b)."""
    names = [
        "n_workers",
        "n_pages",
        "run_pages",
        "leftover_pages",
        "load_ns",
        "run_ns",
        "fault_ns",
        "user_fault_ns",
        "install_call_ns",
        "install_page_ns",
        "readahead_bytes",
        "cached_page_ns",
    ]
    ssd = Ssd(*(settings.integer(name) for name in ("ssd_latency_ns", "ssd_command_ns", "ssd_bytes_per_s")))
    given = {name: settings.integer(name) for name in names}
    return ColdStarts(variant=variant, n_starts=n_starts, ssd=ssd, n_cpus=settings.integer("cpus"), **given)


def _snapshot_rows(settings: Settings) -> list[Row]:
    many = [(variant, n) for variant in ("vanilla", "reap") for n in (4, 16, 64)]
    points = [(variant, 1) for variant in VARIANTS] + many
    splits = settings.map(run_starts, [cold_starts(settings, *point) for point in points])
    rows = []
    for (variant, n), split in zip(points, splits, strict=True):
        if n > 1:
            rows.append(Row(f"b: {variant}, {n} at once, mean start", "ms", split.mean_ns["total"] / 1e6))
            rows.append(Row(f"b: {variant}, {n} at once, SSD", "MB/s", split.bytes_per_s / _MB))
            continue
        for name in ("total", "load", "fetch", "install", "leftover", "run"):
            rows.append(Row(f"a: {variant}, {name}", "ms", split.mean_ns[name] / 1e6))
        rows.append(Row(f"a: {variant}, SSD while fetching", "MB/s", split.bytes_per_s / _MB))
    return rows


def _gpu_rows(settings: Settings) -> list[Row]:
    points = [
        Sgemm(
            costs=settings.costs,
            prefetch=prefetch,
            n_rows=settings.integer("sgemm_rows"),
            blocks_per_batch_permille=settings.integer("blocks_per_batch_permille"),
            faults_per_block_permille=settings.integer("faults_per_block_permille"),
            first_use_ns=settings.integer("block_first_use_ns"),
            seed=settings.seed,
        )
        for prefetch in (False, True)
    ]
    off, on = settings.map(run_sgemm, points)
    rows = []
    for name, came in (("off", off), ("on", on)):
        rows.append(Row(f"c: prefetch {name}, batches", "", came.n_batches))
        rows.append(Row(f"c: prefetch {name}, mean batch", "us", came.mean_us))
        rows.append(Row(f"c: prefetch {name}, all batches", "ms", came.total_ms))
    rows.append(Row("c: batches that prefetch saves", "%", 100 * (1 - on.n_batches / off.n_batches)))
    rows.append(Row("c: time of batches that prefetch saves", "%", 100 * (1 - on.total_ms / off.total_ms)))
    return rows


def _single_rows(settings: Settings) -> list[Row]:
    """One fault at a time against whole regions requested ahead, block by block."""
    costs = preset_named("rtx5080_uvm").costs()
    single = PAGE_BYTES * S_NS / costs.gpu_fault_ns
    block_ns = costs.gpu_block_bytes * S_NS / costs.interconnect_bytes_per_s + settings["block_driver_ns"]
    ahead = costs.gpu_block_bytes * S_NS / block_ns
    return [
        Row("d: one 4 KB fault at a time", "GB/s", single / 1e9),
        Row("d: regions requested ahead", "GB/s", ahead / 1e9),
        Row("d: ratio", "", ahead / single),
    ]


_REAP = "REAP, ASPLOS'21"
_UVM = "SC'21"

EXPERIMENT = Experiment(
    name="V8",
    title="prefetch: snapshot restore and GPU",
    machine="volta_uvm",
    source="REAP, ASPLOS'21 [P]; SC'21 [P]; MSched [S]",
    run=_run,
    parameters={
        "cpus": Parameter(48, "", "P", f"{_REAP}: 2 x E5-2680v3, 48 threads"),
        "ssd_bytes_per_s": Parameter(850 * _MB, "B/s", "P", f"{_REAP}: peak"),
        "ssd_command_ns": Parameter(
            6_560, "ns", "D", "16 reads of 4 KB under way give 360 MB/s: 11.4 each, less bytes"
        ),
        "ssd_latency_ns": Parameter(116_600, "ns", "D", "one 4 KB read at a time gives 32 MB/s: 128, less 11.4"),
        "n_workers": Parameter(16, "", "P", f"{_REAP}: hardware threads that read in parallel"),
        "n_pages": Parameter(2_048, "", "P", f"{_REAP}: about 8 MB touched"),
        "run_pages": Parameter(2, "", "P", f"{_REAP}: touched pages lie in runs of 2 or 3"),
        "leftover_pages": Parameter(61, "", "P", f"{_REAP}: 97 % of touched pages recur"),
        "load_ns": Parameter(50_000_000, "ns", "P", f"{_REAP}: monitor and devices, in all variants"),
        "run_ns": Parameter(1_000_000, "ns", "P", f"{_REAP}: a warm call"),
        "fault_ns": Parameter(2_000, "ns", "X", "exit of the machine and fault of the host's kernel, each page alone"),
        "user_fault_ns": Parameter(10_900, "ns", "P", "bpf_fault draft, as in V7"),
        "install_call_ns": Parameter(1_000, "ns", "X", "UFFDIO_COPY"),
        "install_page_ns": Parameter(1_000, "ns", "X", "a page of it: allocated, copied, mapped"),
        "readahead_bytes": Parameter(128 << 10, "B", "C", "Linux: read_ahead_kb 128"),
        "cached_page_ns": Parameter(600, "ns", "X", "allocate a page of the page cache and copy it out"),
        "sgemm_rows": Parameter(8_192, "", "X", "three matrices of 256 MiB: they fit"),
        "blocks_per_batch_permille": Parameter(7_000, "", "P", f"{_UVM}: sgemm, prefetch off"),
        "faults_per_block_permille": Parameter(9_800, "", "P", f"{_UVM}: sgemm, prefetch off"),
        "block_first_use_ns": Parameter(100_000, "ns", "X", "DMA mappings and reverse map of 512 pages"),
        "block_driver_ns": Parameter(10_000, "ns", "X", "driver's work on a block of 2 MiB that is requested ahead"),
    },
    missing="readahead of mapped files in vanilla; eviction and duplicate faults of the GPU",
)
