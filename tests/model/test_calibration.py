"""This host as a machine: kept with date and kernel, read back, and never taken for more than it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from nopin.lab import calibration
from nopin.lab.calibration import Calibration, calibration_path, measured_presets, store
from nopin.lab.floor import FloorFigure
from nopin.model.presets import THIS_HOST, preset_named


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def made(**figures: int) -> Calibration:
    return Calibration(date="2026-01-02T03:04:05+00:00", kernel="Linux 6.18", n_cpus=2, figures=figures)


def test_a_calibration_is_kept_under_the_state_home_and_read_back(state: Path) -> None:
    assert measured_presets() == {}
    assert store(made(pin_page_ns=77)) == calibration_path() == state / "nopin" / "this_host.json"
    preset = preset_named(THIS_HOST, measured_presets())
    assert preset.costs().pin_page_ns == 77
    rows = {row.name: row for row in preset.rows()}
    assert rows["pin_page_ns"].tag == "L"
    assert "Linux 6.18" in rows["pin_page_ns"].source
    assert not rows["pin_page_ns"].inherited
    assert rows["nic_resume_ns"].inherited


def test_a_file_that_cannot_be_read_or_names_what_is_gone_does_no_harm() -> None:
    store(made(pin_page_ns=5, furlongs_per_fortnight=3))
    assert preset_named(THIS_HOST, measured_presets()).costs().pin_page_ns == 5
    calibration_path().write_text("{not json")
    assert measured_presets() == {}


def test_a_run_measures_what_floors_can_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    floors = [
        FloorFigure(name=name, unit=unit, median=median, min=median, max=median, n_rounds=1)
        for name, unit, median in (
            ("memcpy_1048576", "bytes_per_s", 2e10),
            ("eventfd_pingpong", "ns", 50_000.0),
            ("eventfd_pingpong_one_cpu", "ns", 8_000.0),
            ("udp_crc", "bytes_per_s", 4e9),
        )
    ]
    monkeypatch.setattr(calibration, "measure_floors", lambda: floors)
    figures = calibration.calibrate().figures
    assert figures["wake_other_cpu_ns"] == 25_000
    assert figures["line_rate_bits_per_s"] == 32_000_000_000
    assert 0 < figures["cpu_minor_fault_read_ns"] < 1_000_000
    assert "nic_resume_ns" not in figures
