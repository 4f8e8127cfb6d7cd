"""What an index of a remote array means in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.errors import UsageError
from nopin.verbs.selection import Array, SelectionError, select


def runs_of(key: object, array: Array) -> list[tuple[int, int]]:
    found = select(key, array.shape, array.strides, array.itemsize)
    return [(int(offset), found.run_bytes) for offset in found.offsets()]


def test_a_slice_is_one_run() -> None:
    assert runs_of(slice(10, 20), np.zeros(100)) == [(80, 80)]


def test_whole_rows_form_one_run() -> None:
    assert runs_of(slice(1, 3), np.zeros((4, 5))) == [(40, 80)]


def test_an_integer_is_one_element() -> None:
    assert runs_of(-1, np.zeros(7)) == [(48, 8)]


def test_a_column_is_one_run_for_each_row() -> None:
    assert runs_of((slice(None), 2), np.zeros((3, 4), np.int32)) == [(8, 4), (24, 4), (40, 4)]


def test_a_reversed_slice_travels_as_one_run_in_memory_order() -> None:
    assert runs_of(slice(None, None, -1), np.zeros(6)) == [(0, 48)]


def test_a_fortran_array_travels_as_one_run() -> None:
    assert runs_of(..., np.zeros((3, 4), order="F")) == [(0, 96)]


def test_a_stride_leaves_the_gaps_behind() -> None:
    assert runs_of(slice(0, 6, 2), np.zeros(6, np.int16)) == [(0, 2), (4, 2), (8, 2)]


def test_a_negative_stride_of_the_array_starts_before_its_first_element() -> None:
    assert runs_of(slice(0, 2), np.zeros(5)[::-1]) == [(-8, 16)]


def test_an_empty_selection_has_no_runs() -> None:
    found = select(slice(3, 3), (10,), (8,), 8)
    assert (found.n_runs, found.n_bytes, found.shape) == (0, 0, (0,))


def test_offsets_can_be_asked_for_in_part() -> None:
    found = select((slice(None), slice(0, 4, 2)), (5, 4), (16, 4), 4)
    assert found.offsets().tolist()[3:7] == found.offsets(3, 4).tolist()


def test_a_huge_selection_is_described_without_being_listed() -> None:
    found = select(slice(None, None, 2), (1 << 47,), (1,), 1)
    assert found.n_runs == 1 << 46
    assert found.offsets(1 << 40, 2).tolist() == [1 << 41, (1 << 41) + 2]


@pytest.mark.parametrize("key", [10, -11, (0, 0), np.int64(10)])
def test_out_of_range_is_an_index_error(key: object) -> None:
    with pytest.raises(IndexError):
        select(key, (10,), (8,), 8)


@pytest.mark.parametrize("key", [[1, 2], np.array([1]), True, 1.0, "a", (..., ...), slice(0, 5, 0), slice("a")])
def test_what_is_no_basic_index_is_refused(key: object) -> None:
    with pytest.raises(SelectionError) as caught:
        select(key, (10, 10), (80, 8), 8)
    assert isinstance(caught.value, UsageError)
