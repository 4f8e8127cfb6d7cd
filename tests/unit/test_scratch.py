"""Folders of runs: none is left behind for long, and none in use is taken away."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from nopin.lab.scratch import PREFIX, scratch_folder


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_ours_alone_and_goes_with_what_is_in_it(parent: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == parent
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "server.log").write_text("said")
    assert list(parent.iterdir()) == []


def test_it_goes_when_the_run_fails(parent: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_folder():
        raise KeyboardInterrupt
    assert list(parent.iterdir()) == []


def test_the_next_run_removes_the_folder_of_one_that_was_killed(parent: Path) -> None:
    (parent / f"{PREFIX}killed").mkdir()
    (parent / f"{PREFIX}killed" / "server.log").write_text("said")
    with scratch_folder() as folder:
        assert list(parent.iterdir()) == [folder]


def test_folders_in_use_and_what_is_not_ours_stay(parent: Path) -> None:
    (parent / "something").mkdir()
    (parent / f"{PREFIX}link").symlink_to(parent / "something")
    with scratch_folder() as first, scratch_folder() as second:
        assert first.is_dir()
        assert second.is_dir()
    assert {each.name for each in parent.iterdir()} == {"something", f"{PREFIX}link"}


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    lock = fcntl.flock

    def lost_once(fd: int, how: int) -> None:
        made.append(os.readlink(f"/proc/self/fd/{fd}"))
        if len(made) == 1:
            Path(made[0]).rmdir()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", lost_once)
    with scratch_folder() as folder:
        assert str(folder) == made[1] != made[0]
