"""V2: a stream of messages whose receiver faults now and then.

What happens is what the real NIC does. The packet whose page is gone draws an RNR NAK; the fault goes through the
fault service; what was in flight behind the packet is dropped; the sender waits out its RNR timer and sends again from
that packet on. Nothing slows down afterwards: loss is no congestion here.

One parameter is free, the wait of the sender's RNR timer in effect, and was set so that the published rate at f = 2^-12
comes out. It is set for each assumed MTU, because neither MTU nor timer code were published. Down to f = 2^-12 the
stream is run as it is. Beyond, faults are so far apart that the stream is at line rate again long before the next one;
what one costs is then that of f = 2^-12, and the stretch between two is added at the rate that a stream without faults
was measured to have. A test compares the sum with a whole run
(`test_v2_is_calibrated_at_one_point_and_beyond_it_the_sum_is_what_a_whole_run_gives`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nopin.lab.faulty_stream import Stream, run_stream
from nopin.lab.validate.experiment import CALIBRATED, Experiment, Parameter, Row, Settings
from nopin.model.costs import Costs
from nopin.units import US_NS

EXPONENTS = range(8, 20)
CALIBRATED_AT = 12
_RNR_CODE = 1
"""The shortest there is: the wait in effect is the parameter."""


@dataclass(frozen=True)
class Curve:
    """Rates of one MTU.

    Attributes:
        packet_ns: a packet of a stream without faults. cost_ns: what a fault adds, by exponent of f.
    """

    mtu: int
    packet_ns: float
    cost_ns: dict[int, float]

    def gbits_per_s(self, exponent: int) -> float:
        """Return the rate at f = 2^-exponent."""
        cost_ns = self.cost_ns.get(exponent, self.cost_ns[max(self.cost_ns)])
        spacing = 1 << exponent
        return self.mtu * 8 * spacing / (spacing * self.packet_ns + cost_ns)

    def half_at(self) -> float:
        """Return log2 of the frequency at which a fault costs as much time as the packets between two."""
        half = self.mtu * 8 / self.packet_ns / 2
        upper = next(each for each in EXPONENTS if self.gbits_per_s(each) >= half)
        low, high = self.gbits_per_s(upper - 1), self.gbits_per_s(upper)
        return -(upper - 1 + (half - low) / (high - low))


def stream_of(costs: Costs, mtu: int, rnr_wait_ns: int, spacing: int, n_packets: int, seed: int = 0) -> Stream:
    """Return a stream whose receiver sends RNR NAKs at once, and whose sender then waits for so long."""
    costs = replace(costs, rnr_floor_ns=rnr_wait_ns)
    return Stream(costs, mtu, _RNR_CODE, park_bound_ns=0, spacing=spacing, n_packets=n_packets, seed=seed)


def measure(costs: Costs, mtu: int, rnr_wait_ns: int, n_faults: int, seed: int, settings: Settings) -> Curve:
    """Run the streams of one MTU."""
    exponents = [each for each in EXPONENTS if each <= CALIBRATED_AT]
    counts = {each: max(4, n_faults >> (each - EXPONENTS[0])) for each in exponents}
    points = [stream_of(costs, mtu, rnr_wait_ns, 1 << each, counts[each] << each, seed) for each in exponents] + [
        stream_of(costs, mtu, rnr_wait_ns, 0, n << EXPONENTS[0], seed) for n in (8, 40)
    ]
    *faulty, short, long = (streamed.taken_ns for streamed in settings.map(run_stream, points))
    packet_ns = (long - short) / (32 << EXPONENTS[0])
    cost_ns = {
        each: (taken - (counts[each] << each) * packet_ns) / counts[each]
        for each, taken in zip(exponents, faulty, strict=True)
    }
    return Curve(mtu, packet_ns, cost_ns)


def _run(settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for mtu in (2048, 4096):
        wait_ns = settings.integer(f"rnr_wait_{mtu}_ns")
        curve = measure(settings.costs, mtu, wait_ns, settings.integer("n_faults"), settings.seed, settings)
        rows += _rows(curve)
    return rows


def _rows(curve: Curve) -> list[Row]:
    name = f"MTU {curve.mtu}"
    line = curve.mtu * 8 / curve.packet_ns
    rows = [Row(f"{name}: no faults", "Gb/s", line, 47.8, 0.01, "D", calibrated=True)]
    for exponent in EXPONENTS:
        label, rate = f"{name}: f=2^-{exponent}", curve.gbits_per_s(exponent)
        if exponent == CALIBRATED_AT:
            rows.append(Row(label, "Gb/s", rate, 19.15, 0.02, "P", calibrated=True))
        else:
            rows.append(Row(label, "Gb/s", rate))
    return [
        *rows,
        Row(f"{name}: half the line rate at f", "log2", curve.half_at()),
        Row(f"{name}: cost of a fault", "us", curve.cost_ns[CALIBRATED_AT] / US_NS),
    ]


EXPERIMENT = Experiment(
    name="V2",
    title="InfiniBand stream with synthetic receive faults",
    machine="connectib56",
    source="Lesokhin et al., NPF, ASPLOS'17, sec 6.4 and Fig 10 right",
    run=_run,
    parameters={
        "rnr_wait_2048_ns": Parameter(2_088_400, "ns", "P", f"{CALIBRATED} at f = 2^-12, for an MTU of 2 KiB"),
        "rnr_wait_4096_ns": Parameter(4_192_800, "ns", "P", f"{CALIBRATED} at f = 2^-12, for an MTU of 4 KiB"),
        "n_faults": Parameter(24, "", "X", "at f = 2^-8; at 2^-9 half as many, and so on, but four"),
    },
    missing="f is taken to count packets. The path MTU is not published: both are run.",
)
