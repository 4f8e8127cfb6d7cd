"""Everybody at once on one arena, for a few seconds: every word that is read is one that could be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nopin.cli.main import main
from nopin.lab.stress.run import run_stress
from nopin.lab.stress.spec import N_ACTORS, StressFigures, StressSpec

pytestmark = pytest.mark.needs_userfaultfd


def assert_all_is_right(figures: StressFigures) -> None:
    assert not figures.violations, "\n".join(map(str, figures.violations))
    assert not figures.failures, "\n".join(figures.failures)
    assert figures.as_promised


@pytest.mark.timeout(120)
def test_every_read_finds_what_it_may(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", "--seed", "7", "--seconds", "4", "-j"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["violations"] == printed["failures"] == []
    assert len(printed["tallies"]) == N_ACTORS
    assert all(each["reads"] + each["writes"] for each in printed["tallies"])
    pager = printed["pager"]
    assert pager["evicted"] > printed["n_pages"]
    assert pager["swapped_in"]
    assert pager["lost"] == pager["refused"] == 0


@pytest.mark.timeout(150)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_read_finds_what_it_may_while_servers_are_killed(seed: int) -> None:
    said: list[str] = []
    figures = run_stress(StressSpec(seed, seconds=6, kills=2), said.append)
    assert_all_is_right(figures)
    assert figures.kills == len(said) == 2
    peers = [each for each in figures.tallies if each.who.endswith("peer")]
    assert all(each.operations["attached"] and each.reads for each in peers)


BREAK_A_RULE = """
import os
from nopin.model.explore.mutants import mutants
broken = mutants()[os.environ["NOPIN_TEST_MUTANT"]].applied()
broken.__enter__()  # for as long as this interpreter runs
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "mutant",
    [
        "clean_pages_are_brought_without_protection",
        "stores_go_on_while_a_page_is_copied",
        "entries_stay_when_their_pages_go",
        "what_devices_write_is_not_heard",
    ],
)
def test_a_server_that_breaks_a_rule_is_found_out(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK_A_RULE)
    monkeypatch.syspath_prepend(tmp_path)  # the processes of the run have it from us
    monkeypatch.setenv("NOPIN_TEST_MUTANT", mutant)
    figures = run_stress(StressSpec(3, seconds=20), print)
    assert figures.violations
    assert not figures.as_promised
