"""Swap on a compressed RAM disk for the length of a test; undone whatever happens."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

DEVICE, CONTROL = Path("/dev/zram0"), Path("/sys/block/zram0")


@contextlib.contextmanager
def zram_swap(size_bytes: int = 256 << 20) -> Iterator[None]:
    """Make and enable the swap; skips the test where that is impossible or the device is in use."""
    if os.geteuid() != 0 or not DEVICE.exists():
        pytest.skip("needs root and /dev/zram0 to make swap")
    if (CONTROL / "disksize").read_text().strip() != "0":
        pytest.skip("/dev/zram0 is in use")
    try:
        (CONTROL / "disksize").write_text(str(size_bytes))
        subprocess.run(["mkswap", DEVICE], check=True, capture_output=True)
        subprocess.run(["swapon", DEVICE], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", DEVICE], check=True, capture_output=True)
    finally:
        (CONTROL / "reset").write_text("1")
