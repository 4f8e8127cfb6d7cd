"""Numbers with names, as wires, rings and tables have them."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """An `IntEnum` that is looked up in sets and dictionaries as quickly as its number.

    The hash of the standard library's is written in Python, and costs ten times as much.
    """

    __hash__ = int.__hash__
