"""Validation: the framework's rows, and the mechanisms of each experiment on small cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from nopin.cli.main import main
from nopin.errors import UsageError
from nopin.lab.sweep import Sweep
from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.lab.validate.registry import MODULES, experiment_named, run_experiment
from nopin.lab.validate.v7_uffd import Machine, run_machine


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
    assert report.parameters == {"mine": 5, "pin_ns": 10}
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
    fast = ["--set", "V7.draft_fault_ns=1000", "--set", "V7.umap_pages=256", "--jobs", "1"]
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
