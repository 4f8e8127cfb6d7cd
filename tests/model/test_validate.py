"""Validation: the framework's rows, and the mechanisms of each experiment on small cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nopin.cli.main import main
from nopin.errors import UsageError
from nopin.lab.sweep import Sweep
from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.lab.validate.page import section_of
from nopin.lab.validate.registry import MODULES, experiment_named, run_experiment
from nopin.lab.validate.v3_cold_ring import Outcome, run_cold_start
from nopin.lab.validate.v3_ethernet import cold_start
from nopin.lab.validate.v3_stream import Stream, throughput
from nopin.lab.validate.v4_overcommit import Machines, requests_per_s
from nopin.lab.validate.v6_part import Transfer, run_transfer
from nopin.lab.validate.v7_uffd import Machine, run_machine
from nopin.lab.validate.v8_gpu import Sgemm, run_sgemm
from nopin.lab.validate.v8_prefetch import cold_starts
from nopin.lab.validate.v8_snapshot import run_starts
from nopin.model.costs import Costs
from nopin.model.presets import preset_named


def test_a_row_passes_by_its_tolerance_and_a_held_out_one_never_judges() -> None:
    assert Row("a", "us", 104, 100, 0.05).passed is True
    assert Row("a", "us", 106, 100, 0.05).passed is False
    assert Row("a", "us", 106, 100).passed is None
    held_out = Row("a", "us", 106)
    assert held_out.held_out
    assert held_out.passed is None
    assert held_out.as_json()["published"] == "held out"


def test_parameters_of_experiment_and_machine_can_be_changed_by_name() -> None:
    def run(settings: Settings) -> list[Row]:
        return [Row("sum", "", settings["mine"] + settings.costs.pin_ns)]

    experiment = Experiment("T", "test", "connectib56", "none", run, {"mine": Parameter(1, "", "X", "test")})
    report = run_experiment(experiment, changes={"mine": 5, "pin_ns": 10})
    assert report.rows[0].predicted == 15
    assert {name: each.value for name, each in report.parameters.items()} == {"mine": 5, "pin_ns": 10}
    assert report.as_json()["parameters"]["pin_ns"]["source"] == "set for this run"
    with pytest.raises(UsageError, match="no parameter 'yours'"):
        run_experiment(experiment, changes={"yours": 5})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_parameter_of_an_experiment_has_its_evidence(name: str) -> None:
    experiment = experiment_named(name)
    assert experiment.name == name
    assert all(each.tag and each.source for each in experiment.parameters.values())


def test_a_sweep_gives_the_same_results_whatever_the_number_of_workers() -> None:
    points = [Machine(4, 10_000, 20, 50, 100_000, n, 2, 8) for n in (1, 5, 9)]
    with Sweep(1) as alone, Sweep(2) as together:
        assert alone.map(run_machine, points) == together.map(run_machine, points)


def test_one_fault_takes_what_it_was_calibrated_on_and_waiters_make_each_dearer() -> None:
    one = run_machine(Machine(16, 10_000, 30, 0, 700_000, 1, 1, 1))
    assert one == pytest.approx(10_000, rel=0.01)
    few = run_machine(Machine(16, 10_000, 30, 0, 700_000, 8, 1, 16)) / 8
    many = run_machine(Machine(16, 10_000, 30, 0, 700_000, 128, 1, 16)) / 128
    assert many > few + 100 * 30 * 16


def test_the_command_exits_with_1_when_a_visible_target_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    fast = ["--set", "V7.draft_fault_ns=1000", "--set", "V7.umap_pages=256", "--set", "V7.draft_pages=2", "--jobs", "1"]
    assert main(["validate", "V7", *fast]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_a_wrong_experiment_or_parameter_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "V99"]) == 2
    assert main(["validate", "V7", "--set", "nothing=1"]) == 2
    assert "V7.nothing" in capsys.readouterr().err


def test_plots_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    from nopin.errors import HostLacks
    from nopin.lab.plot import plot
    from nopin.lab.scenarios.registration import SCENARIO

    with pytest.raises(HostLacks, match="pip install"):
        plot(SCENARIO, [], tmp_path / "x.svg")


def part(n_pages: int, scheme: str = "PIO", **others: Any) -> float:
    """The latency of a transfer, in microseconds."""
    given = {name: round(each.value) for name, each in experiment_named("V6").parameters.items()}
    return run_transfer(Transfer(n_pages, scheme, given=given | {"link_bits_per_s": 10**10}, **others)) / 1_000


def test_a_page_that_was_absent_costs_its_stages_and_a_resend() -> None:
    clean, faulted = part(1, absent_permille=0), part(1)
    assert clean == pytest.approx(4 + 0.6 + 3.3 + 0.3, abs=0.1)
    assert faulted == pytest.approx(4 + 0.6 + 1 + 8 + 4 + 7 + 1 + 6 + 0.3, abs=0.2)


def test_without_err_the_timeout_recovers_and_with_many_pages_it_overlaps_paging_and_transfer() -> None:
    assert part(1, errs=False, timeout_ns=100_000) == pytest.approx(3 + 3.3 + 100 + 1.6 + 3.3 + 0.3, abs=0.5)
    serial, overlapped = part(1024, "PIA", timeout_ns=0), part(1024, "PIA", timeout_ns=100_000)
    assert 1.7 < serial / overlapped < 1.92


def test_bringing_more_at_a_time_is_faster_when_all_is_absent() -> None:
    assert part(64, "PIA") < part(64, "PI4") < part(64, "PIO")


def stream(*, backup: bool, exponent: int, major: bool = False) -> float:
    costs = preset_named("connectx3").costs()
    return throughput(Stream(costs, backup, major, exponent, 1_448, 65_535, 40_000, 1_000, 50, 0))


def test_a_dropped_packet_costs_a_timeout_and_one_in_the_backup_ring_a_fault() -> None:
    lost = 2**12 * 1_448 * 8 / (0.2e9 + 2**12 * 965)
    assert stream(backup=False, exponent=12) == pytest.approx(lost, rel=0.3)
    assert stream(backup=True, exponent=12) > 10
    assert stream(backup=True, exponent=12, major=True) < stream(backup=True, exponent=12)
    assert stream(backup=True, exponent=24) == pytest.approx(12, rel=0.001)


def cold(policy: str, n_entries: int) -> Outcome:
    experiment = experiment_named("V3")
    settings = Settings(preset_named("connectx3").costs(), experiment.values({}))
    return run_cold_start(cold_start(settings, policy, n_entries))


def test_a_cold_ring_costs_minutes_when_packets_are_dropped_and_milliseconds_with_a_backup_ring() -> None:
    assert cold("drop", 64).done_ns(10_000) > 20 * 10**9
    kept, pinned = cold("backup", 64), cold("pin", 64)
    assert kept.done_ns(10_000) < pinned.done_ns(10_000) + 20 * 10**6
    assert kept.n_failed == pinned.n_failed == 0


def test_the_ssd_of_the_model_has_its_three_published_points() -> None:
    vanilla, parallel, reap = (
        run_starts(cold_starts(Settings(Costs(), experiment_named("V8").values({})), variant, 1))
        for variant in ("vanilla", "parallel", "reap")
    )
    assert vanilla.bytes_per_s == pytest.approx(32e6, rel=0.02)
    assert parallel.bytes_per_s == pytest.approx(360e6, rel=0.02)
    assert reap.bytes_per_s == pytest.approx(850e6, rel=0.02)
    assert reap.mean_ns["total"] < parallel.mean_ns["total"] < vanilla.mean_ns["total"]


def test_the_tree_brings_a_block_in_few_batches() -> None:
    settings = {"blocks_per_batch_permille": 7_000, "faults_per_block_permille": 9_800, "first_use_ns": 0, "seed": 0}
    off, on = (run_sgemm(Sgemm(Costs(), prefetch, 2_048, **settings)) for prefetch in (False, True))
    assert on.n_batches < off.n_batches / 5
    assert off.n_faults == 24 * 512


def test_machines_that_share_cpus_serve_less_than_their_sum() -> None:
    one, four = (requests_per_s(Machines(n, 4, 5_000, 500, 40_000, 16)) for n in (1, 4))
    assert one == pytest.approx(200_000, rel=0.05)
    assert 3.4 < four / one < 3.8


@pytest.mark.parametrize("name", ["V4", "V6"])
def test_the_page_of_predictions_is_what_a_run_gives(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()
    assert section_of(run_experiment(experiment_named(name))) in page, "nopin validate --page docs/validation.md"


def test_the_page_has_every_experiment_with_the_parameters_it_would_run_with() -> None:
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()
    for name in MODULES:
        experiment = experiment_named(name)
        assert f"## {name}: {experiment.title}" in page
        for parameter, known in experiment.parameters.items():
            assert f"| `{parameter}` | {known.value:,.10g}" in page, f"{name}: {parameter} is another on the page"
