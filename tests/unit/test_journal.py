"""The journal: whatever moment its writer is killed at, a whole record is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nopin.server.journal import Journal


def test_an_untouched_journal_has_no_record() -> None:
    assert Journal(np.zeros(256, np.uint8)).read() is None


def test_the_last_record_is_read_also_by_another_reader() -> None:
    memory = np.zeros(256, np.uint8)
    for record in (b"", b"one", b"two, longer", b"three"):
        Journal(memory).write(record)
        assert Journal(memory).read() == record


def test_a_record_too_long_is_refused_and_the_old_one_stays() -> None:
    journal = Journal(np.zeros(256, np.uint8))
    journal.write(b"kept")
    with pytest.raises(ValueError, match="does not fit"):
        journal.write(bytes(journal.capacity_bytes + 1))
    assert journal.read() == b"kept"


@given(
    records=st.lists(st.binary(max_size=40), min_size=1, max_size=5),
    last=st.binary(max_size=40),
    n_stored=st.integers(0, 56),
)
def test_a_write_cut_off_anywhere_leaves_the_old_record_or_the_new(
    records: list[bytes], last: bytes, n_stored: int
) -> None:
    """Body first, then header: apply a prefix of the bytes that a write changes."""
    memory = np.zeros(128, np.uint8)
    journal = Journal(memory)
    for record in records:
        journal.write(record)
    before = memory.copy()
    journal.write(last)
    changed = np.flatnonzero(before != memory)
    bodies = [at for at in changed if at % 64 >= 16]
    headers = [at for at in changed if at % 64 < 16]
    order = np.array(bodies + headers, np.int64)
    torn = before.copy()
    torn[order[:n_stored]] = memory[order[:n_stored]]
    assert Journal(torn).read() in (records[-1], last)


@given(noise=st.binary(min_size=128, max_size=128))
def test_noise_is_no_record_or_at_least_no_error(noise: bytes) -> None:
    Journal(np.frombuffer(bytearray(noise), np.uint8)).read()
