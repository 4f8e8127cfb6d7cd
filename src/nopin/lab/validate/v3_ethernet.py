"""V3: page faults of an Ethernet card's receive ring: dropped, kept in a backup ring, or avoided by pinning.

The stream is in `v3_stream.py`, the cold ring in `v3_cold_ring.py`; this file has the points and the parameters.
"""

from __future__ import annotations

from dataclasses import replace

from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.lab.validate.v3_cold_ring import ColdStart, run_cold_start
from nopin.lab.validate.v3_stream import Stream, throughput
from nopin.units import S_NS

_EXPONENTS = (*range(8, 25, 2),)
_POLICIES = ("drop", "backup", "pin")
_RING_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_AT_S = (1, 5, 10, 20, 30, 60, 90, 120, 180, 240)
N_OPERATIONS = 10_000


def _run(settings: Settings) -> list[Row]:
    return _stream_rows(settings) + _cold_rows(settings)


def _stream_rows(settings: Settings) -> list[Row]:
    points = [
        Stream(
            costs=settings.costs,
            backup=backup,
            major=major,
            exponent=exponent,
            payload_bytes=settings.integer("payload_bytes"),
            window_bytes=settings.integer("window_bytes"),
            rtt_ns=settings.integer("rtt_ns"),
            copy_ns=settings.integer("backup_copy_ns"),
            n_faults=settings.integer("stream_faults"),
            seed=settings.seed,
        )
        for backup in (False, True)
        for major in (False, True)
        for exponent in _EXPONENTS
    ]
    return [
        Row(
            f"a: {'backup' if point.backup else 'drop'}, {'major' if point.major else 'minor'}, 2^-{point.exponent}",
            "Gb/s",
            rate,
        )
        for point, rate in zip(points, settings.map(throughput, points), strict=True)
    ]


def cold_start(settings: Settings, policy: str, n_entries: int) -> ColdStart:
    """Return a point of (b) or (c)."""
    return ColdStart(
        costs=settings.costs,
        policy=policy,
        n_entries=n_entries,
        n_connections=settings.integer("connections"),
        n_backup=settings.integer("backup_ring_entries"),
        rtt_ns=settings.integer("rtt_ns"),
        copy_ns=settings.integer("backup_copy_ns"),
        serve_ns=settings.integer("serve_ns"),
        apart_ns=settings.integer("connect_apart_ns"),
    )


def _cold_rows(settings: Settings) -> list[Row]:
    outcomes = dict(
        zip(
            [(policy, n) for policy in _POLICIES for n in _RING_SIZES],
            settings.map(run_cold_start, [cold_start(settings, p, n) for p in _POLICIES for n in _RING_SIZES]),
            strict=True,
        )
    )
    rows = []
    for policy in _POLICIES:
        outcome = outcomes[policy, 64]
        full = outcome.rate(10**18)
        for at_s in _AT_S:
            share = outcome.rate(at_s * S_NS) / full if at_s * S_NS >= outcome.warm_ns and full else 0.0
            rows.append(Row(f"b: {policy}, throughput at {at_s} s, of steady", "%", 100 * share))
        rows.append(Row(f"b: {policy}, ring warm after", "s", outcome.warm_ns / S_NS))
    alone = {n: replace(cold_start(settings, "drop", n), n_connections=1) for n in (16, 64, 256)}
    for n, outcome in zip(alone, settings.map(run_cold_start, alone.values()), strict=True):
        done_s = outcome.done_ns(N_OPERATIONS) / S_NS
        rows.append(Row(f"c: drop, one connection, ring of {n}, {N_OPERATIONS:,} operations", "s", done_s))
        rows.append(Row(f"c: drop, one connection, ring of {n}, it lives", "", len(outcome.resumes_ns)))
    for policy in _POLICIES:
        for n in _RING_SIZES:
            outcome = outcomes[policy, n]
            alive = len(outcome.resumes_ns)
            if alive:
                done_s = outcome.done_ns(N_OPERATIONS) / S_NS
                rows.append(Row(f"c: {policy}, ring of {n}, {N_OPERATIONS:,} operations", "s", done_s))
            rows.append(Row(f"c: {policy}, ring of {n}, connections that live", "", alive))
    return rows


EXPERIMENT = Experiment(
    name="V3",
    title="Ethernet receive faults: drop, backup ring, pin",
    machine="connectx3",
    source="NPF sec 5 to 6.4, Fig 4 and Fig 10 left [P]",
    run=_run,
    parameters={
        "payload_bytes": Parameter(1_448, "B", "X", "TCP over an MTU of 1,500 with timestamps"),
        "window_bytes": Parameter(65_535, "B", "X", "a user-level stack without window scaling, as lwIP before 2.0"),
        "rtt_ns": Parameter(40_000, "ns", "X", "back to back, interrupts and a user-level stack"),
        "backup_copy_ns": Parameter(1_000, "ns", "X", "1.5 KB copied and the bitmap, after the page has come"),
        "backup_ring_entries": Parameter(256, "", "X", "small and pinned"),
        "stream_faults": Parameter(400, "", "X", "drawn for each point of (a)"),
        "connections": Parameter(16, "", "C", "memaslap's default concurrency"),
        "connect_apart_ns": Parameter(50_000, "ns", "X", "between two connects of the load generator"),
        "serve_ns": Parameter(5_000, "ns", "X", "memcached over a user-level stack; only ratios are predicted"),
    },
    missing="fast retransmit (all that is behind a dropped packet is dropped with it); faults of memcached's own "
    "memory; whether f counts packets (assumed) or messages",
)
