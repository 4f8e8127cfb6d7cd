"""What a benchmark run measures: perftest's choices, checked."""

from __future__ import annotations

import msgspec

from nopin.errors import UsageError

TESTS = ("write_bw", "read_bw", "send_bw", "write_lat", "read_lat", "send_lat", "atomic_lat")
MANAGED = "managed"
MEMORIES = ("on-demand", "pinned", "short-term", MANAGED)
"""Plain memory under one of three disciplines, or managed memory, on demand."""
ALL_SIZES_BYTES = tuple(1 << power for power in range(1, 24))
"""perftest's -a: 2 bytes to 8 MiB."""
DEFAULT_SIZE_BYTES = {"bw": 65536, "lat": 8}
DEFAULT_ITERATIONS = {"bw": 5000, "lat": 1000}
ATOMIC_BYTES = 8
N_ROUNDS = 5


class BenchSpec(msgspec.Struct, kw_only=True, frozen=True):
    """One run.

    Attributes:
        test: one of TESTS.
        sizes_bytes: message sizes, one line of results each.
        n_iterations: messages of each size on each queue pair, over all rounds.
        duration_s: instead of n_iterations, seconds for each size.
        n_queue_pairs: `-q`, bandwidth tests only.
        tx_depth: `-t`, messages under way on each queue pair.
        path_mtu: `--mtu`; None is the largest both ends can do.
        memory: of both ends, one of MEMORIES.
    """

    test: str
    sizes_bytes: list[int]
    n_iterations: int
    duration_s: float | None = None
    n_queue_pairs: int = 1
    tx_depth: int = 128
    path_mtu: int | None = None
    memory: str = "on-demand"

    @property
    def operation(self) -> str:
        """``"write"``, ``"read"``, ``"send"`` or ``"atomic"``."""
        return self.test.split("_")[0]

    @property
    def kind(self) -> str:
        """``"bw"`` or ``"lat"``."""
        return self.test.split("_")[1]

    @property
    def two_sided(self) -> bool:
        """Whether the passive end's process takes part in every message."""
        return self.test in ("send_bw", "send_lat", "write_lat")


DURATION_S_MAX = 3600.0


def check(spec: BenchSpec) -> BenchSpec:
    """Return the spec if it has a meaning.

    Raises:
        UsageError: it has none; the message says what would have.
    """
    if spec.test not in TESTS:
        raise UsageError(f"no test {spec.test!r}; there are {', '.join(TESTS)}")
    if spec.test == "atomic_lat" and spec.sizes_bytes != [ATOMIC_BYTES]:
        raise UsageError("atomics are of 8 bytes; leave out -s and -a")
    if spec.kind == "lat" and spec.n_queue_pairs != 1:
        raise UsageError("latency is measured on one queue pair; leave out -q")
    if min(spec.sizes_bytes) < 1 or max(spec.sizes_bytes) > 1 << 30:
        raise UsageError("message sizes run from 1 byte to 1 GiB")
    if spec.path_mtu is not None and spec.path_mtu not in (256, 512, 1024, 2048, 4096):
        raise UsageError(f"no path MTU {spec.path_mtu}; there are 256, 512, 1024, 2048, 4096")
    if spec.n_iterations < N_ROUNDS or (spec.duration_s is not None and not 0 < spec.duration_s <= DURATION_S_MAX):
        raise UsageError(f"at least {N_ROUNDS} iterations, or a duration above 0 and up to {DURATION_S_MAX:g} s")
    if spec.tx_depth < 1 or spec.n_queue_pairs < 1:
        raise UsageError("-t and -q start at 1")
    return spec
