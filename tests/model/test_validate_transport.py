"""Published experiments about faults and transport timers: the visible targets are met."""

from __future__ import annotations

import pytest

from nopin.lab.validate.registry import Report, experiment_named, run_experiment


def assert_targets_met(report: Report) -> None:
    missed = [f"{row.label}: {row.predicted} for {row.published}" for row in report.rows if row.passed is False]
    assert not missed
    assert any(row.passed for row in report.rows)


@pytest.mark.parametrize("seed", [0])
def test_v1_fault_stages_add_up_as_published(seed: int) -> None:
    report = run_experiment(experiment_named("V1"), changes={"n_samples": 600}, seed=seed)
    assert_targets_met(report)
    rows = {row.label: row.predicted for row in report.rows}
    assert rows["4 MB, a page a request: message"] > 220
    assert rows["4 KB, 16 senders: p50"] > 3 * rows["4 KB: p50"], "four contexts for sixteen senders"


def test_v5_connections_give_up_when_the_card_does() -> None:
    report = run_experiment(experiment_named("V5"))
    assert_targets_met(report)
    rows = {row.label: row.predicted for row in report.rows}
    for label in ("RNR exhausted, code 12, rnr_retry 6", "ACK exhausted, floor off, T=8"):
        assert rows[f"{label}, on this host's clock"] > 0.99 * rows[label], "a clock cannot be early"
