"""A receiver that faults: told to the sender at once by an RNR NAK, or kept to itself while the page comes (parking).

An RNR NAK makes the sender wait for as long as the receiver's code says, which is a guess, and send everything again
from the faulting packet on. A parked receiver keeps what arrives and is late with its acknowledgement; the page decides
how long that takes. The stream, both NICs and the fault service are those of validation V2.
"""

from __future__ import annotations

from nopin.lab.faulty_stream import MESSAGE_BYTES, Stream, run_stream
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.units import MS_NS, US_NS

_PARK_BOUND_NS = {"rnr": 0, "parking": 20 * MS_NS}


def measure(point: Point) -> Measures:
    """Run a stream with faults at a distance."""
    spacing, mtu = point["spacing"], point["mtu"]
    stream = Stream(
        costs=point.costs,
        mtu=mtu,
        rnr_code=point["rnr_code"],
        park_bound_ns=_PARK_BOUND_NS[point.discipline],
        spacing=spacing,
        n_packets=max(spacing * point["faults"], point["packets"]),
        seed=point.seed,
    )
    came = run_stream(stream)
    ordered = sorted(came.latency_ns)
    n_bytes = len(ordered) * MESSAGE_BYTES
    return {
        "gbit_per_s": n_bytes * 8 / came.taken_ns,
        "median_us": ordered[len(ordered) // 2] / US_NS,
        "p99_us": ordered[len(ordered) * 99 // 100] / US_NS,
        "rnr_naks": came.n_rnr_naks,
        "resent_packets": came.n_resent,
    }


SCENARIO = Scenario(
    name="responder",
    question="What do faults of a receiver cost under RNR NAKs, and what when it parks?",
    machine="connectib56",
    disciplines=("rnr", "parking"),
    settings={
        "spacing": Setting((256, 512, 1024, 2048, 4096), "packets from fault to fault"),
        "rnr_code": Setting((12,), "the receiver's RNR timer; 12 asks for 0.64 ms"),
        "mtu": Setting((4096,), "bytes of a packet"),
        "faults": Setting((4,), "how many there are at least"),
        "packets": Setting((4096,), "how many there are at least"),
    },
    plotted="gbit_per_s",
    measure=measure,
)
