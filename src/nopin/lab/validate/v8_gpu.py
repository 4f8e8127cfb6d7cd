"""Faults of a GPU whose driver migrates pages: in batches, with and without the tree that brings more than was asked.

The GPU runs until it lacks pages of as many blocks as it works on; the driver takes what lies in the fault buffer for
one batch, brings it, and has the GPU go on. So the two take turns, each a task of the scheduler.

A batch has faults of several blocks of 2 MiB. With prefetch a fault brings its 64 KiB, and in the binary tree over the
block each subtree of which more than half is there, or comes with this batch, is brought whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from random import Random

from nopin.model.costs import Costs
from nopin.model.effects import Gate, Open, Pause, Procedure, Work
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.units import PAGE_BYTES


@dataclass(frozen=True)
class Sgemm:
    """A matrix product that fits; a point of the experiment.

    Attributes:
        blocks_per_batch, faults_per_block: without prefetch, in thousandths, as measured.
        first_use_ns: of a block: DMA mappings and reverse map; prefetch does not save it.
    """

    costs: Costs
    prefetch: bool
    n_rows: int
    blocks_per_batch_permille: int
    faults_per_block_permille: int
    first_use_ns: int
    seed: int

    @property
    def n_blocks(self) -> int:
        """Blocks of the three matrices of 4-byte elements."""
        return -(-3 * self.n_rows * self.n_rows * 4 // self.costs.gpu_block_bytes)


@dataclass
class Batches:
    """What came of it."""

    n_batches: int
    n_faults: int
    mean_us: float
    total_ms: float


class _Gpu:
    """A GPU that multiplies matrices, and the driver that serves it."""

    def __init__(self, sgemm: Sgemm) -> None:
        costs = sgemm.costs
        self.came = Batches(0, 0, 0.0, 0.0)
        self._sgemm = sgemm
        self._random = Streams(sgemm.seed)["faults"]
        self._n_leaves = costs.gpu_block_bytes // costs.gpu_upgrade_bytes
        self._leaf_pages = costs.gpu_upgrade_bytes // PAGE_BYTES
        self._fresh = deque(range(sgemm.n_blocks))
        self._active: dict[int, list[set[int]]] = {}  # pages that are there, by leaf
        self._buffer: list[int] = []  # blocks with faults
        self._faulted, self._replayed = Gate(), Gate()
        self._is_done = False

    def works(self) -> Procedure[None]:
        """Touch blocks, so many at a time, until each has been there in full."""
        while self._fresh or self._active:
            n_wanted = _draw(self._random, self._sgemm.blocks_per_batch_permille)
            while self._fresh and len(self._active) < n_wanted:
                self._active[self._fresh.popleft()] = [set() for _ in range(self._n_leaves)]
            self._buffer = sorted(self._active)[: max(1, n_wanted)]
            self._replayed = Gate()
            yield Open(self._faulted)
            yield Pause(self._replayed)
        self._is_done = True
        yield Open(self._faulted)

    def serves(self) -> Procedure[None]:
        """Be the driver: take what is in the buffer for a batch, bring it, and replay the faults."""
        costs, came = self._sgemm.costs, self.came
        kib_ns = costs.gpu_batch_kib_ns if self._sgemm.prefetch else costs.gpu_batch_kib_scattered_ns
        while True:
            yield Pause(self._faulted)
            if self._is_done:
                return
            self._faulted, batch_bytes = Gate(), 0
            for block in self._buffer:
                leaves = self._active[block]
                if not any(leaves):
                    yield Work("first use", self._sgemm.first_use_ns)
                n, n_bytes = _serve(self._sgemm, self._random, leaves, self._leaf_pages)
                came.n_faults, batch_bytes = came.n_faults + n, batch_bytes + n_bytes
                if all(len(leaf) == self._leaf_pages for leaf in leaves):
                    del self._active[block]
            came.n_batches += 1
            yield Work("batch", costs.gpu_batch_ns)
            yield Work("move", batch_bytes * kib_ns // 1024)  # whole leaves, or pages
            yield Open(self._replayed)


def run_sgemm(sgemm: Sgemm) -> Batches:
    """Run until all blocks have been there."""
    scheduler = Scheduler()
    gpu = _Gpu(sgemm)
    scheduler.spawn("driver", gpu.serves())
    scheduler.spawn("gpu", gpu.works())
    scheduler.run()
    came, took_ns = gpu.came, scheduler.now_ns
    return Batches(came.n_batches, came.n_faults, took_ns / came.n_batches / 1_000, took_ns / 1e6)


def _draw(random: Random, permille: int) -> int:
    """Draw a whole number with a mean in thousandths."""
    whole, part = divmod(permille, 1000)
    return whole + (random.randrange(1000) < part)


def _serve(sgemm: Sgemm, random: Random, leaves: list[set[int]], leaf_pages: int) -> tuple[int, int]:
    """Bring what a batch asks of a block; returns faults and bytes.

    A tile of a matrix has a piece of each of several rows, so its faults lie a row apart; what is there already is not
    asked for, but the next page that is missing.
    """
    n_before = sum(map(len, leaves))
    missing = [
        at * leaf_pages + page for at, leaf in enumerate(leaves) for page in range(leaf_pages) if page not in leaf
    ]
    n = min(len(missing), max(1, _draw(random, sgemm.faults_per_block_permille)))
    n_pages, row_pages = len(leaves) * leaf_pages, max(1, sgemm.n_rows * 4 // PAGE_BYTES)
    first = random.choice(missing)
    for step in range(n):
        page = (first + step * row_pages) % n_pages
        page = missing.pop(bisect_left(missing, page) % len(missing))
        if sgemm.prefetch:
            leaves[page // leaf_pages].update(range(leaf_pages))
        else:
            leaves[page // leaf_pages].add(page % leaf_pages)
    if sgemm.prefetch:
        _complete_subtrees(leaves, leaf_pages, sgemm.costs.gpu_prefetch_percent)
    return n, (sum(map(len, leaves)) - n_before) * PAGE_BYTES


def _complete_subtrees(leaves: list[set[int]], leaf_pages: int, percent: int) -> None:
    """Bring the rest of each subtree that is mostly there, from the leaves up."""
    size = 2
    while size <= len(leaves):
        for start in range(0, len(leaves), size):
            part = leaves[start : start + size]
            if sum(map(len, part)) * 100 >= percent * size * leaf_pages:
                for leaf in part:
                    leaf.update(range(leaf_pages))
        size *= 2
