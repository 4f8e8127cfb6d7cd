"""V4: more memory promised than there is: virtual machines, caches that change size, a storage target.

Pinned memory must be there for everybody all the time; pageable memory only for what is used. So the questions are how
many start, how far a shared pool follows a working set that moves, and what a buffer costs that is mostly unused.

(a) runs virtual machines on shared CPUs. (b) is a fluid: shares of an item set that are cached, in steps of a tenth of
a second. (c) and (d) follow from what is resident.
"""

from __future__ import annotations

from dataclasses import dataclass

from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.model.effects import Procedure, Work
from nopin.model.pool import Pool
from nopin.model.scheduler import Scheduler
from nopin.units import MS_NS, S_NS

_MB = 1_000_000
_GIB = 1 << 30
_POLICIES = ("pinned", "npf")


def _run(settings: Settings) -> list[Row]:
    return _static(settings) + _dynamic(settings) + _storage(settings) + _footprint(settings)


# (a) Virtual machines


@dataclass(frozen=True)
class Machines:
    """Virtual machines on one host; a point of (a)."""

    n_machines: int
    n_cpus: int
    serve_ns: int
    host_ns: int
    rtt_ns: int
    n_connections: int


def requests_per_s(machines: Machines) -> float:
    """Run all machines for a while; returns their requests a second, together."""
    scheduler, cpus = Scheduler(), Pool(machines.n_cpus)
    served = [0]
    until_ns = 20 * MS_NS

    def request(busy: Pool) -> Procedure[None]:
        while scheduler.now_ns < until_ns:
            yield Work("round trip", machines.rtt_ns)
            yield from busy.take()  # one thread serves in each machine
            yield from cpus.serve("serve", machines.serve_ns)
            yield from busy.give()
            served[0] += 1
            yield from cpus.serve("host", machines.host_ns)

    for machine in range(machines.n_machines):
        thread = Pool(1)
        for at in range(machines.n_connections):
            scheduler.spawn(f"request {machine}.{at}", request(thread))
    scheduler.run(until_ns=until_ns)
    return served[0] * S_NS / until_ns


def _static(settings: Settings) -> list[Row]:
    costs, rows = settings.costs, []
    points = [
        Machines(
            n,
            costs.n_cpus,
            settings.integer("serve_ns"),
            settings.integer("host_ns"),
            settings.integer("rtt_ns"),
            settings.integer("connections"),
        )
        for n in (1, 2, 3, 4)
    ]
    rates = settings.map(requests_per_s, points)
    free_bytes = costs.host_memory_bytes - settings.integer("host_bytes")
    for policy, per_machine in zip(_POLICIES, (3 * _GIB, settings.integer("working_set_bytes")), strict=True):
        for point, rate in zip(points, rates, strict=True):
            starts = point.n_machines * per_machine <= free_bytes
            rows.append(Row(f"a: {policy}, {point.n_machines} machines start", "", int(starts)))
            if starts:
                label = f"a: {policy}, {point.n_machines} machines, transactions, of one machine's"
                rows.append(Row(label, "", rate / rates[0]))
    return rows


# (b) Caches


@dataclass
class _Cache:
    """An LRU cache of items that are asked for evenly.

    Attributes:
        items_bytes: of all items asked for. cached_bytes: of those there. stale_bytes: cached, not asked for any more.
    """

    items_bytes: float
    cached_bytes: float
    limit_bytes: float
    stale_bytes: float = 0.0

    @property
    def hit_ratio(self) -> float:
        return min(1.0, self.cached_bytes / self.items_bytes)


def _dynamic(settings: Settings) -> list[Row]:
    item_bytes, step_s, shift_s, end_s = settings["item_bytes"], 0.1, 50, 250
    hit_s, miss_s = settings["hit_ns"] / S_NS, settings["serve_ns"] / S_NS
    set_share = settings["set_permille"] / 1000
    rows = []
    for policy in _POLICIES:
        limit = settings["pool_bytes"] * (0.5 if policy == "pinned" else 1.0)
        sizes = [100.0 * _MB, 900.0 * _MB]
        caches = [_Cache(size, min(size, limit), limit) for size in sizes]
        for step in range(round(end_s / step_s)):
            at_s = step * step_s
            if step == round(shift_s / step_s):
                _shift(caches, [900.0 * _MB, 100.0 * _MB])
            hits = []
            for cache, other in zip(caches, reversed(caches), strict=True):
                ratio = cache.hit_ratio
                rate = 1 / (set_share * hit_s + (1 - set_share) * (ratio * hit_s + (1 - ratio) * miss_s))
                hits.append(rate * (1 - set_share) * ratio)
                wanted = rate * set_share * (1 - ratio) * item_bytes * step_s  # sets of what is not there
                _grow(cache, other, wanted, settings, step_s, shared=policy == "npf")
            if at_s in (25, 60, 70, 80, 100, 150, 200):
                rows += [Row(f"b: {policy}, instance {n + 1} at {at_s:.0f} s", "hits/s", hits[n]) for n in (0, 1)]
                rows.append(Row(f"b: {policy}, sum at {at_s:.0f} s", "hits/s", sum(hits)))
    return rows


