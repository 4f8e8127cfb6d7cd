"""The measured loops of a benchmark: streams for bandwidth, ping-pongs and single operations for latency."""

from __future__ import annotations

import os
import time
from collections import deque

import numpy as np

from nopin.errors import PeerError
from nopin.lab.bench_end import BenchEnd, succeeded
from nopin.nic.abi import SendFlags, WrOpcode
from nopin.verbs.cq import CompletionQueue
from nopin.verbs.qp import QueuePair
from nopin.verbs.wr import RecvWr, SendWr, Sge, Wc

OPCODES = {
    "write": WrOpcode.RDMA_WRITE,
    "read": WrOpcode.RDMA_READ,
    "send": WrOpcode.SEND,
    "atomic": WrOpcode.ATOMIC_FETCH_AND_ADD,
}
STALL_S = 20.0
"""A ping-pong or stream that does not move for this long is reported, not waited for."""
SIGNAL_EVERY = 16
"""In a ping-pong, where the answer says all and completions are only there to free the queue."""
LOOKS_PER_CLOCK = 1024
POLL_BATCH = 64


class Work:
    """Send work requests of one kind and size from one end to its partner's buffer."""

    def __init__(self, end: BenchEnd, opcode: WrOpcode, size: int, remote_address: int, rkey: int) -> None:
        self._local = (Sge(end.source_address, size, end.region.lkey),)
        self._opcode = opcode
        self._remote_address = remote_address
        self._rkey = rkey

    def one(self, *, signaled: bool) -> SendWr:
        """Return one work request."""
        return SendWr(
            self._opcode,
            self._local,
            flags=SendFlags.SIGNALED if signaled else SendFlags.NONE,
            remote_address=self._remote_address,
            rkey=self._rkey,
            compare_add=1,
        )

    def post_batch(self, queue_pair: QueuePair, n: int) -> None:
        """Post n work requests, the last one signaled."""
        flags = np.zeros(n, np.uint8)
        flags[-1] = SendFlags.SIGNALED
        (sge,) = self._local
        queue_pair.post_send_array(
            n,
            opcode=self._opcode,
            local_address=sge.address,
            length=sge.length,
            lkey=sge.lkey,
            remote_address=self._remote_address,
            rkey=self._rkey,
            flags=flags,
        )


