"""Comparisons: what each shows, on small settings; the command that runs them; the same results for any workers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nopin.cli.main import cli, main
from nopin.errors import UsageError
from nopin.lab.scenarios.registry import SCENARIOS, scenario_named
from nopin.lab.scenarios.scenario import Measures, run_points
from nopin.lab.sweep import Sweep
from nopin.model.presets import preset_named


def measured(name: str, **given: object) -> dict[str, Measures]:
    """Run a scenario whose settings have one value each; its measures by discipline."""
    scenario = scenario_named(name)
    settings = {key: str(value) for key, value in given.items()}
    points = scenario.points(preset_named(scenario.machine), [], settings, seed=1)
    assert len(points) == len(scenario.disciplines)
    return {result.point.discipline: result.measures for result in run_points(scenario, points)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_say_what_they_answer_and_what_can_be_set(name: str) -> None:
    scenario = scenario_named(name)
    assert scenario.name == name
    assert scenario.question.endswith("?")
    assert len(scenario.disciplines) > 1
    assert all(setting.values and setting.meaning for setting in scenario.settings.values())


def test_pinning_pays_for_size_and_on_demand_for_use() -> None:
    small, large = (measured("registration", size_bytes=size, used_pages=64) for size in ("64m", "1t"))
    assert large["pinned"]["total_ms"] > 1000 * small["pinned"]["total_ms"]
    assert large["pinned"]["fits"] == 0
    assert large["on_demand"]["total_ms"] == small["on_demand"]["total_ms"]
    assert large["on_demand"]["resident_bytes"] == 64 * 4096
    assert large["on_demand"]["device_faults"] == 4
    assert large["implicit"]["register_us"] == 0


def test_a_used_up_buffer_is_cheaper_pinned_and_a_sparse_one_on_demand() -> None:
    sparse, full = (measured("sparse", size_bytes="16m", used_permille=share) for share in (100, 1000))
    assert sparse["on_demand"]["total_ms"] < sparse["pinned"]["total_ms"]
    assert full["on_demand"]["total_ms"] > full["pinned"]["total_ms"]


def test_a_table_for_each_process_costs_no_mapping_and_shows_nobody_elses_memory() -> None:
    measures = measured("tenants", processes=16, pages=256)
    assert measures["pasid"]["requests_per_s"] > 3 * measures["v1_strict"]["requests_per_s"]
    assert measures["pasid"]["pinned_bytes"] == measures["pasid"]["reachable_by_others_bytes"] == 0
    assert measures["v1_static"]["reachable_by_others_bytes"] == 16 * 256 * 4096
    assert measures["pasid"]["resident_bytes"] < measures["v1_static"]["resident_bytes"]


def test_fences_waited_for_together_cost_one_wait() -> None:
    measures = measured("quiesce", pages=16, devices=2)
    assert 10 < measures["batched"]["total_ms"] <= measures["deferred"]["total_ms"] < 51
    assert measures["immediate"]["total_ms"] > 16 * 10
    assert measures["batched"]["fences"] == 2
    assert measures["deferred"]["fences"] == 32


def test_pages_that_a_device_uses_stay_when_it_is_asked() -> None:
    measures = measured("hot", hot_permille=250, memory_pages=256, scanned_pages=512)
    assert measures["protected"]["device_faults"] < measures["blind"]["device_faults"] / 2
    assert measures["protected"]["device_reads_per_s"] > measures["blind"]["device_reads_per_s"]


def test_young_bits_keep_what_refaults_alone_learn_too_late() -> None:
    measures = measured("residency", hot_permille=900, memory_pages=128, scanned_pages=512)
    assert measures["with_young"]["faulting_permille"] < measures["without"]["faulting_permille"] / 2
    assert measures["without"]["refaults"] > measures["with_young"]["refaults"]


def test_more_machines_start_on_demand_than_pinned() -> None:
    measures = measured("overcommit", vms=3, memory_pages=256)
    assert measures["pinned"]["vms_started"] == 2
    assert measures["on_demand"]["vms_started"] == 3
    assert measures["on_demand"]["requests_per_s"] > 1.3 * measures["pinned"]["requests_per_s"]


def test_results_are_the_same_whatever_the_number_of_workers() -> None:
    scenario = scenario_named("quiesce")
    points = scenario.points(preset_named(scenario.machine), [], {"pages": "1,2,3"}, seed=5)
    with Sweep(2) as sweep:
        assert run_points(scenario, points, sweep.map) == run_points(scenario, points)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model", "run", "overcommit", "--machine", "connectib56", "--discipline", "pinned,on_demand"]
    few = ["--set", "vms=2", "--set", "memory_pages=128", "--jobs", "1"]
    assert main([*words, *few, "-j"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(row["discipline"], row["vms"]) for row in results] == [("pinned", 2), ("on_demand", 2)]
    assert main([*words, *few]) == 0
    assert "vms_started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "overcomit"], "did you mean 'overcommit'"),
        (["run", "quiesce", "--discipline", "pinned"], "no discipline 'pinned'"),
        (["run", "quiesce", "--set", "pags=1"], "no setting 'pags'"),
        (["run", "quiesce", "--set", "pages"], "not name=value"),
        (["run", "quiesce", "--set", "pages=0"], "at least 1"),
        (["run", "hot", "--set", "hot_permille=2000"], "at most 1000"),
        (["run", "hot", "--set", "memory_pages=3"], "at least 64"),
        (["run", "residency", "--set", "memory_pages=64", "--set", "readers=40", "--jobs", "1"], "each hold a page"),
        (["list", "--machine", "conectx6"], "did you mean 'connectx6'"),
    ],
)
def test_wrong_words_say_what_there_is(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_is_listed_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "list", "--machine", "part_arm_fpga", "-j"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["parameters"]}
    assert rows["nic_resume_ns"] | {"meaning": ""} == {
        "name": "nic_resume_ns",
        "value": 1000,
        "tag": "P",
        "source": "PART, retransmit request",
        "meaning": "",
        "inherited": False,
    }
    assert rows["pin_ns"]["inherited"] is True


def test_cost_parameters_can_be_set_and_wrong_values_are_refused() -> None:
    slow = measured("registration", size_bytes="16m", used_pages=16, pin_page_ns="1us")
    assert (
        slow["pinned"]["register_us"]
        > measured("registration", size_bytes="16m", used_pages=16)["pinned"]["register_us"]
    )
    with pytest.raises(UsageError, match="is not a value"):
        measured("registration", size_bytes="large")


def test_parking_keeps_the_line_busy_where_rnr_waits_and_sends_again() -> None:
    came = measured("responder", spacing=256, faults=3, packets=768, rnr_code=12, mtu=4096)
    assert came["parking"]["gbit_per_s"] > 5 * came["rnr"]["gbit_per_s"]
    assert came["parking"]["rnr_naks"] == came["parking"]["resent_packets"] == 0
    assert came["rnr"]["rnr_naks"] == 3
    assert came["rnr"]["resent_packets"] > 16


PAGE = (Path(__file__).parents[2] / "docs" / "comparisons.md").read_text()


def test_the_page_names_every_scenario_and_its_commands_exist() -> None:
    for name in SCENARIOS:
        assert f"| `{name}` |" in PAGE
    words = [shlex.split(line, comments=True) for line in re.findall(r"^nopin .*$", PAGE, re.MULTILINE)]
    assert len(words) > 5
    for _, group, *rest in words:
        command = cli.get_command(click.Context(cli), group)
        assert isinstance(command, click.Group)
        sub = command.get_command(click.Context(command), rest[0])
        assert sub is not None
        sub.make_context(rest[0], rest[1:])


def test_the_program_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out == "219.4\n"


def test_the_table_of_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert main(["model", "run", "overcommit", "--set", "vms=4", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == shown


def test_a_seed_gives_the_same_results_in_every_process() -> None:
    words = ["-m", "nopin", "model", "run", "hot", "--set", "hot_permille=250", "--set", "memory_pages=128"]
    few = ["--set", "scanned_pages=256", "--seed", "3", "--jobs", "1", "-j"]
    printed = {
        subprocess.run(
            [sys.executable, *words, *few],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "7")
    }
    assert len(printed) == 1
