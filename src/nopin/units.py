"""Units: page arithmetic, byte sizes in words, nanoseconds."""

from __future__ import annotations

import re

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_BYTES - 1

U64_MAX = (1 << 64) - 1

US_NS = 1_000
MS_NS = 1_000_000
S_NS = 1_000_000_000

_SUFFIX = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "kb": 1000,
    "m": 1 << 20,
    "mib": 1 << 20,
    "mb": 1000**2,
    "g": 1 << 30,
    "gib": 1 << 30,
    "gb": 1000**3,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 1000**4,
}


def page_floor(address: int) -> int:
    """Round an address down to its page."""
    return address & ~PAGE_MASK


def page_ceil(address: int) -> int:
    """Round an address up to a page boundary."""
    return (address + PAGE_MASK) & ~PAGE_MASK


def parse_bytes(text: str) -> int:
    """Read a size such as ``4096``, ``64k``, ``256MiB`` as bytes.

    Raises:
        ValueError: the text is not a size; the message shows the accepted form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    scale = _SUFFIX.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is not a size; write for example 4096, 64k or 256MiB")
    return int(float(match.group(1)) * scale)


def format_bytes(n_bytes: float) -> str:
    """Write a byte count with a binary unit, three significant digits."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def format_ns(nanoseconds: float) -> str:
    """Write a duration with the unit that suits it, three significant digits."""
    for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if nanoseconds >= scale:
            return f"{_three_digits(nanoseconds / scale)} {unit}"
    return f"{nanoseconds:.0f} ns"


def _three_digits(value: float) -> str:
    """Write the three digits that count, and never an exponent."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
