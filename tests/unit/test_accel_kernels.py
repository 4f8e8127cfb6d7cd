"""The accelerator's kernels on memory of this process: results, chunks, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nopin.accel.kernels import CHUNK_BYTES, HOPS_PER_CHUNK, KERNELS, Kernel, chase, pieces
from nopin.accel.memory import Windows
from nopin.ranges import Range


def run(kernel: Kernel) -> tuple[Any, int]:
    """Its result and the number of its chunks."""
    n_chunks = 0
    while True:
        try:
            next(kernel)
        except StopIteration as end:
            return end.value, n_chunks
        n_chunks += 1


def do(name: str, *arguments: Any) -> Any:
    return run(KERNELS[name](*arguments))[0]


ORDERS: list[Any] = [
    np.arange(24.0).reshape(4, 6),
    np.asfortranarray(np.arange(24.0).reshape(4, 6)),
    np.arange(48.0).reshape(8, 6)[::-2, ::2],
    np.arange(7, dtype=np.int16),
    np.array(3.5),
    np.zeros((3, 0)),
]


@pytest.mark.parametrize("array", ORDERS, ids=lambda a: f"{a.shape}{a.strides}")
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 16, 1])
def test_kernels_compute_what_numpy_does_in_any_order_and_chunk(
    array: Any, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nopin.accel.kernels.CHUNK_BYTES", chunk_bytes)
    assert do("sum", array) == np.sum(array)
    target = np.empty_like(array)
    do("copy", target, array)
    np.testing.assert_array_equal(target, array)
    do("add", array, target, target)
    np.testing.assert_array_equal(target, array * 2)
    do("scale", target, 3)
    np.testing.assert_array_equal(target, array * 6)
    do("fill", target, 5)
    assert (target == 5).all()


def test_pieces_are_bounded_and_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nopin.accel.kernels.CHUNK_BYTES", 64)
    array = np.zeros((5, 3, 7), np.int32)
    for (piece,) in pieces(array):
        assert piece.nbytes <= 64
        piece += 1
    assert (array == 1).all()


def test_pieces_of_a_fortran_array_are_compact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nopin.accel.kernels.CHUNK_BYTES", 800)
    array = np.zeros((100, 10), order="F")
    for (piece,) in pieces(array):
        assert piece.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_, np.float32, np.complex64])
def test_sums_have_the_type_numpy_gives_them(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nopin.accel.kernels.CHUNK_BYTES", 100)
    array: Any = np.ones(1000, dtype)
    total = do("sum", array)
    assert total == 1000
    assert total.dtype == np.sum(array).dtype


def test_rounding_of_a_long_sum_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nopin.accel.kernels.CHUNK_BYTES", 512)
    array = np.full(1 << 18, 0.1, np.float32)
    assert abs(float(do("sum", array)) - 0.1 * (1 << 18)) < 0.05


def test_operands_are_broadcast() -> None:
    out = np.zeros((3, 4))
    do("copy", out, np.arange(4.0))
    do("add", out, 1, out)
    np.testing.assert_array_equal(out, np.broadcast_to(np.arange(4.0) + 1, (3, 4)))


@pytest.mark.parametrize("source", [np.arange(50) * 3, np.arange(100).reshape(50, 2)])
def test_gather_takes_rows_by_index(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nopin.accel.kernels.CHUNK_BYTES", 64)
    indices = np.random.default_rng(1).integers(0, 50, 1000)
    out = np.zeros((1000, *source.shape[1:]), source.dtype)
    do("gather", source, indices, out)
    np.testing.assert_array_equal(out, source[indices])


def test_gather_refuses_bad_indices_and_a_target_of_another_shape() -> None:
    source, out = np.arange(5), np.zeros(3, np.int64)
    with pytest.raises(IndexError, match="5"):
        do("gather", source, np.array([0, 5, 1]), out)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        do("gather", source, np.array([0, 1]), out)


class List:
    """A linked list of 24-byte nodes in scattered order, in memory of this process."""

    def __init__(self, n: int) -> None:
        self.memory = np.zeros(n * 24, np.uint8)
        self.nodes = self.memory.view([("next", np.uint64), ("value", np.int64), ("other", np.int64)])
        base: int = self.memory.__array_interface__["data"][0]
        order = np.random.default_rng(n).permutation(n)
        addresses = (base + order * 24).astype(np.uint64)
        self.nodes["next"][order] = np.append(addresses[1:], np.uint64(0))
        self.nodes["value"] = np.arange(n)
        self.head, self.last = int(addresses[0]), int(order[-1])
        self.windows = Windows()
        self.windows.add(Range.of_length(base, self.memory.nbytes))


def test_chase_follows_pointers_to_the_end() -> None:
    n = 2 * HOPS_PER_CHUNK + 5
    chain = List(n)
    assert run(chase(chain.windows, chain.head)) == ((n, n * (n - 1) // 2), 2)
    assert run(chase(chain.windows, chain.head, n_max=10))[0][0] == 10
    assert run(chase(chain.windows, 0))[0] == (0, 0)


def test_chase_can_be_stopped_in_a_cycle() -> None:
    chain = List(3)
    chain.nodes["next"][chain.last] = chain.head
    going = chase(chain.windows, chain.head)
    for _ in range(10):
        next(going)


@pytest.mark.parametrize("stray", [8, 1 << 63, (1 << 64) - 1])
def test_chase_refuses_a_pointer_outside_every_arena(stray: int) -> None:
    chain = List(3)
    chain.nodes["next"][chain.last] = stray
    with pytest.raises(ValueError, match=f"node 3: {stray:#x}.*outside every arena"):
        do_chase(chain)


def test_chase_refuses_a_node_that_leaves_its_arena() -> None:
    chain = List(3)
    end = chain.windows.find(chain.head, 1)
    assert end is not None
    chain.nodes["next"][chain.last] = end.where.end - 15
    with pytest.raises(ValueError, match="outside every arena"):
        do_chase(chain)


def do_chase(chain: List) -> Any:
    return run(chase(chain.windows, chain.head))[0]
