"""A device that uses a tenth of a large buffer, or any other share: where pinning begins to pay.

The measurement is that of `registration.py`, along the share that is used instead of the size.
"""

from __future__ import annotations

from dataclasses import replace

from nopin.lab.scenarios import registration
from nopin.lab.scenarios.scenario import Setting

SCENARIO = replace(
    registration.SCENARIO,
    name="sparse",
    question="From which share of a buffer on does pinning all of it pay?",
    disciplines=("pinned", "on_demand"),
    settings={
        "used_permille": Setting([1, 10, 100, 200, 500, 1000], "of the buffer that the device writes"),
        "size_bytes": Setting([256 << 20], "of the buffer"),
        "used_pages": Setting([0], "where the share is 0", least=0),
        "request_pages": Setting([16], "in one request"),
    },
    plotted="total_ms",
)
