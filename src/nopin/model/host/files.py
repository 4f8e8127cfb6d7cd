"""Files of a modelled host: bytes on a medium, and pages of them in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from nopin.model.host.page import Page


@dataclass(slots=True, eq=False)
class File:
    """A file, or a piece of shared anonymous memory, which is a file without a name.

    Attributes:
        length_bytes: accesses past the last page that has a byte of it are SIGBUS.
        cache: pages in memory, by number from the start of the file.
        stored: pages on the medium; what is not there reads as zeros.
    """

    name: str
    length_bytes: int
    cache: dict[int, Page] = field(default_factory=dict)
    stored: dict[int, bytes] = field(default_factory=dict)
