"""Clients of a server whose receive ring has no pages yet: how long until they are served at full speed.

Each connection asks, waits for the answer, and asks again. An entry of the ring faults the first time it is used.

**Drop.** The packet at the head is lost, and so is everything that comes until the page is there. The client's timer
brings it again: 1 s for the first packet of a connection, then twice as long as the last one had to wait. A packet
that was sent twice gives no sample of the round trip (Karn), so the timer stays long; the next packet finds the next
entry and is lost in its turn. That is how 64 faults of a fifth of a millisecond become minutes.

**Backup ring.** Nothing is lost; answers wait for the faults, of which a few are served at a time.

The ring is warm once each entry has been used. From then on nothing is lost any more, and connections that still wait
for their timers come back one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from nopin.model.costs import Costs
from nopin.model.effects import Gate, Lane, Open, Pause, Procedure, Work
from nopin.model.pool import Pool
from nopin.model.scheduler import Scheduler
from nopin.units import S_NS


@dataclass(frozen=True)
class ColdStart:
    """A point of the experiment.

    Attributes:
        policy: drop, backup or pin.
        n_backup: entries of the backup ring.
        copy_ns: out of the backup ring. serve_ns: the server's work on a request.
        apart_ns: between the starts of connections.
    """

    costs: Costs
    policy: str
    n_entries: int
    n_connections: int
    n_backup: int
    rtt_ns: int
    copy_ns: int
    serve_ns: int
    apart_ns: int


@dataclass
class Outcome:
    """What came of a cold start.

    Attributes:
        warm_ns: each entry had been used.
        n_served: requests until then.
        resumes_ns: when each connection that lives goes on from there.
        n_failed: connections that gave up.
    """

    warm_ns: int
    n_served: int
    n_failed: int
    resumes_ns: list[int] = field(default_factory=list)
    costs_ns: tuple[int, int] = (0, 0)

    def rate(self, at_ns: int) -> float:
        """Return requests a second at a time after the ring was warm."""
        serve_ns, rtt_ns = self.costs_ns
        n_active = sum(resume_ns <= at_ns for resume_ns in self.resumes_ns)
        return min(n_active * S_NS / (rtt_ns + serve_ns), S_NS / serve_ns)

    def n_served_until(self, until_ns: int) -> float:
        """Return requests served until a time after the ring was warm."""
        edges = sorted({self.warm_ns, *(at for at in self.resumes_ns if self.warm_ns < at < until_ns), until_ns})
        rates = (self.rate(start) * (end - start) / S_NS for start, end in pairwise(edges))
        return self.n_served + sum(rates)

    def done_ns(self, n_requests: int) -> int:
        """Return when so many requests have been served."""
        low, high = self.warm_ns, self.warm_ns + 1_000_000 * S_NS
        while high - low > 1_000:
            middle = (low + high) // 2
            low, high = (low, middle) if self.n_served_until(middle) >= n_requests else (middle, high)
        return high


class _Ring:
    """The receive ring, and the server that empties it."""

    def __init__(self, start: ColdStart, scheduler: Scheduler) -> None:
        self.start = start
        self.scheduler = scheduler
        self.there = [Gate(is_open=start.policy == "pin") for _ in range(start.n_entries)]
        self.used = [False] * start.n_entries
        self.faulting = [False] * start.n_entries
        self.head = 0
        self.n_used = 0
        self.in_order: deque[tuple[Gate, Callable[[], None]]] = deque()
        self.n_in_backup = 0
        self.servers = Pool(start.costs.outstanding_faults)
        self.processor = Lane("server")

    @property
    def warm(self) -> bool:
        """Every entry has been used."""
        return self.n_used == self.start.n_entries

    def arrive(self, answered: Callable[[], None]) -> bool:
        """A packet comes in: False if it is dropped, else `answered` is called when the server has dealt with it."""
        entry = self.head
        there = self.there[entry].is_open
        if not there and not self.faulting[entry]:
            self.faulting[entry] = True
            self.scheduler.spawn(f"fault {entry}", self._fault(entry))
        if not there:
            if self.start.policy == "drop" or self.n_in_backup >= self.start.n_backup:
                return False
            self.n_in_backup += 1
        if not self.used[entry]:
            self.used[entry] = True
            self.n_used += 1
        shown = Gate(is_open=there)
        self.in_order.append((shown, answered))
        if not there:
            self.scheduler.spawn("copy", self._copy(entry, shown))
        self.head = (entry + 1) % self.start.n_entries
        self._show()
        return True

    def _fault(self, entry: int) -> Procedure[None]:
        yield from self.servers.serve("fault", self.start.costs.fault_service_ns(1))
        yield Open(self.there[entry])

    def _copy(self, entry: int, shown: Gate) -> Procedure[None]:
        yield Pause(self.there[entry])
        yield Work("copy", self.start.copy_ns)
        self.n_in_backup -= 1
        shown.is_open = True
        self._show()

    def _show(self) -> None:
        """Give the server what is next in order."""
        while self.in_order and self.in_order[0][0].is_open:
            _, answered = self.in_order.popleft()
            self.scheduler.spawn("serve", self._serve(answered), lane=self.processor)

    def _serve(self, answered: Callable[[], None]) -> Procedure[None]:
        yield Work("serve", self.start.serve_ns)
        answered()


class _Connection:
    """A client's connection.

    Attributes:
        lost: what it waits for was dropped. retry_ns: when it sends that again.
    """

    def __init__(self, at: int, start: ColdStart, ring: _Ring, scheduler: Scheduler) -> None:
        self.at = at
        self.start = start
        self.ring = ring
        self.scheduler = scheduler
        self.retry_ns = 0
        self.lost = False
        self.failed = False
        self.n_served = 0
        self._rto_ns = start.costs.tcp_first_rto_ns

    def run(self) -> Procedure[None]:
        """Connect, then ask until the ring is warm."""
        costs = self.start.costs
        yield Work("starts", self.at * self.start.apart_ns)
        sampled = yield from self._exchange(costs.tcp_syn_retries)
        if sampled is None:
            self.failed = True
            return
        self._rto_ns = costs.tcp_min_rto_ns if sampled else 3 * costs.tcp_first_rto_ns
        while not self.ring.warm:
            sampled = yield from self._exchange(costs.tcp_data_retries)
            if sampled is None:
                self.failed = True
                return
            self.n_served += 1
            if sampled:
                self._rto_ns = costs.tcp_min_rto_ns

    def _exchange(self, n_retries: int) -> Procedure[bool | None]:
        """Send a packet until it is answered; True if the first one was, None if it gives up."""
        for attempt in range(n_retries + 1):
            answered = Gate()
            timer = self.scheduler.call_at(
                self.scheduler.now_ns + self._rto_ns, "timeout", partial(self.scheduler.open, answered)
            )
            self.retry_ns = self.scheduler.now_ns + self._rto_ns
            came: list[bool] = []

            def answer(gate: Gate = answered, came: list[bool] = came) -> None:
                came.append(True)
                self.scheduler.open(gate)

            yield Work("to the server", self.start.rtt_ns // 2)
            self.lost = not self.ring.arrive(answer)
            yield Pause(answered)
            timer.cancel()
            self.lost = False
            if came:
                yield Work("to the client", self.start.rtt_ns - self.start.rtt_ns // 2)
                return attempt == 0
            self._rto_ns = min(2 * self._rto_ns, self.start.costs.tcp_max_rto_ns)
        return None


def run_cold_start(start: ColdStart) -> Outcome:
    """Run until the ring is warm or all connections have given up."""
    scheduler = Scheduler()
    ring = _Ring(start, scheduler)
    connections = [_Connection(at, start, ring, scheduler) for at in range(start.n_connections)]
    for connection in connections:
        scheduler.spawn(f"connection {connection.at}", connection.run())
    while not ring.warm and scheduler.step():
        pass
    now_ns = scheduler.now_ns
    alive = [connection for connection in connections if not connection.failed]
    return Outcome(
        warm_ns=now_ns,
        n_served=sum(connection.n_served for connection in connections),
        n_failed=len(connections) - len(alive),
        resumes_ns=sorted(connection.retry_ns if connection.lost else now_ns for connection in alive),
        costs_ns=(start.serve_ns, start.rtt_ns),
    )
