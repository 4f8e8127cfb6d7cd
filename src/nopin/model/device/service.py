"""What a device's page fault takes, stage by stage, and what an invalidation takes.

A fault is not one cost. It is a report from the device, work of its driver, an update of the device's table, and a
resume; they queue on different things, and that is what makes faults batch and crowd each other:

    a context of the device     few for each direction; held from report to resume, so a device that has as many faults
                                open as it has contexts reports no more
    the driver's worker         serves requests one at a time, or as many as it has threads

A device reports all pages of a request at once, or so many at a time, one report after the other, as one does that
notices the next absent page only when it gets there.

The whole stands before the check whether what was learned is stale (`Mirror.fill`): if pages are invalidated while the
device is being told of them, it has to fault again.

Sources: NPF, ASPLOS'17, section 4, for stages, contexts and batching; costs and the shape of the tail in
`model/costs.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log2
from random import Random

from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.model.costs import FaultCosts, InvalidationCosts
from nopin.model.device.engine import QuiesceTime
from nopin.model.device.faults import Resolve
from nopin.model.effects import Procedure, Work
from nopin.model.pool import Pool
from nopin.model.scheduler import Scheduler

TAIL_QUANTILES = (0.0, 0.5, 0.95, 0.99, 1.0)

_MANY_PAGES = 1024
"""The other number of pages that the tail was measured with."""

Tail = Sequence[float]
"""Factors of the median service time at `TAIL_QUANTILES`; linear in between, but for the last stretch."""

_BEND = 3
"""The last hundredth grows with this power, to reach the largest time ever seen only at its end: an assumption."""


class FaultService:
    """Carries the faults of one device; implements `FaultPath`.

    Args:
        random: where the tail is drawn from; None: every fault takes the mean.
        n_workers: requests the driver serves at a time.

    Attributes:
        stage_ns: time spent in each stage, queueing for it included, summed.
        total_ns: of each request, from the moment the device has it to the resume.
    """

    def __init__(
        self, scheduler: Scheduler, costs: FaultCosts, *, random: Random | None = None, n_workers: int = 1
    ) -> None:
        self._scheduler = scheduler
        self._costs = costs
        self._random = random
        self._workers = Pool(n_workers)
        self._contexts = {write: Pool(costs.outstanding_faults) for write in (False, True)}
        self.stage_ns: Counter[str] = Counter()
        self.total_ns: list[int] = []

    def serve(self, pages: PageRun, write: bool, resolve: Resolve) -> Procedure[FaultPages]:
        """See `FaultPath`."""
        n_each = self._costs.pages_per_fault_request or pages.n
        done = 0
        while done < pages.n:
            request = PageRun(pages.first + done, min(n_each, pages.n - done))
            came = yield from self._serve(request, write, resolve)
            done += came.n_done
            if came.n_done < request.n:
                return FaultPages(done, came.reason)
        return FaultPages(done)

    def _serve(self, request: PageRun, write: bool, resolve: Resolve) -> Procedure[FaultPages]:
        costs, n, started_ns = self._costs, request.n, self._scheduler.now_ns
        factor = self._draw(n)
        context = self._contexts[write]
        yield from context.take()
        yield from self._stage("report", round(costs.fault_report_ns(n) * factor))
        queued_ns = self._scheduler.now_ns
        yield from self._workers.take()
        yield Work("driver", round(costs.fault_driver_ns(n) * factor))
        came = yield from resolve(request, write)
        yield from self._workers.give()
        self.stage_ns["driver"] += self._scheduler.now_ns - queued_ns
        yield from self._stage("table", round(costs.fault_table_ns(n) * factor))
        yield from self._stage("resume", round(costs.nic_resume_ns * factor))
        yield from context.give()
        self.total_ns.append(self._scheduler.now_ns - started_ns)
        return came

    def _stage(self, name: str, cost_ns: int) -> Procedure[None]:
        yield Work(name, cost_ns)
        self.stage_ns[name] += cost_ns

    def _draw(self, n_pages: int) -> float:
        """Draw what a request takes, relative to the mean."""
        if self._random is None:
            return 1.0
        tail = tail_of(self._costs, n_pages)
        return quantile(tail, self._random.random()) / mean_of(tail)


def tail_of(costs: FaultCosts, n_pages: int) -> Tail:
    """Return the tail of requests of n pages: between those measured, by the logarithm."""
    share = min(1.0, log2(n_pages) / log2(_MANY_PAGES))
    few = (
        costs.fault_tail_min_permille,
        1000,
        costs.fault_tail_p95_permille,
        costs.fault_tail_p99_permille,
        costs.fault_tail_max_permille,
    )
    many = (
        costs.fault_tail_many_min_permille,
        1000,
        costs.fault_tail_many_p95_permille,
        costs.fault_tail_many_p99_permille,
        costs.fault_tail_many_max_permille,
    )
    return [(one + (other - one) * share) / 1000 for one, other in zip(few, many, strict=True)]


def quantile(tail: Tail, at: float) -> float:
    """Return a quantile of a tail, 0 <= at <= 1."""
    upper = max(1, bisect_left(TAIL_QUANTILES, at))
    low, high = TAIL_QUANTILES[upper - 1], TAIL_QUANTILES[upper]
    share = (at - low) / (high - low)
    if high == 1.0:
        share **= _BEND
    return tail[upper - 1] + (tail[upper] - tail[upper - 1]) * share


def mean_of(tail: Tail) -> float:
    """Return the mean of a tail."""
    spans = zip(pairwise(TAIL_QUANTILES), pairwise(tail), strict=True)
    *straight, ((low, high), (before, after)) = spans
    mean = sum((high - low) * (before + after) / 2 for (low, high), (before, after) in straight)
    return mean + (high - low) * (before + (after - before) / (_BEND + 1))


def invalidation_time(costs: InvalidationCosts, random: Random) -> QuiesceTime:
    """Return what invalidations take a device of these costs; its time to quiesce is drawn."""

    def quiesce_ns(n_entries: int, cause: Cause) -> int:
        del cause
        base_ns = costs.invalidate_ns(n_entries, mapped=n_entries > 0)
        if not n_entries or not costs.device_quiesce_max_ns:
            return base_ns
        return base_ns + random.randrange(costs.device_quiesce_min_ns, costs.device_quiesce_max_ns + 1)

    return quiesce_ns
