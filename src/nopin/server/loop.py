"""The event loop: one thread that does everything but wait for slow pages.

One turn, top to bottom: work just posted, which is what clients wait for; what arrived on descriptors (early, because
a client whose mapping changes waits until we read), packets, new work in rings, deadlines, packets out, page requests,
notices and events to clients. Page requests come after everything that can raise one, so none is left lying when the
loop sleeps.

Between turns it decides whether to sleep. Posting costs a client no system call while the server is awake:
the server says in the state page when it sleeps, and the client rings only then. Both sides write first, then
fence, then read what the other wrote; so at least one of them sees the other, and no post is missed:

    client: write entry, write index, fence, read "sleeping"    -> ring if it sleeps
    server: write "sleeping", fence, read every index           -> work instead of sleeping if there is any
"""

from __future__ import annotations

import os

from nopin.control.spin import SpinBudget
from nopin.linux.cpus import move_over
from nopin.linux.fence import fence
from nopin.server import events
from nopin.server.core import Core
from nopin.server.elbow_room import ElbowRoom
from nopin.server.objects import ClientCq, ClientQp
from nopin.units import MS_NS, S_NS, US_NS

BURST_NS = 100 * US_NS
"""How long to stay awake after packets: a long message comes as a burst, and a receiver that dozes off between its
parts makes the sender wake it for each, which costs the sender more than the sending."""


LEAVE_AFTER_NS = 20 * MS_NS
"""How often rings are left in which nothing was posted since the last time; see `nic/attention.py`."""


class Loop:
    """Runs until `stop`.

    Args:
        spin_ns: the longest it looks for work before it sleeps; it never spins without clients.
        elbow_room: decides when to go to another CPU.
    """

    def __init__(self, core: Core, spin_ns: int, elbow_room: ElbowRoom) -> None:
        self._core = core
        self._elbow_room = elbow_room
        self._spin = SpinBudget(spin_ns)
        self._stopping = False
        self._packets_wait = False
        self._in_burst = False
        self._woken = False
        self._posts_are_direct = False
        self._leave_at = 0
        for fd in core.link.filenos():
            core.poller.watch(fd, self._on_packets)
        core.poller.watch(core.workers.fd, self._on_fault_results)

    def stop(self) -> None:
        """Make `run` return after the present turn."""
        self._stopping = True

    def run(self) -> None:
        """Turn, spin a little, sleep; again."""
        clock = self._core.clock
        spin_until = 0
        while not self._stopping:
            now = clock()
            if self._turn(now):
                spin_ns = max(self._spin.budget_ns, BURST_NS if self._in_burst else 0)
                spin_until = clock() + spin_ns if self._core.sessions else 0
            elif now >= spin_until:
                self._sleep()
            else:
                self._yield()

    def _turn(self, now: int) -> bool:
        """Do what there is to do now; tell whether there was anything.

        Most turns only look. So each part is asked first whether it has anything: that is half of an idle turn.
        """
        core, nic = self._core, self._core.nic
        worked = self._serve_posts(now)
        self._in_burst = False
        worked |= self._woken or core.poller.poll(0) > 0  # what woke us has been served
        self._woken = False
        worked |= self._receive(now)
        worked |= nic.poll_rings(now)
        self._meet_deadlines(now)
        if nic.busy:
            self._transmit(now)
        if core.iommu.stirs:
            worked |= self._page_requests(now)
        if nic.has_news:
            self._tell_clients()
        if core.arenas.busy:
            core.arenas.turn()
            self._posts_are_direct = False
            return True
        return worked or nic.busy

    def _serve_posts(self, now: int) -> bool:
        """Carry out what was posted since the last look, before anything else; tell whether there was any.

        Not in the midst of a stream: there, packets in and out take turns.
        """
        nic = self._core.nic
        if nic.busy or self._in_burst or not nic.poll_rings(now):
            return False
        self._posts_are_direct = True
        self._transmit(now)
        return True

    def _yield(self) -> None:
        """Offer the CPU: on a small machine the work we look for may need it to come about.

        Who is in our way is known where clients post and we alone carry out. Where packets go out, it may as well be
        the peer's server, which changes CPUs, too; and two that make room for each other find none.
        """
        if not self._posts_are_direct:
            os.sched_yield()
            return
        clock = self._core.clock
        before = clock()
        os.sched_yield()
        if self._elbow_room.yielded(before, clock()):
            move_over()

    def _receive(self, now: int) -> bool:
        """Take what arrived; tell whether there was reason to look."""
        core = self._core
        due = core.link.next_deadline()
        if not self._packets_wait and (due is None or due > now):
            return False
        self._packets_wait = False
        for batch in core.link.receive(now):
            core.nic.receive(batch, now)
        self._in_burst = True
        return True

    def _meet_deadlines(self, now: int) -> None:
        core = self._core
        if core.nic.is_due(now):
            core.nic.on_deadline(now)
        core.timers.run(now)
        if now >= self._leave_at:  # no deadline: nobody is to wake up for this
            self._leave_at = now + LEAVE_AFTER_NS
            core.nic.leave_idle(fence)

    def _page_requests(self, now: int) -> bool:
        """Hand new requests to the workers and to pagers, and resume whose pages have come; True if there was one.

        Resumed work may park again, so the next turn must come before any sleep.
        """
        core = self._core
        for request in core.iommu.take_requests():
            space = core.iommu.space(request.pasid)
            if space is not None:  # otherwise it was unbound meanwhile, and its waiters are awake
                core.workers.submit(request, space)
        core.iommu.run_faults()
        woken = core.iommu.take_wakeups()
        core.nic.resume(woken, now)
        return bool(woken)

    def _transmit(self, now: int) -> None:
        core = self._core
        for batch in core.nic.transmit(now):
            core.link.send(batch, now)
            self._posts_are_direct = False

    def _tell_clients(self) -> None:
        nic = self._core.nic
        for cq in nic.take_notices():
            if isinstance(cq.owner, ClientCq) and cq.owner.channel is not None:
                cq.owner.channel.kick()
        events.deliver(nic.take_events())
        for target in nic.take_corrupt():
            if isinstance(target.owner, ClientCq | ClientQp):
                target.owner.session.misbehaved("it wrote nonsense into a ring")

    def _sleep(self) -> None:
        """Sleep until a descriptor is ready or a deadline has come, unless work was posted meanwhile."""
        core = self._core
        core.state_page.set_sleeping(True)
        fence()
        began = core.clock()
        if not core.nic.poll_rings(began) and not core.nic.busy:
            self._woken = core.poller.poll(self._timeout_s(began)) > 0
            self._spin.waited(core.clock() - began)
        core.state_page.set_sleeping(False)

    def _timeout_s(self, now: int) -> float:
        core = self._core
        deadlines = (core.nic.next_deadline(), core.link.next_deadline(), core.timers.next_deadline())
        soonest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return -1 if soonest is None else max(0, soonest - now) / S_NS

    def _on_packets(self, _mask: int) -> None:
        self._packets_wait = True

    def _on_fault_results(self, _mask: int) -> None:
        core = self._core
        for request, result in core.workers.collect():
            core.iommu.respond(request, result)
