"""The active end of a benchmark: sets both ends up, runs rounds by turns with the matching floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from nopin.lab import bench_peer
from nopin.lab.bench_end import BenchEnd
from nopin.lab.bench_flow import OPCODES, SendPingPong, Work, WritePingPong, lead, one_by_one, stream
from nopin.lab.bench_spec import N_ROUNDS, BenchSpec
from nopin.lab.child import Child
from nopin.lab.figures import BandwidthFigure, Figure, LatencyFigure
from nopin.lab.floor_memory import ProcessVmFloor
from nopin.lab.floor_udp import UdpFloor
from nopin.lab.floor_wake import WakeFloor
from nopin.lab.rendezvous import (
    RENDEZVOUS_VERSION,
    AnyWord,
    BenchLine,
    Finished,
    Go,
    Going,
    Ready,
    Setup,
    connect,
    expect,
)
from nopin.lab.rounds import Floor, alternate
from nopin.lab.scratch import scratch_folder
from nopin.lab.servers import LocalServer
from nopin.verbs.device import Device

FLOOR_S = 0.1
WARM_UP_DIVISOR = 10
LARGEST_PAYLOAD_BYTES = 4096


class Bench:
    """An active end connected to a passive one.

    Attributes:
        end: ours.
        ready: what the passive end said of itself.
    """

    def __init__(self, spec: BenchSpec, device: Device, line: BenchLine) -> None:
        """Set up both ends.

        Raises:
            PeerError: the passive end refuses or is gone.
        """
        self.spec = spec
        self._line = line
        self.end = BenchEnd(
            device,
            memory=spec.memory,
            size_bytes_max=max(spec.sizes_bytes),
            tx_depth=spec.tx_depth,
            n_queue_pairs=spec.n_queue_pairs,
        )
        try:
            self.ready = self._connect(device.info.mtu)
        except BaseException:
            self.end.close()
            raise

    def _connect(self, link_mtu: int) -> Ready:
        spec, end = self.spec, self.end
        self._line.send(
            Setup(
                version=RENDEZVOUS_VERSION,
                test=spec.test,
                memory=spec.memory,
                size_bytes_max=max(spec.sizes_bytes),
                tx_depth=spec.tx_depth,
                path_mtu=min(spec.path_mtu or link_mtu, link_mtu),
                queue_pairs=end.coordinates(),
                address=end.target_address,
                rkey=end.region.rkey,
            )
        )
        ready = expect(self._line, Ready)
        end.connect(ready.queue_pairs, ready.path_mtu)
        return ready

    def rate_rounds(self, size: int) -> tuple[Callable[[], float], int]:
        """Warm up; return what runs a round and tells its rate in bytes a second, and how many messages it sends."""
        n_warm_up = self._n_warm_up()
        n_round = self._round_length(n_warm_up, self._rate_round(size, n_warm_up))
        n_messages = n_round * self.spec.n_queue_pairs
        return lambda: n_messages * size / self._rate_round(size, n_round), n_messages

    def latency_rounds(self, size: int) -> Callable[[], list[float]]:
        """Warm up; return what runs a round and tells its samples in nanoseconds."""
        n_warm_up = self._n_warm_up()
        n_round = self._round_length(n_warm_up, sum(self._latency_round(size, n_warm_up)) / 1e9)
        return lambda: self._latency_round(size, n_round)

    def _n_warm_up(self) -> int:
        return max(1, self.spec.n_iterations // WARM_UP_DIVISOR)

    def _round_length(self, n_warm_up: int, warm_up_s: float) -> int:
        """Return messages of a round: a share of the iterations, or what a share of the duration takes."""
        if self.spec.duration_s is None:
            return max(1, self.spec.n_iterations // N_ROUNDS)
        return max(1, round(n_warm_up * self.spec.duration_s / N_ROUNDS / warm_up_s))

    def _rate_round(self, size: int, n_messages: int) -> float:
        self._go(size, n_messages)
        seconds = stream(self.end, self._work(size), n_messages, self.spec.tx_depth)
        self._finish()
        return seconds

    def _latency_round(self, size: int, n_messages: int) -> list[float]:
        work = self._work(size)
        if not self.spec.two_sided:
            self._go(size, n_messages)
            return one_by_one(self.end, work, n_messages)
        if self.spec.test == "write_lat":
            written = WritePingPong(self.end, work, size)
            self._go(size, n_messages)
            samples = lead(written, n_messages)
        else:
            sent = SendPingPong(self.end, work, size, n_messages)
            self._go(size, n_messages)
            samples = lead(sent, n_messages)
        self._finish()
        return samples

    def _work(self, size: int) -> Work:
        return Work(self.end, OPCODES[self.spec.operation], size, self.ready.address, self.ready.rkey)

    def _go(self, size: int, n_messages: int) -> None:
        self._line.send(Go(size_bytes=size, n_messages=n_messages))
        expect(self._line, Going)

    def _finish(self) -> None:
        if self.spec.two_sided:
            expect(self._line, Finished)

    def close(self) -> None:
        """Destroy our end and let the passive end go."""
        self.end.close()
        self._line.close()


def measure(benches: Sequence[Bench], size: int, floor: Floor | None) -> list[Figure]:
    """Measure one message size in rounds, the benches and a floor by turns; one figure for each bench."""
    floor_name = floor.name if floor else None
    if benches[0].spec.kind == "bw":
        runs = [bench.rate_rounds(size) for bench in benches]
        rates, floor_rate = alternate([run for run, _ in runs], floor, n_rounds=N_ROUNDS, floor_s=FLOOR_S)
        return [
            BandwidthFigure(
                size_bytes=size,
                n_iterations=n_messages * N_ROUNDS,
                rounds_bytes_per_s=rounds,
                floor_name=floor_name,
                floor_bytes_per_s=floor_rate,
            )
            for rounds, (_, n_messages) in zip(rates, runs, strict=True)
        ]
    latencies, floor_ns = alternate(
        [bench.latency_rounds(size) for bench in benches], floor, n_rounds=N_ROUNDS, floor_s=FLOOR_S
    )
    return [
        LatencyFigure(
            size_bytes=size,
            samples_ns=[sample for samples in rounds for sample in samples],
            floor_name=floor_name,
            floor_ns=floor_ns,
        )
        for rounds in latencies
    ]


@contextmanager
def local_benches(specs: Sequence[BenchSpec], *, direct: bool) -> Iterator[list[Bench]]:
    """Run both ends of each bench on this machine, each a process of its own, all with the same two servers.

    Each end has its own server, so that the traffic is RoCEv2 over loopback; with `direct` they share one, and
    their memory is copied directly.
    """
    with ExitStack() as held:
        folder = held.enter_context(scratch_folder())
        ours = held.enter_context(LocalServer(folder / "active.sock"))
        theirs = ours if direct else held.enter_context(LocalServer(folder / "passive.sock"))
        benches: list[Bench] = []
        for spec in specs:
            peer = held.enter_context(Child(bench_peer.child, str(theirs.socket_path), received=AnyWord))
            device = held.enter_context(Device(server=str(ours.socket_path)))
            benches.append(Bench(spec, device, peer.line))
            held.callback(benches[-1].close)
        yield benches


@contextmanager
def remote_bench(spec: BenchSpec, host: str, port: int) -> Iterator[Bench]:
    """Connect to a passive end on another host, through the default server here.

    Raises:
        PeerError: nobody waits there.
    """
    line = connect(host, port)
    with Device() as device:
        bench = Bench(spec, device, line)
        try:
            yield bench
        finally:
            bench.close()


class Floors:
    """The floor that matches a message size, each started once: floors have processes of their own."""

    def __init__(self, spec: BenchSpec, *, direct: bool) -> None:
        self._spec = spec
        self._direct = direct
        self._made: dict[tuple[str, int], Floor] = {}

    def matching(self, size: int) -> Floor:
        """Return the floor: for latency wake-ups, for a direct copy process_vm_readv, else packets with CRC.

        A half round trip is held against one wake-up, a whole one against two. Packets carry what the
        benchmark's do: up to a path MTU of payload.
        """
        if self._spec.kind == "lat":
            n_wakes = 1 if self._spec.two_sided else 2
            return self._once("wake", n_wakes, lambda: WakeFloor(n_wakes))
        if self._direct:
            return self._once("vm", size, lambda: ProcessVmFloor(size))
        payload = min(size, self._spec.path_mtu or LARGEST_PAYLOAD_BYTES)
        return self._once("udp", payload, lambda: UdpFloor(crc=True, payload_bytes=payload))

    def _once(self, kind: str, parameter: int, make: Callable[[], Floor]) -> Floor:
        key = (kind, parameter)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def close(self) -> None:
        """End every floor's processes."""
        for floor in self._made.values():
            floor.close()
        self._made.clear()
