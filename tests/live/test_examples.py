"""Every program of examples/ runs, and prints what it is there to show."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import owner, said

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(environment: dict[str, str], name: str, *arguments: str) -> str:
    return said(environment, str(EXAMPLES / name), *arguments)


def test_an_array_is_shared_written_and_added_up(environment: dict[str, str]) -> None:
    with owner(environment, str(EXAMPLES / "share_array.py")) as sharing:
        assert "row 10 begins [1. 0. 1. 0. 1. 0.]" in run(environment, "attach_array.py", sharing.url)
        assert run(environment, "many_at_once.py", sharing.url) == "the sum is 5000.0\n"
        assert sharing.go_on().endswith("The sum is now 5000.0\n")


@pytest.mark.needs_userfaultfd
def test_an_accelerator_adds_up_what_does_not_fit(environment: dict[str, str]) -> None:
    said = run(environment, "accelerator_sum.py").splitlines()
    assert said[0] == "The sum is 8388608.0"
    assert all("page faults" in line for line in said[1:3])


def test_two_queue_pairs_play_ping_pong(environment: dict[str, str]) -> None:
    assert run(environment, "verbs_pingpong.py").startswith("1000 rounds of 64 bytes: ")


def test_a_program_is_tested_on_a_lossy_wire(environment: dict[str, str], tmp_path: Path) -> None:
    written, right = run(environment, "verbs_under_loss.py", str(tmp_path / "wire.pcapng")).splitlines()
    assert int(written.split()[3]) > 0, "nothing was lost"
    assert right == "every byte is right"
    assert (tmp_path / "wire.pcapng").stat().st_size > 100 * (64 << 10)


@pytest.mark.needs_userfaultfd
def test_faults_and_invalidations_are_watched(environment: dict[str, str]) -> None:
    shared, read, again, event, dropped, zeros, once_more = run(environment, "watch_faults.py").splitlines()
    counts = [line.partition("page faults ")[2] for line in (shared, read, again, dropped, once_more)]
    assert counts == [f"{n}, invalidations {k}" for n, k in ((0, 0), (4, 0), (4, 0), (4, 2), (5, 2))]
    assert event.strip().startswith("REGION_INVALIDATED: remove ")
    assert "[0 0 0 0]" in zeros


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source] == []
