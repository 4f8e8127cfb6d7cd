"""What the pager asks of the machine, as data.

The pager decides and never acts: its procedures are generators that yield these effects and are sent each one's
result. A runner carries them out: the live one with userfaultfd, memfd and a swap file, the modelled one with frames of
its own and a clock of its own. That is why the same pager runs on both, and why a test can stop it between any two
effects.

Every effect concerns one arena: a file of pages (the frames), mapped by *mappers* (the owner's process, its forked
children, accelerator workers) and by the device server itself. Pages are numbered from the arena's first one. A mapper
is named by a small integer; `SERVER` is the server's own mapping, through which devices reach the frames.

Effects that can wait for a medium or for somebody: `ReadSwap`, `WriteSwap`, `Quiesce`, `Pause`, `Backoff`. All others
are carried out before the procedure goes on, with nothing of the pager in between.

Effects, runs of pages and outcomes are structs, because those are made without a call of Python, in a third or fifth of
the time, which shows in the latency of a fault.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from msgspec import Struct

from nopin.mm.space import Bytes

T = TypeVar("T")

Mapper = int
SERVER: Mapper = 0
"""The device server's own mapping of the arena. Nothing but the pager fills it; a touch of a hole there is a bug."""


class PageRun(Struct, frozen=True, gc=False):
    """Consecutive pages of an arena: `n` (at least 1) from page number `first`."""

    first: int
    n: int

    @property
    def end(self) -> int:
        """One past the last page."""
        return self.first + self.n


class Outcome(Struct, frozen=True, gc=False):
    """How far a page operation came.

    Attributes:
        n_done: pages from the start of the run that are done.
        errno: why it ended early, 0 when it did not: EEXIST (already so), ENOMEM, ENOENT (not mapped there),
            ESRCH (the mapper is gone), EFAULT (`MapIn` of a hole), EINTR (`Fill`: a process gave something up
            meanwhile, perhaps one of these pages: look again).
    """

    n_done: int
    errno: int


class Zero(Struct, frozen=True):
    """Make zero pages at holes of the file, map them in `mapper`, wake who waits there. Result: `Outcome`."""

    pages: PageRun
    mapper: Mapper


class Fill(Struct, frozen=True):
    """Make pages at holes of the file from `data`, whole pages at once; map them in `mapper`, wake who waits there.

    Attributes:
        data: n * 4096 bytes.
        protect: map write-protected, so that the first store there is heard. Result: `Outcome`.
    """

    pages: PageRun
    data: bytes | memoryview
    mapper: Mapper
    protect: bool


class MapIn(Struct, frozen=True):
    """Map pages that are in the file into `mapper`, write-protected if `protect`; wake. Result: `Outcome`."""

    pages: PageRun
    mapper: Mapper
    protect: bool


class WriteProtect(Struct, frozen=True):
    """From here on stores to these pages wait, in `mapper` or (None) in every mapper but the server."""

    pages: PageRun
    mapper: Mapper | None = None


class Unprotect(Struct, frozen=True):
    """Allow stores again, markers of absent pages included; wake who waits. None: every mapper but the server."""

    pages: PageRun
    mapper: Mapper | None = None


class Wake(Struct, frozen=True):
    """Have whoever waits at these pages try again."""

    pages: PageRun
    mapper: Mapper


class Poison(Struct, frozen=True):
    """Accesses to these holes get SIGBUS from here on: their bytes are lost. Result: `Outcome`."""

    pages: PageRun
    mapper: Mapper


class Punch(Struct, frozen=True):
    """Take pages out of the file and out of every mapping, and give their frames back."""

    pages: PageRun


class Present(Struct, frozen=True):
    """Look which pages are in the file. Result: (n,) bool array."""

    pages: PageRun


class HasGoneOn(Struct, frozen=True):
    """Tell whether every thread of a process whose word was read has run since. Result: bool."""

    mapper: Mapper


class ReadCached(Struct, frozen=True):
    """Read from swap what need not come from the medium. Result: as `ReadSwap`, or None: it must, or nobody knows.

    The bytes are to be used before anything is waited for, and before the next of these: their place may be used again.
    """

    offset_bytes: int
    length_bytes: int


class ReadSwap(Struct, frozen=True):
    """Read from swap. Result: (length_bytes,) uint8, or the errno (an int) of what went wrong.

    Attributes:
        offset_bytes: in the swap file.
    """

    offset_bytes: int
    length_bytes: int


class WriteSwap(Struct, frozen=True):
    """Write pieces one after the other. Result: errno, 0 when all of it was written.

    Attributes:
        offset_bytes: in the swap file.
        pieces: uint8 arrays; may be views of frames, which are protected until the result is there.
    """

    offset_bytes: int
    pieces: Sequence[Bytes]


class Quiesce(Struct, frozen=True):
    """Wait until every fence that notifiers returned has passed (see `mm.notifier`)."""

    fences: Sequence[Any]


@dataclass(slots=True, eq=False)
class Gate:
    """Something procedures wait for; opened once by the one that made it.

    Attributes:
        is_open: set by `open`; a runner resumes whoever paused at it, in order of arrival.
        waiting: procedures that paused, kept by the runner.
    """

    is_open: bool = False
    waiting: list[Any] = field(default_factory=list)


class Pause(Struct, frozen=True):
    """Wait until a gate is open. Open already: go on at once."""

    gate: Gate


class Open(Struct, frozen=True):
    """Open a gate: those who wait there go on, after this procedure's present step."""

    gate: Gate


class Backoff(Struct, frozen=True):
    """Wait for a time: the machine is short of something that others may give back."""

    delay_ns: int


Effect = (
    Zero
    | Fill
    | MapIn
    | WriteProtect
    | Unprotect
    | Wake
    | Poison
    | Punch
    | Present
    | HasGoneOn
    | ReadCached
    | ReadSwap
    | WriteSwap
    | Quiesce
    | Pause
    | Open
    | Backoff
)

Procedure = Generator[Effect, Any, T]
"""A piece of pager work that yields effects, is sent their results, and returns a T."""
