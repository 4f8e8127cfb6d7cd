"""Which scenarios there are."""

from __future__ import annotations

import difflib
import importlib

from nopin.errors import UsageError
from nopin.lab.scenarios.scenario import Scenario

SCENARIOS = ("registration", "sparse", "tenants", "quiesce", "hot", "residency", "overcommit", "responder")
"""Each is `SCENARIO` of the module of that name."""


def scenario_named(name: str) -> Scenario:
    """Return a scenario.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in SCENARIOS:
        close = difflib.get_close_matches(name, SCENARIOS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(SCENARIOS)}"
        raise UsageError(f"no scenario {name!r}; {hint}")
    found = importlib.import_module(f"nopin.lab.scenarios.{name}").SCENARIO
    assert isinstance(found, Scenario)
    return found
