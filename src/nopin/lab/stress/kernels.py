"""What the accelerator's workers run: they find these by import path."""

from __future__ import annotations

import numpy as np

from nopin.lab.stress.log import Words


def load(pages: Words) -> bytes:
    """Return the bytes of pages."""
    return pages.tobytes()


def store(cell: Words, words: bytes) -> None:
    """Store to a cell."""
    cell[...] = np.frombuffer(words, np.int64)
