"""Space in the swap file, and the form pages have there."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nopin.mm.swap import UNIT_BYTES, UNITS_PER_PAGE, SwapSpace, decode, encode, n_units
from nopin.units import PAGE_BYTES


def test_unit_zero_is_never_given_out_and_rows_follow_one_another() -> None:
    space = SwapSpace(1 << 20)
    assert [space.allocate(8), space.allocate(3), space.allocate(8)] == [1, 9, 12]
    assert space.used_bytes == 19 * UNIT_BYTES


def test_neighbours_that_are_free_are_one_again_in_whatever_order_they_came_back() -> None:
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        space = SwapSpace(4 * PAGE_BYTES)
        rows = [space.allocate(8) for _ in range(4)]
        assert space.allocate(1) is None, "it is full"
        for index in order:
            first = rows[index]
            assert first is not None
            space.free(first, 8)
        assert space.allocate(24) == 1


def test_the_limit_holds_and_no_two_rows_share_a_unit() -> None:
    draw = random.Random(3)
    space = SwapSpace(100 * UNIT_BYTES)
    rows: dict[int, int] = {}
    for _ in range(5000):
        if draw.random() < 0.55:
            n = draw.randrange(1, 9)
            first = space.allocate(n)
            if first is not None:
                rows[first] = n
        elif rows:
            first = draw.choice(list(rows))
            space.free(first, rows.pop(first))
        units = [unit for first, n in rows.items() for unit in range(first, first + n)]
        assert len(units) == len(set(units)) == space.n_used
        assert all(1 <= unit <= 100 for unit in units)


def test_a_successor_takes_over_what_can_be_and_refuses_the_rest() -> None:
    space = SwapSpace(100 * UNIT_BYTES)
    good = space.rebuild([(20, 8), (1, 4), (24, 8), (0, 8), (99, 8), (40, 0)])
    assert good == [True, True, False, False, False, False]
    assert space.n_used == 12
    assert space.allocate(15) == 5, "between the two"


@pytest.mark.parametrize("compress", [True, False])
def test_a_page_comes_back_as_it_was(compress: bool) -> None:
    pages = {
        "repetitive": np.tile(np.arange(16, dtype=np.uint8), PAGE_BYTES // 16),
        "random": np.random.default_rng(1).integers(0, 256, PAGE_BYTES).astype(np.uint8),
    }
    for name, page in pages.items():
        data, stored, crc = encode(page, compress=compress)
        assert len(data) == n_units(stored) * UNIT_BYTES
        assert (n_units(stored) < UNITS_PER_PAGE) == (compress and name == "repetitive"), (
            "stored small only if it helps"
        )
        assert decode(data, stored, crc) == page.tobytes()


@pytest.mark.parametrize("compress", [True, False])
def test_any_flipped_bit_is_noticed(compress: bool) -> None:
    page = np.tile(np.arange(256, dtype=np.uint8), PAGE_BYTES // 256)
    data, stored, crc = encode(page, compress=compress)
    for at in range(0, stored * 8, 41):
        damaged = data.copy()
        damaged[at // 8] ^= 1 << at % 8
        found = decode(damaged, stored, crc)
        assert found is None or found == page.tobytes(), "a bit that changes nothing may pass"
