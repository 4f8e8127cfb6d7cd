"""Rights, disciplines and buffers as users give them."""

from __future__ import annotations

import array
import mmap

import numpy as np
import pytest

from nopin.errors import UsageError
from nopin.nic.abi import Access, Discipline
from nopin.verbs.access import format_access, parse_access, parse_discipline
from nopin.verbs.buffers import memory_of


def test_letters_name_rights() -> None:
    assert parse_access("r") == Access.REMOTE_READ
    assert parse_access("rw") == Access.REMOTE_READ | Access.REMOTE_WRITE | Access.LOCAL_WRITE
    assert parse_access("a") & Access.LOCAL_WRITE, "verbs grant atomics only with local write"
    assert parse_access(Access.REMOTE_READ) == Access.REMOTE_READ


def test_an_unknown_letter_is_explained() -> None:
    with pytest.raises(UsageError, match=r"r \(read\)"):
        parse_access("rx")


@pytest.mark.parametrize("letters", ["", "r", "rw", "rwa", "wa"])
def test_letters_survive_a_round_trip(letters: str) -> None:
    assert format_access(parse_access(letters)) == letters


def test_disciplines_go_by_name() -> None:
    assert parse_discipline("on-demand") is Discipline.ON_DEMAND
    assert parse_discipline("pinned") is Discipline.PINNED
    assert parse_discipline(Discipline.SHORT_TERM) is Discipline.SHORT_TERM
    with pytest.raises(UsageError, match="short-term"):
        parse_discipline("loose")


def test_an_array_is_described_in_place() -> None:
    whole = np.zeros((4, 6), np.int32)
    found = memory_of(whole[1:3, ::2])
    assert found.address == whole.ctypes.data + 24
    assert found.length == 24 + 20
    assert (found.dtype, found.shape, found.strides, found.offset) == ("<i4", (2, 3), (24, 8), 0)


def test_negative_strides_put_the_first_element_inside() -> None:
    whole = np.zeros(10)
    found = memory_of(whole[::-1])
    assert (found.address, found.length, found.offset) == (whole.ctypes.data, 80, 72)


@pytest.mark.parametrize("what", [bytearray(64), array.array("d", [1.0] * 8), mmap.mmap(-1, 64)])
def test_any_buffer_can_be_described_and_is_held(what: bytearray) -> None:
    found = memory_of(what)
    assert found.length == 64
    assert not found.read_only
    if isinstance(what, bytearray):
        with pytest.raises(BufferError):
            what.extend(b"more")


def test_dates_have_no_buffer_protocol_but_are_arrays() -> None:
    assert memory_of(np.zeros(3, "M8[s]")).dtype == "<M8[s]"


def test_bytes_are_read_only() -> None:
    assert memory_of(b"constant").read_only


def test_nothing_means_the_whole_process() -> None:
    found = memory_of()
    assert (found.address, found.length, found.dtype) == (0, None, "|u1")


def test_an_address_needs_a_length() -> None:
    assert memory_of(0x1000, 4096).shape == (4096,)
    with pytest.raises(UsageError, match="needs a length"):
        memory_of(0x1000)


@pytest.mark.parametrize(
    ("what", "length"),
    [
        (0x1000, 0),
        (0x1000, -5),
        (-4096, 4096),
        (1 << 64, 1),
        (None, 5),
        (b"abc", 2),
        ("text", None),
        (object(), None),
        (b"", None),
        (np.zeros(0), None),
        (np.array([object()]), None),
        (1.5, None),
    ],
)
def test_what_has_no_memory_is_refused(what: object, length: int | None) -> None:
    with pytest.raises(UsageError):
        memory_of(what, length)


@pytest.mark.parametrize("what", [np.zeros(10, np.uint8), np.array(4096), bytearray(10), mmap.mmap(-1, 64)])
def test_a_length_beside_an_object_is_not_taken_for_a_part_of_it(what: object) -> None:
    with pytest.raises(UsageError, match="slice the object"):
        memory_of(what, 5)


@pytest.mark.parametrize("nonsense", [None, 3, ["r"], b"rw"])
def test_rights_and_disciplines_are_texts(nonsense: object) -> None:
    with pytest.raises(UsageError, match="give letters"):
        parse_access(nonsense)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there are on-demand"):
        parse_discipline(nonsense)  # type: ignore[arg-type]
