"""Published experiments about faults and transport timers: the visible targets are met."""

from __future__ import annotations

import pytest

from nopin.lab.faulty_stream import run_stream
from nopin.lab.validate.registry import Report, experiment_named, run_experiment
from nopin.lab.validate.v2_stream import EXPERIMENT as V2
from nopin.lab.validate.v2_stream import Curve, stream_of
from nopin.model.presets import preset_named
from nopin.units import US_NS


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


WAIT_NS = round(V2.parameters["rnr_wait_4096_ns"].value)
COSTS = preset_named(V2.machine).costs()
PACKET_NS = 4096 * 8 / 47.8


def stream(exponent: int, n_faults: int, *, wait_ns: int = WAIT_NS) -> float:
    """Return what a fault costs, in nanoseconds."""
    n_packets = n_faults << exponent
    taken_ns = run_stream(stream_of(COSTS, 4096, wait_ns, 1 << exponent, n_packets)).taken_ns
    return (taken_ns - n_packets * PACKET_NS) / n_faults


def test_v2_a_fault_costs_the_rnr_wait_and_what_was_in_flight() -> None:
    cost_ns = stream(8, 8)
    assert WAIT_NS < cost_ns < WAIT_NS + 50 * US_NS


def test_v2_a_wait_shorter_than_the_fault_service_is_taken_again() -> None:
    wait_ns = 90 * US_NS
    cost_ns = stream(8, 8, wait_ns=wait_ns)
    assert 3 * wait_ns < cost_ns < 3 * wait_ns + 50 * US_NS, "219 us of service: the third retry finds the page"


def test_v2_is_calibrated_at_one_point_and_beyond_it_the_sum_is_what_a_whole_run_gives() -> None:
    curve = Curve(4096, PACKET_NS, {12: stream(12, 4)})
    assert curve.gbits_per_s(12) == pytest.approx(19.15, rel=0.005)
    whole = Curve(4096, PACKET_NS, {13: stream(13, 2)})
    assert curve.gbits_per_s(13) == pytest.approx(whole.gbits_per_s(13), rel=0.005)
    assert -13 < curve.half_at() < -12
