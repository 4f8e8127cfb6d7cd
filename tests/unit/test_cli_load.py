"""What `nopin top` makes of two looks at a server's figures, without a server."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from nopin.cli import histogram, stat
from nopin.cli.load import FAULT_KINDS, compare
from nopin.cli.top import N_REGIONS, report
from nopin.units import format_bytes, format_ns

FAULTS = {f"faults_{kind}": 0 for kind in FAULT_KINDS}


def arena(number: int = 1, latency: dict[str, list[int]] | None = None, **counts: int) -> dict[str, Any]:
    row = {"kind": "arena", "arena": number, "name": "table", "pid": 47, "comm": "python", "capacity": 1 << 30}
    row |= {"budget": 1 << 20, "resident": 1 << 19, "swapped_bytes": 4096, "refaults": 0, "evicted": 0}
    row |= {"swap_read_bytes": 0, "swap_written_bytes": 0, **FAULTS, "latency_ns": latency or {}}
    return row | counts


def region(number: int, n_faults: int, n_invalidations: int = 0) -> dict[str, Any]:
    row = {"kind": "mr", "mrn": number, "pid": 47, "comm": "python", "mrlen": 4096}
    return row | {"page_faults": n_faults, "page_invalidations": n_invalidations}


def test_rates_are_what_came_between_the_looks_and_what_is_new_counts_whole() -> None:
    before = [arena(1, faults_zero=100, evicted=50)]
    load = compare(before, [arena(1, faults_zero=120, evicted=80), arena(2, faults_swap=10)], 2.0)
    first, second = load.arenas
    assert first.faults_per_s == dict.fromkeys(FAULT_KINDS, 0.0) | {"zero": 10.0}
    assert first.evictions_per_s == 15
    assert second.faults_per_s["swap"] == 5
    assert load.total("faults_per_s") == 15
    assert load.total("resident_bytes") == 1 << 20


def test_the_hottest_region_comes_first() -> None:
    before = [region(1, 1000), region(2, 0), region(3, 0, 0)]
    load = compare(before, [region(1, 1000), region(2, 7), region(3, 0, 5)], 1.0)
    assert [each.mrn for each in load.regions] == [2, 3, 1]


def test_latencies_of_all_kinds_and_arenas_are_added_up() -> None:
    before = [arena(1, {"missing": [0, 0, 0, 1]})]
    after = [arena(1, {"missing": [0, 0, 0, 3], "minor": [0, 0, 0, 0, 4]}), arena(2, {"protect": [0, 0, 5]})]
    load = compare(before, after, 1.0)
    assert load.fault_latency == {4: 5, 8: 2, 16: 4}
    assert load.fault_latency_ever == {4: 5, 8: 3, 16: 4}


def test_an_idle_server_without_arenas_has_a_load_of_nothing() -> None:
    load = compare([], [{"kind": "client", "pid": 1}], 1.0)
    assert (load.n_clients, load.arenas, load.fault_latency_ever) == (1, [], {})
    assert load.total("faults_per_s") == 0


def shown(load: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report(load, 4711))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_shows_each_bucket_between_the_first_and_the_last() -> None:
    text = shown(compare([], [arena(1, {"missing": [0] * 12 + [40, 0, 1]})], 1.0))
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("< ")]
    assert [(line[1:3], line[3], line[-1]) for line in lines] == [
        (["4.1", "us"], "40", "40"),
        (["8.19", "us"], "0", "0"),
        (["16.4", "us"], "1", "1"),
    ]
    assert lines[0][4] == "█" * 40
    assert lines[2][4] == "█"


def test_the_report_names_no_more_than_the_hottest_regions() -> None:
    text = shown(compare([], [region(number, number) for number in range(100, 130)], 1.0))
    assert text.count(" mr ") + text.count("\nmr ") == N_REGIONS
    assert "mr 129" in text


@pytest.mark.parametrize(
    ("counts", "share", "bound"), [([], 0.5, None), ([0, 3, 1], 0.5, 2), ([0, 3, 1], 0.99, 4), ([0, 0, 0, 1], 0.5, 8)]
)
def test_a_quantile_is_the_bound_that_so_many_stay_below(counts: list[int], share: float, bound: int | None) -> None:
    assert histogram.quantile_ns(counts, share) == bound


@pytest.mark.parametrize(("ns", "text"), [(512, "512 ns"), (8192, "8.19 us"), (2e6, "2 ms"), (3e9, "3 s")])
def test_a_duration_has_a_unit_that_suits_it(ns: float, text: str) -> None:
    assert format_ns(ns) == text


@pytest.mark.parametrize("n_bytes", [1000, 1010 << 10, (1 << 20) - 1, 1023 << 20, 1 << 30, 1001 << 40])
def test_no_size_and_no_duration_has_an_exponent(n_bytes: int) -> None:
    assert "e" not in format_bytes(n_bytes) + format_ns(n_bytes)


def test_stat_says_of_latencies_the_median_and_the_99th_percentile() -> None:
    line = stat.line_of({"kind": "arena", "arena": 1, "latency_ns": {"missing": [0, 0, 0, 9], "minor": []}, "lost": 0})
    assert line == "arena arena 1 missing_p50_ns 8 missing_p99_ns 8 lost 0"
