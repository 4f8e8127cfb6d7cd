"""Which bytes of an arena belong to which array: a pure allocator, that touches no memory and asks nobody.

Blocks of up to 16 KiB come from *slabs*, 128 KiB of equal blocks, so that hundreds of thousands of small arrays cost
neither a mapping nor a message each. Larger ones are whole pages, from a best-fit map of free page runs.

Free pages are of two kinds, kept apart because a page that was never used reads as zeros and takes no memory:

    zero    never used, or discarded since: what `zeros` wants
    used    freed with something in it, and probably resident: what `empty` wants

Used pages are only made zero by telling the pager, in batches that the owner asks for (`take_used`, then `discarded`
once the pager has done it). Runs of one kind coalesce; a request that fits only across kinds fits after a discard.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from nopin.errors import UsageError
from nopin.units import PAGE_BYTES, PAGE_SHIFT

ALIGN_BYTES = 64
"""A cache line; NumPy itself promises 16."""
SMALL_BYTES_MAX = 16384
SLAB_PAGES = 32
_SLAB_BYTES = SLAB_PAGES * PAGE_BYTES


def _size_classes() -> list[int]:
    """Multiples of 64, then eight to each doubling: at most an eighth of a block beyond 512 bytes is wasted."""
    sizes = list(range(ALIGN_BYTES, 512 + 1, ALIGN_BYTES))
    while sizes[-1] < SMALL_BYTES_MAX:
        step = max(ALIGN_BYTES, 1 << (sizes[-1].bit_length() - 4))
        sizes.append(sizes[-1] + step)
    return sizes


SIZES = _size_classes()


class Block(NamedTuple):
    """Bytes given out.

    Attributes:
        offset: of the first byte from the start of the arena, a multiple of 64.
        zero: all bytes read as zeros already.
    """

    offset: int
    zero: bool


class Run(NamedTuple):
    """Consecutive pages, numbered from the start of the arena."""

    first: int
    n: int


class FreeRuns:
    """Free page runs of one kind, coalesced; best fit, the lowest first among equals."""

    def __init__(self) -> None:
        self.n_pages = 0
        self._by_place: list[Run] = []
        self._by_size: list[tuple[int, int]] = []

    def add(self, first: int, n: int) -> None:
        """Put pages in, merged with their neighbours."""
        assert n > 0
        self.n_pages += n
        at = bisect_left(self._by_place, (first,))
        end = first + n
        if at < len(self._by_place) and self._by_place[at].first <= end:
            after = self._remove(at)
            assert after.first == end, "pages were freed twice"
            n += after.n
        if at and sum(self._by_place[at - 1]) >= first:
            before = self._remove(at - 1)
            assert sum(before) == first, "pages were freed twice"
            first, n = before.first, before.n + n
        self._insert(Run(first, n))

    def take(self, n: int) -> int | None:
        """Take pages out; returns the first, or None if no run is long enough."""
        at = bisect_left(self._by_size, (n,))
        if at == len(self._by_size):
            return None
        n_found, first = self._by_size[at]
        self._remove(bisect_left(self._by_place, (first,)))
        if n_found > n:
            self._insert(Run(first + n, n_found - n))
        self.n_pages -= n
        return first

    def take_all(self) -> list[Run]:
        """Take everything out, in order."""
        runs, self._by_place = self._by_place, []
        self._by_size.clear()
        self.n_pages = 0
        return runs

    def _insert(self, run: Run) -> None:
        insort(self._by_place, run)
        insort(self._by_size, (run.n, run.first))

    def _remove(self, at: int) -> Run:
        run = self._by_place.pop(at)
        del self._by_size[bisect_left(self._by_size, (run.n, run.first))]
        return run


class Slab:
    """Pages cut into equal blocks.

    Attributes:
        fresh_from: number of the first block that was never given out.
        freed: numbers of blocks given back, the latest last.
        live: one byte a block, 1 while it is given out.
        zero: the pages were zero when the slab was made, so that blocks never given out still are.
    """

    __slots__ = ("block_bytes", "first", "freed", "fresh_from", "live", "n_live", "zero")

    def __init__(self, first: int, block_bytes: int, *, zero: bool) -> None:
        self.first = first
        self.block_bytes = block_bytes
        self.zero = zero
        self.fresh_from = 0
        self.freed: list[int] = []
        self.live = bytearray(_SLAB_BYTES // block_bytes)
        self.n_live = 0

    @property
    def full(self) -> bool:
        """True if it has no block to give."""
        return self.n_live == len(self.live)

    def take(self, *, zero: bool) -> Block:
        """Give out a block, if possible one of zeros if that is wanted, else one that was used lately."""
        has_fresh = self.fresh_from < len(self.live)
        is_fresh = has_fresh and (not self.freed or (zero and self.zero))
        if is_fresh:
            index = self.fresh_from
            self.fresh_from += 1
        else:
            index = self.freed.pop()
        self.live[index] = 1
        self.n_live += 1
        return Block((self.first << PAGE_SHIFT) + index * self.block_bytes, is_fresh and self.zero)

    def give(self, offset: int) -> None:
        """Take a block back.

        Raises:
            UsageError: no block that is given out begins there.
        """
        index, odd = divmod(offset - (self.first << PAGE_SHIFT), self.block_bytes)
        if odd or not self.live[index]:
            raise _no_block(offset)
        self.live[index] = 0
        self.n_live -= 1
        self.freed.append(index)


class Allocator:
    """Gives out the bytes of an arena. One thread at a time.

    Args:
        n_pages: pages of 4096 bytes, all of them zero.
    """

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.n_blocks = 0
        self._zero = FreeRuns()
        self._used = FreeRuns()
        self._zero.add(0, n_pages)
        self._large: dict[int, int] = {}
        """Pages of a large block, by its first."""
        self._slabs: dict[int, Slab] = {}
        """By each of its pages."""
        self._with_room: dict[int, dict[Slab, None]] = {size: {} for size in SIZES}
        self._empty: dict[int, Slab] = {}
        """One of each size at most, ready for reuse until its pages are needed."""

    @property
    def n_used_free(self) -> int:
        """Free pages that have something in them."""
        return self._used.n_pages

    @property
    def n_zero_free(self) -> int:
        """Free pages that read as zeros."""
        return self._zero.n_pages

    def allocate(self, length: int, *, zero: bool) -> Block | None:
        """Give out bytes.

        Args:
            length: bytes; 0 counts as 1, so that every block has an address of its own.
            zero: the caller wants zeros: prefer bytes that are zero already.

        Returns:
            The block, or None if there is no room; a discard may make some.
        """
        if length <= SMALL_BYTES_MAX:
            block = self._small(SIZES[bisect_left(SIZES, max(1, length))], zero=zero)
        else:
            n = -(-length >> PAGE_SHIFT)
            block = self._pages(n, zero=zero)
            if block is not None:
                self._large[block.offset >> PAGE_SHIFT] = n
        if block is not None:
            self.n_blocks += 1
        return block

    def free(self, offset: int) -> None:
        """Take a block back.

        Raises:
            UsageError: no block that is given out begins there.
        """
        page = offset >> PAGE_SHIFT
        slab = self._slabs.get(page)
        if slab is not None:
            self._free_small(slab, offset)
        else:
            n = self._large.pop(page, 0) if offset == page << PAGE_SHIFT else 0
            if not n:
                raise _no_block(offset)
            self._used.add(page, n)
        self.n_blocks -= 1

    def length_of(self, offset: int) -> int:
        """Return how many bytes a block has room for.

        Raises:
            UsageError: no block that is given out begins there.
        """
        page = offset >> PAGE_SHIFT
        slab = self._slabs.get(page)
        if slab is not None:
            return slab.block_bytes
        if page not in self._large:
            raise _no_block(offset)
        return self._large[page] << PAGE_SHIFT

    def take_used(self) -> list[Run]:
        """Take all used free pages out, for the pager to discard; give each back by `discarded` or `kept`."""
        return self._used.take_all()

    def discarded(self, run: Run) -> None:
        """Pages that were taken out read as zeros now."""
        self._zero.add(*run)

    def kept(self, run: Run) -> None:
        """Pages that were taken out could not be discarded."""
        self._used.add(*run)

    def _pages(self, n: int, *, zero: bool) -> Block | None:
        while True:
            for runs in (self._zero, self._used) if zero else (self._used, self._zero):
                first = runs.take(n)
                if first is not None:
                    return Block(first << PAGE_SHIFT, runs is self._zero)
            if not self._empty:
                return None
            self._dissolve(self._empty.popitem()[1])

    def _small(self, size: int, *, zero: bool) -> Block | None:
        with_room = self._with_room[size]
        slab = next(iter(with_room), None)
        if slab is None:
            pages = self._pages(SLAB_PAGES, zero=zero)
            if pages is None:
                return None
            slab = Slab(pages.offset >> PAGE_SHIFT, size, zero=pages.zero)
            for page in range(slab.first, slab.first + SLAB_PAGES):
                self._slabs[page] = slab
            with_room[slab] = None
        if slab.n_live == 0:
            self._empty.pop(size, None)
        block = slab.take(zero=zero)
        if slab.full:
            del with_room[slab]
        return block

    def _free_small(self, slab: Slab, offset: int) -> None:
        slab.give(offset)
        self._with_room[slab.block_bytes][slab] = None
        if slab.n_live == 0:  # one of each size stays: it is likely to be wanted again
            before = self._empty.pop(slab.block_bytes, None)
            self._empty[slab.block_bytes] = slab
            if before is not None:
                self._dissolve(before)

    def _dissolve(self, slab: Slab) -> None:
        """Make an empty slab free pages again; those it never touched are still zero."""
        assert slab.n_live == 0
        del self._with_room[slab.block_bytes][slab]
        for page in range(slab.first, slab.first + SLAB_PAGES):
            del self._slabs[page]
        n_touched = -(-slab.fresh_from * slab.block_bytes >> PAGE_SHIFT) if slab.zero else SLAB_PAGES
        self._used.add(slab.first, n_touched)
        if n_touched < SLAB_PAGES:
            self._zero.add(slab.first + n_touched, SLAB_PAGES - n_touched)


def _no_block(offset: int) -> UsageError:
    return UsageError(f"no block begins at byte {offset} of the arena: freed twice, or never given out")
