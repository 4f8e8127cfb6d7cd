"""Mutants of the NIC, its page requests, and who waits for them. See `nic/` and `iommu/page_requests.py`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from nopin.iommu.access import PARKED
from nopin.iommu.page_requests import PageRequest, PageRequests
from nopin.iommu.tickets import Tickets
from nopin.model.explore.mutants import Patch, mutant
from nopin.nic import answers, completer, inbound, requester, responder, whole_writes
from nopin.nic.abi import WcStatus
from nopin.nic.core import Core, fail, send_done
from nopin.nic.mr import RegionTable
from nopin.nic.nic import Nic
from nopin.nic.qp import QueuePair, ReadStream
from nopin.nic.refusal import Parked, no_access
from nopin.nic.wire.psn import psn_add

PLAIN = "write_vs_store_of_theirs"


# Page requests


@mutant(PLAIN)
def a_parked_requester_is_forgotten(patch: Patch) -> None:
    """Whoever waits for pages is resumed when they have come. (A parked peer would be saved by its RNR NAK.)"""
    original = Nic.resume

    def resume(device: Nic, waiters: Iterable[Hashable], now: int) -> None:
        original(device, [waiter for waiter in waiters if not (isinstance(waiter, tuple) and waiter[1] == "send")], now)

    patch.setattr(Nic, "resume", resume)


@mutant("two_writes_at_once", "read_vs_discard_of_theirs")
def answered_requests_keep_their_place(patch: Patch) -> None:
    """An answered request gives its place in the queue to one that waits for it."""

    def remove(requests: PageRequests, request: PageRequest, peers: list[PageRequest]) -> None:
        peers.remove(request)
        if not peers:
            del requests._outstanding[request.pasid]

    patch.setattr(PageRequests, "_remove", remove)


@mutant("read_and_write_at_once")
def who_found_no_room_is_forgotten(patch: Patch) -> None:
    """What finds no room is remembered, and asked for when there is."""
    patch.setattr(PageRequests, "_refill", lambda requests: None)


@mutant("write_vs_munmap_of_theirs", "write_vs_exit_of_theirs")
def bad_memory_is_asked_for_again_for_ever(patch: Patch) -> None:
    """A waiter remembers which page cannot be had, and its access ends there instead of asking again."""
    patch.setattr(Tickets, "is_bad", lambda tickets, waiter, arena, page: False)


# Transport


@mutant(PLAIN, "long_write_vs_discard")
def requests_are_acknowledged_before_their_bytes_are_there(patch: Patch) -> None:
    """The sequence moves over a packet when its bytes are where they belong, not while it parks."""
    copy, lone = inbound._copy, whole_writes.lone_write

    def careless(device: Core, qp: QueuePair, *args: Any) -> None:
        try:
            copy(device, qp, *args)
        except Parked:
            device.iommu.forget(qp.responder_waiter)

    def careless_one(device: Core, qp: QueuePair, packet: Any) -> bool:
        try:
            return lone(device, qp, packet)
        except Parked:
            device.iommu.forget(qp.responder_waiter)
            qp.recv.epsn = psn_add(qp.recv.epsn, 1)
            qp.recv.ack_due = True
            return True

    patch.setattr(inbound, "_copy", careless)
    patch.setattr(responder, "lone_write", careless_one)


@mutant(PLAIN)
def work_is_done_when_it_is_sent(patch: Patch) -> None:
    """A WRITE is done when the peer has acknowledged it, not when its packets are out."""
    build = requester.build

    def eager(device: Core, qp: QueuePair, now: int) -> Any:
        batch = build(device, qp, now)
        if batch is not None:
            completer._progress(device, qp, qp.send.sent, now)
        return batch

    patch.setattr(requester, "build", eager)


@mutant("two_adds_at_once", n_faults=1)
def an_atomic_is_executed_for_each_copy_that_comes(patch: Patch) -> None:
    """A duplicate of an atomic is answered with the result there was, and not executed again."""
    duplicate = responder._duplicate

    def again(device: Core, qp: QueuePair, packet: Any) -> None:
        side = qp.recv
        expected, side.epsn = side.epsn, packet.psn
        try:
            if packet.opcode in responder._WITHOUT_DATA:
                responder._execute_without_data(device, qp, packet)
            else:
                duplicate(device, qp, packet)
        finally:
            side.epsn = expected

    patch.setattr(responder, "_duplicate", again)


@mutant("write_vs_store_of_theirs", n_faults=1)
def nothing_is_sent_again(patch: Patch) -> None:
    """What is not acknowledged in time is sent again."""

    def stays(device: Core, qp: QueuePair, now: int) -> None:
        qp.send.retries_left -= 1
        qp.send.deadline = None
        if qp.send.retries_left < 0:
            completer.finish_with_error(device, qp, WcStatus.RETRY_EXC_ERR)
        else:
            requester.restart_timer(qp, now)

    patch.setattr(completer, "_retry", stays)


@mutant("write_vs_munmap_of_theirs", "write_vs_exit_of_theirs")
def refusals_are_not_told(patch: Patch) -> None:
    """A request that is refused is answered with a NAK."""
    original = responder.refuse

    def silent(device: Core, qp: QueuePair, refusal: Any) -> None:
        original(device, qp, refusal)
        qp.recv.replies.clear()

    patch.setattr(responder, "refuse", silent)


@mutant("read_vs_munmap_of_theirs", "read_vs_exit_of_theirs")
def what_cannot_be_read_is_sent_as_it_lies(patch: Patch) -> None:
    """A READ of bytes that cannot be had ends with a NAK, never with whatever lay in the buffer."""
    read = answers._read

    def careless(device: Core, qp: QueuePair, stream: ReadStream, length: int, at: int) -> int:
        done = read(device, qp, stream, length, at)
        return done if done == PARKED else length

    patch.setattr(answers, "_read", careless)


@mutant("write_vs_dereg_of_theirs", "read_vs_dereg_of_theirs")
def regions_outlive_their_deregistration(patch: Patch) -> None:
    """When a region has been deregistered nothing reaches memory through it."""
    patch.setattr(RegionTable, "deregister", lambda table, region: None)


@mutant("read_vs_dereg_of_theirs", "long_write_vs_dereg")
def parked_work_does_not_look_at_its_region_again(patch: Patch) -> None:
    """Work that was parked looks again whether its region is still there."""
    patch.setattr(RegionTable, "deregister", lambda table, region: table._by_key.pop(region.rkey, None))


@mutant("read_vs_munmap_of_ours", "read_vs_exit_of_ours")
def an_answer_that_cannot_be_placed_counts_as_done(patch: Patch) -> None:
    """A READ whose bytes cannot be put where they belong fails."""

    def fine(device: Core, qp: QueuePair) -> None:
        send_done(device, qp, qp.send.unroll().popleft(), WcStatus.SUCCESS)
        fail(device, qp)

    patch.setattr(completer, "_local_error", fine)


@mutant("write_vs_store_of_theirs")
def faults_are_refused(patch: Patch) -> None:
    """A page that is out makes a request wait; it is no reason to refuse it."""
    original = responder._stop

    def stop(core: Core, qp: QueuePair, reason: Exception, now: int) -> bool:
        return original(core, qp, no_access() if isinstance(reason, Parked) else reason, now)

    patch.setattr(responder, "_stop", stop)


@mutant("read_without_retries_vs_munmap")
def a_dead_queue_pair_keeps_its_timer(patch: Patch) -> None:
    """A queue pair that has failed waits for nothing: its timer would be due for ever."""
    resume = completer.resume

    def restarts(device: Core, qp: QueuePair, now: int) -> None:
        parked = qp.send.parked
        resume(device, qp, now)
        if parked == "scatter":
            requester.restart_timer(qp, now)

    patch.setattr(completer, "resume", restarts)
