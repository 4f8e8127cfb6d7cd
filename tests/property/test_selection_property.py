"""Selections agree with numpy on every shape, stride and basic index."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nopin.verbs.selection import Array, select

Case = tuple[Array, Any]


@st.composite
def arrays_and_keys(draw: st.DrawFn) -> Case:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    dtype = draw(st.sampled_from(["u1", "<i2", "<f4", "<i8", "V3"]))
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.frombuffer(np.arange(n_bytes, dtype=np.uint32).astype("u1"), dtype).reshape(shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    steps = [slice(None, None, draw(st.sampled_from([1, -1, 2, -2]))) for _ in range(array.ndim)]
    array = array[tuple(steps)]
    key = draw(hnp.basic_indices(array.shape, max_dims=6, allow_newaxis=True, allow_ellipsis=True))
    return array, key


def gather(array: Array, key: object) -> Array:
    """Fetch the runs from the array's memory, as the device would."""
    found = select(key, array.shape, array.strides, array.itemsize)
    low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)
    first = array.__array_interface__["data"][0]
    memory = np.array(array_bytes(low, high))
    pieces = [memory[first - low + o : first - low + o + found.run_bytes] for o in found.offsets()]
    flat = np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)
    return found.arrange(flat.view(array.dtype))


def array_bytes(low: int, high: int) -> Array:
    return np.frombuffer(ctypes.string_at(low, high - low), np.uint8)


@given(arrays_and_keys())
def test_reading_the_runs_gives_what_numpy_gives(case: Case) -> None:
    array, key = case
    expected = array[key]
    result = gather(array, key)
    assert result.shape == np.shape(expected)
    assert result.tobytes() == expected.tobytes()


@given(arrays_and_keys())
def test_flatten_undoes_arrange(case: Case) -> None:
    array, key = case
    found = select(key, array.shape, array.strides, array.itemsize)
    buffer = np.arange(found.n_bytes // array.itemsize)
    assert found.flatten(found.arrange(buffer)).tolist() == buffer.tolist()


@given(arrays_and_keys())
def test_exactly_the_selected_bytes_travel(case: Case) -> None:
    array, key = case
    found = select(key, array.shape, array.strides, array.itemsize)
    assert found.n_bytes == np.asarray(array[key]).nbytes
    assert found.n_runs == len(found.offsets())


@given(arrays_and_keys(), st.data())
def test_any_part_of_the_offsets_equals_the_whole(case: Case, data: st.DataObject) -> None:
    array, key = case
    found = select(key, array.shape, array.strides, array.itemsize)
    first = data.draw(st.integers(0, found.n_runs))
    n = data.draw(st.integers(0, found.n_runs - first))
    assert found.offsets(first, n).tolist() == found.offsets()[first : first + n].tolist()
