"""Memory that a process frees and takes again."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
import numpy as np
from nopin.linux.libc import keep_freed_memory
keep_freed_memory()
def work():
    first, second = np.zeros(2 << 20, np.uint8), np.zeros(2 << 20, np.uint8)
    first[:], second[:] = 1, 1
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_buffers_that_are_taken_again_and_again_cost_no_page_faults() -> None:
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert int(out.stdout) < 1000, "ten times two buffers of 512 pages"
