"""Schedules that once broke something, played again: each found a bug that was mended.

Each names the mutant that breaks the same rule again, so that it is known to see it still.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nopin.model.explore.record import load, replay

SCHEDULES = sorted((Path(__file__).parent / "schedules").glob("*.json"))


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_what_was_mended_stays_mended(path: Path) -> None:
    example = load(path)
    broken = replay(example, keep=False).breach
    assert broken is not None, "the schedule no longer leads to where it was"
    assert broken.which == example.property
    assert replay(msgspec.structs.replace(example, mutant=None), keep=False).breach is None