def _shift(caches: list[_Cache], sizes: list[float]) -> None:
    """The item sets change; of a smaller one all that is asked for was cached, or its share was."""
    for cache, size in zip(caches, sizes, strict=True):
        kept = size * cache.hit_ratio if size < cache.items_bytes else cache.cached_bytes
        cache.stale_bytes += cache.cached_bytes - kept
        cache.items_bytes, cache.cached_bytes = size, kept


def _grow(cache: _Cache, other: _Cache, wanted: float, settings: Settings, step_s: float, *, shared: bool) -> None:
    """Cache more, in place of what is stale here, of free memory, or (shared) of what is stale in the other."""
    wanted = min(wanted, cache.items_bytes - cache.cached_bytes)
    own = min(wanted, cache.limit_bytes - cache.cached_bytes)
    if not shared:
        cache.cached_bytes += own
        cache.stale_bytes = min(cache.stale_bytes, cache.limit_bytes - cache.cached_bytes)
        return
    used = cache.cached_bytes + cache.stale_bytes + other.cached_bytes + other.stale_bytes
    free = max(0.0, settings["pool_bytes"] - used)
    reclaimed = min(max(0.0, own - free), other.stale_bytes, settings["swap_out_bytes_per_s"] * step_s)
    other.stale_bytes -= reclaimed
    cache.cached_bytes += min(own, free + reclaimed)


# (c), (d) A storage target


def _storage(settings: Settings) -> list[Row]:
    block_bytes, rows = settings["block_bytes"], []
    disk_s = settings.costs.disk_ns / S_NS + block_bytes / settings["disk_bytes_per_s"]
    hit_s = _hit_s(settings, block_bytes)
    resident = {"pinned": float(_GIB), "npf": settings["queue_depth"] * block_bytes}
    for policy in _POLICIES:
        for half_gib in range(8, 17):
            memory = half_gib * _GIB / 2
            cache = memory - settings["target_base_bytes"] - resident[policy]
            rows.append(Row(f"c: {policy}, {half_gib / 2:g} GB, starts", "", int(cache > 0)))
            if cache > 0:
                ratio = min(1.0, cache / (4 * _GIB))
                bandwidth = block_bytes / (ratio * hit_s + (1 - ratio) * disk_s)
                rows.append(Row(f"c: {policy}, {half_gib / 2:g} GB, bandwidth", "MB/s", bandwidth / _MB))
    return rows


def _hit_s(settings: Settings, block_bytes: float) -> float:
    """Return the time of a block that is cached: copied to the buffer and sent, one after the other."""
    return block_bytes / settings.costs.memcpy_bytes_per_s + block_bytes * 8 / settings["iser_bits_per_s"]


def _footprint(settings: Settings) -> list[Row]:
    rows = []
    chunk, depth = 512 << 10, settings["queue_depth"]
    n_chunks = _GIB // chunk
    for policy in _POLICIES:
        for block_kib in (64, 512):
            for n_sessions in (0, 1, 10, 20, 40, 60, 80):
                chunks = min(n_chunks, n_sessions * depth)
                buffer = _GIB if policy == "pinned" else chunks * min(chunk, block_kib << 10)
                label = f"d: {policy}, {block_kib} KB, {n_sessions} sessions"
                rows.append(Row(label, "MB", (settings["target_process_bytes"] + buffer) / _MB))
    return rows


EXPERIMENT = Experiment(
    name="V4",
    title="memory overcommit: virtual machines, caches, a storage target",
    machine="connectx3",
    source="NPF sec 6.1, Table 5, Figs 7 and 8 [P]",
    run=_run,
    parameters={
        "host_bytes": Parameter(0.5 * _GIB, "B", "X", "host and hypervisor"),
        "working_set_bytes": Parameter(1.8 * _GIB, "B", "P", "below 2 GB each"),
        "serve_ns": Parameter(5_000, "ns", "X", "a request, as in V3"),
        "host_ns": Parameter(500, "ns", "X", "the host's work for it, on any CPU"),
        "rtt_ns": Parameter(40_000, "ns", "X", "as in V3"),
        "connections": Parameter(16, "", "C", "memaslap's default concurrency"),
        "pool_bytes": Parameter(1_000 * _MB, "B", "P", "both instances together"),
        "item_bytes": Parameter(20_000, "B", "P", "20 KB items"),
        "hit_ns": Parameter(19_000, "ns", "X", "a request and 14 packets of a microsecond"),
        "set_permille": Parameter(100, "", "P", "memaslap 90 % get, 10 % set; a miss is not followed by a set"),
        "swap_out_bytes_per_s": Parameter(100 * _MB, "B/s", "X", "a hard disk in order"),
        "block_bytes": Parameter(512 << 10, "B", "P", "random reads of 512 KB"),
        "disk_bytes_per_s": Parameter(120 * _MB, "B/s", "X", "a hard disk in order"),
        "iser_bits_per_s": Parameter(47.8e9, "", "D", "line rate of connectib56, on which (c) and (d) ran"),
        "target_base_bytes": Parameter(1.0 * _GIB, "B", "X", "system and target without the buffer"),
        "target_process_bytes": Parameter(50 * _MB, "B", "X", "the target without the buffer"),
        "queue_depth": Parameter(16, "", "X", "transactions of a session under way"),
    },
    missing="contention for caches and memory bandwidth between machines; slab classes of memcached; "
    "readahead of the disk",
)
