"""Arguments of jobs as bytes, arrays by reference, and what cannot be sent."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nopin.accel.arguments import decode, encode
from nopin.accel.memory import ArrayRef, Windows
from nopin.errors import UsageError
from nopin.ranges import Range


def no_arrays(what: Any) -> Any:
    raise AssertionError(f"no array was given, but {what}")


def back(value: Any) -> Any:
    return decode(encode(value, no_arrays), no_arrays)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.complex_numbers(allow_nan=False)
    | st.builds(slice, st.none() | st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(1, 9))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_values_come_back_as_they_were_and_of_the_same_type(value: Any) -> None:
    came = back(value)
    assert came == value
    assert type(came) is type(value)


@pytest.mark.parametrize(
    "scalar",
    [np.float32(1.5), np.int8(-3), np.uint64(1 << 63), np.bool_(True), np.complex64(1j), np.datetime64("2020-01-01")],
)
def test_numpy_scalars_keep_their_type(scalar: Any) -> None:
    came = back(scalar)
    assert came == scalar
    assert came.dtype == scalar.dtype


def test_dtypes_and_types_of_numbers_arrive_as_dtypes() -> None:
    fields = np.dtype([("a", "<f4"), ("b", "<i8", (2,))])
    assert back([fields, np.float32, float]) == [fields, np.dtype(np.float32), np.dtype(float)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "object cannot be sent; what can"),
        ({1: 2}, "use texts as keys"),
        (1 << 64, "more than 64 bits"),
        (np.array([object()])[0], "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_what_can(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encode(value, no_arrays)


def test_endless_nesting_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UsageError, match="deep"):
        encode(endless, no_arrays)


@given(st.binary(max_size=40))
def test_nonsense_raises_what_is_documented(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode(data, no_arrays)


class Memory:
    """Some memory of this process that plays an arena."""

    def __init__(self, n_bytes: int = 4096) -> None:
        self.bytes = np.zeros(n_bytes, np.uint8)
        base: int = self.bytes.__array_interface__["data"][0]
        self.windows = Windows()
        self.windows.add(Range.of_length(base, n_bytes))


FIELDS = np.dtype([("x", "<f8"), ("y", "<i4", (3,))])


@pytest.mark.parametrize(
    "pick",
    [
        lambda b: b[:80].view(np.float64),
        lambda b: b[:96].view(np.int32).reshape(4, 6).T,
        lambda b: b[:96].view(np.int32).reshape(4, 6)[::-1, ::-2],
        lambda b: b[4:204].view(FIELDS),
        lambda b: b[:8].view(np.float64).reshape(()),
        lambda b: np.broadcast_to(b[:4], (5, 4)),
        lambda b: b[:0].view(np.int32),
        lambda b: b[-7:],
    ],
)
def test_an_array_arrives_as_the_same_memory(pick: Any) -> None:
    memory = Memory()
    memory.bytes[:] = np.random.default_rng(1).integers(0, 255, 4096)
    array = pick(memory.bytes)
    came = decode(encode([array], ArrayRef.of), memory.windows.array)[0]
    assert came.tobytes() == array.tobytes()
    assert (came.shape, came.dtype, came.flags.writeable) == (array.shape, array.dtype, array.flags.writeable)
    if array.size:
        assert came.strides == array.strides
        assert np.shares_memory(came, array)


def test_a_reference_outside_every_arena_is_refused() -> None:
    memory, other = Memory(), np.zeros(10)
    with pytest.raises(ValueError, match="no arena has all of"):
        memory.windows.array(ArrayRef.of(other))
    past = ArrayRef.of(memory.bytes)
    longer = ArrayRef(past.address, (4097,), (1,), past.dtype, True)
    with pytest.raises(ValueError, match="no arena has all of"):
        memory.windows.array(longer)
    before = ArrayRef(past.address, (2,), (-1,), past.dtype, True)
    with pytest.raises(ValueError, match="no arena has all of"):
        memory.windows.array(before)


def test_arrays_of_objects_and_masked_arrays_are_refused() -> None:
    with pytest.raises(UsageError, match="Python objects"):
        ArrayRef.of(np.array([None]))
    with pytest.raises(UsageError, match="mask"):
        ArrayRef.of(np.ma.masked_array([1, 2], [True, False]))


def test_windows_do_not_overlap_and_are_forgotten() -> None:
    memory = Memory()
    base: int = memory.bytes.__array_interface__["data"][0]
    with pytest.raises(ValueError, match="overlaps"):
        memory.windows.add(Range.of_length(base + 4095, 10))
    memory.windows.remove(base)
    assert memory.windows.find(base, 1) is None
    with pytest.raises(KeyError):
        memory.windows.remove(base)
