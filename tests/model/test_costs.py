"""Cost parameters and presets: named, sourced, overridable; published stages come out."""

from __future__ import annotations

import pytest

from nopin.errors import UsageError
from nopin.model.costs import Costs, fields_of, override, parse_value
from nopin.model.presets import BASE, OVERLAYS, PRESETS, preset_named

TAGS = {"P", "A", "S", "C", "L", "D", "X"}


def test_every_parameter_has_a_kind_of_evidence_and_a_source() -> None:
    fields = fields_of()
    assert len(fields) > 80
    assert all(each.tag in TAGS and each.source for each in fields)
    assert fields[0].name == "nic_fault_report_ns"


def test_the_published_fault_and_invalidation_come_out_of_their_stages() -> None:
    costs = Costs()
    assert costs.fault_service_ns(1) == pytest.approx(219_300, rel=0.001)
    assert costs.fault_service_ns(1024) == pytest.approx(356_000, rel=0.01)
    assert costs.invalidate_ns(1) == pytest.approx(16_900, rel=0.01)
    assert costs.invalidate_ns(1024) == pytest.approx(60_900, rel=0.01)
    assert costs.invalidate_ns(1024, mapped=False) == 2_700


def test_an_override_changes_one_parameter_and_an_unknown_name_says_what_was_meant() -> None:
    changed = override(Costs(), {"pin_page_ns": 100})
    assert changed.pin_page_ns == 100
    assert changed.pin_ns == Costs().pin_ns
    with pytest.raises(UsageError, match=r"no cost parameter; did you mean pin_page_ns"):
        override(Costs(), {"pin_pages": 1})
    with pytest.raises(UsageError, match="cannot be negative"):
        override(Costs(), {"pin_page_ns": -1})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("pin_ns", "20", 20), ("pin_ns", "1.5us", 1_500), ("disk_ns", "8ms", 8_000_000), ("size_bytes", "1g", 1 << 30)],
)
def test_values_are_read_with_their_units(name: str, text: str, value: int) -> None:
    assert parse_value(name, text) == value


def test_a_value_that_is_none_is_refused_with_an_example() -> None:
    with pytest.raises(UsageError, match=r"1\.5ms"):
        parse_value("pin_ns", "soon")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_complete_and_say_what_they_inherit(name: str) -> None:
    preset = preset_named(name)
    rows = {row.name: row for row in preset.rows()}
    assert set(rows) == {each.name for each in fields_of()}
    assert all(row.tag in TAGS and row.source for row in rows.values())
    inherited = {row.name for row in rows.values() if row.inherited}
    assert inherited == (set() if name == BASE else set(rows) - set(preset.figures))
    costs = preset.costs()
    assert all(getattr(costs, row.name) == row.value for row in rows.values())


def test_an_overlay_changes_any_preset() -> None:
    slow = preset_named("connectx6+slow_quiesce")
    assert slow.costs().device_quiesce_max_ns == 50_000_000
    assert slow.costs().line_rate_bits_per_s == PRESETS["connectx6"].costs().line_rate_bits_per_s
    assert set(OVERLAYS) == {"slow_quiesce"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("conectx6", "did you mean 'connectx6'"), ("connectx6+slow", "overlay"), ("this_host", "nopin model calibrate")],
)
def test_a_machine_that_is_not_there_is_a_usage_error(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preset_named(name)