def stream(end: BenchEnd, work: Work, n_messages: int, tx_depth: int) -> float:
    """Send n messages on every queue pair, keeping tx_depth of them under way; return seconds.

    A completion is asked for once in a quarter of the depth, as perftest's cq_mod does.
    """
    n_batch = max(1, min(tx_depth // 4, n_messages))
    left = {queue_pair.qpn: n_messages for queue_pair in end.queue_pairs}
    under_way: dict[int, deque[int]] = {queue_pair.qpn: deque() for queue_pair in end.queue_pairs}
    start = time.perf_counter()
    while True:
        for queue_pair in end.queue_pairs:
            batches = under_way[queue_pair.qpn]
            while left[queue_pair.qpn] and sum(batches) + n_batch <= tx_depth:
                n = min(n_batch, left[queue_pair.qpn])
                work.post_batch(queue_pair, n)
                left[queue_pair.qpn] -= n
                batches.append(n)
        if not any(under_way.values()):
            return time.perf_counter() - start
        for completion in _completions(end.send_cq):
            under_way[completion.qp_num].popleft()


class Receiver:
    """The receiving side of SEND tests: keeps receive queues filled and counts what comes."""

    def __init__(self, end: BenchEnd, size: int, rx_depth: int) -> None:
        self._end = end
        self._queue_pairs = {queue_pair.qpn: queue_pair for queue_pair in end.queue_pairs}
        self._entry = RecvWr((Sge(end.target_address, size, end.region.lkey),))
        self._rx_depth = rx_depth
        self._to_post: dict[int, int] = {}

    def begin(self, n_messages: int) -> None:
        """Post what a round of n messages on every queue pair can use at first."""
        for qpn, queue_pair in self._queue_pairs.items():
            n_first = min(self._rx_depth, n_messages)
            queue_pair.post_recv([self._entry] * n_first)
            self._to_post[qpn] = n_messages - n_first

    def take(self) -> int:
        """Wait for messages, post entries for others to come, return how many came."""
        completions = _completions(self._end.recv_cq)
        for qpn, queue_pair in self._queue_pairs.items():
            n_came = sum(completion.qp_num == qpn for completion in completions)
            if n := min(n_came, self._to_post[qpn]):
                queue_pair.post_recv([self._entry] * n)
                self._to_post[qpn] -= n
        return len(completions)

    def take_all(self, n_messages: int) -> None:
        """Take a round of n messages on every queue pair."""
        n_left = n_messages * len(self._queue_pairs)
        while n_left:
            n_left -= self.take()


def one_by_one(end: BenchEnd, work: Work, n_messages: int) -> list[float]:
    """Post an operation, wait for its completion, n times; return nanoseconds of each."""
    (queue_pair,) = end.queue_pairs
    request = work.one(signaled=True)
    clock, samples = time.perf_counter_ns, []
    for _ in range(n_messages):
        before = clock()
        queue_pair.post_send(request)
        if not succeeded(end.send_cq.wait(1, STALL_S)):
            raise PeerError(f"no completion within {STALL_S:g} s")
        samples.append(float(clock() - before))
    return samples


class WritePingPong:
    """WRITEs to and fro; each end watches the last byte of its own buffer, as perftest does.

    The byte is the message's number modulo 256, so that an old message is never taken for a new one.
    """

    def __init__(self, end: BenchEnd, work: Work, size: int) -> None:
        self._end = end
        self._work = work
        self._seen = end.memory[size - 1 : size].data
        self._sent = end.memory[end.size_bytes_max + size - 1 : end.size_bytes_max + size].data
        self._n_sent = 0
        self._seen[0] = 0

    def send(self) -> None:
        """Write the next message into the partner's buffer."""
        self._n_sent += 1
        self._sent[0] = self._n_sent & 0xFF
        _send_one(self._end, self._work, self._n_sent)

    def take(self, number: int) -> None:
        """Wait until message `number`, counted from 1, has arrived."""
        awaited = number & 0xFF
        deadline = time.monotonic() + STALL_S
        while self._seen[0] != awaited:
            for _ in range(LOOKS_PER_CLOCK):
                if self._seen[0] == awaited:
                    return
                os.sched_yield()
            if time.monotonic() > deadline:
                raise PeerError(f"the partner's message {number} did not arrive within {STALL_S:g} s")


class SendPingPong:
    """SENDs to and fro; each end waits for its receive completions."""

    def __init__(self, end: BenchEnd, work: Work, size: int, n_messages: int) -> None:
        self._end = end
        self._work = work
        self._n_sent = 0
        self._receiver = Receiver(end, size, end.rx_depth)
        self._receiver.begin(n_messages)

    def send(self) -> None:
        """Send the next message."""
        self._n_sent += 1
        _send_one(self._end, self._work, self._n_sent)

    def take(self, number: int) -> None:
        """Wait for the next message; they come in order, so it is message `number`."""
        self._receiver.take()


PingPong = WritePingPong | SendPingPong


def lead(game: PingPong, n_messages: int) -> list[float]:
    """Send first, n times; return half of each round trip in nanoseconds."""
    clock, samples = time.perf_counter_ns, []
    for number in range(1, n_messages + 1):
        before = clock()
        game.send()
        game.take(number)
        samples.append((clock() - before) / 2)
    return samples


def follow(game: PingPong, n_messages: int) -> None:
    """Answer n messages."""
    for number in range(1, n_messages + 1):
        game.take(number)
        game.send()


def _send_one(end: BenchEnd, work: Work, number: int) -> None:
    """Post one message of a ping-pong, and now and then free what earlier ones left in the queue."""
    (queue_pair,) = end.queue_pairs
    queue_pair.post_send(work.one(signaled=number % SIGNAL_EVERY == 0))
    if number % SIGNAL_EVERY == SIGNAL_EVERY // 2:
        succeeded(end.send_cq.poll())


def _completions(queue: CompletionQueue) -> list[Wc]:
    """Wait for a completion and take those that came with it."""
    completions = succeeded(queue.wait(1, STALL_S))
    if not completions:
        raise PeerError(f"no completion within {STALL_S:g} s")
    return completions + succeeded(queue.poll(POLL_BATCH))
