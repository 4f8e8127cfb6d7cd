"""What a host knows of a page of memory in use: Linux's `struct page`, with the reverse map in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nopin.model.effects import Gate

if TYPE_CHECKING:
    from nopin.model.host.files import File

Mapping = tuple[int, int]
"""A place where a page is mapped: (process id, page number)."""


@dataclass(slots=True, eq=False)
class Page:
    """Bytes that belong together, in a frame that may change under them.

    Page table entries point here, so that migration changes one number. References of the frame are exactly: one for
    each of `mappings`, one if there is a `slot`, one if there is a `file`, `n_pins`, and who is in the middle of
    something (`Host.check` counts them when nobody is).

    Attributes:
        frame: where the bytes are.
        mappings: the page table entries that mean it, in order of making.
        dirty: the copy on the medium (the slot's, the file's) is not these bytes, as far as collected.
        slot: its place in the swap area; the page is then found by it (the swap cache).
        file, index: whose page it is, from the start of the file; the page is then found there (the file cache).
        n_pins: pins, which forbid moving and replacing it.
        discardable: given up by MADV_FREE, until it is written.
        busy: the page lock, held while it is filled, written out, moved or dropped; opened when it is given back.
    """

    frame: int
    mappings: dict[Mapping, None] = field(default_factory=dict)
    dirty: bool = False
    slot: int | None = None
    file: File | None = None
    index: int = 0
    n_pins: int = 0
    discardable: bool = False
    busy: Gate | None = None

    @property
    def anonymous(self) -> bool:
        """True if no file is behind it."""
        return self.file is None
