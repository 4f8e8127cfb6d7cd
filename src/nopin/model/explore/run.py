"""One run of a scenario under a guide, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from nopin.model.explore.guide import Guide
from nopin.model.explore.scenario import Scenario
from nopin.model.explore.world import World
from nopin.model.oracle.violation import Violation
from nopin.model.trace import Trace


class Abandoned(BaseException):
    """The guide has seen what would follow; raised out of `choose` to end the run."""


@dataclass(frozen=True, slots=True)
class Breach:
    """What a run broke.

    Attributes:
        which: the property, by name (`oracle.violation.PROPERTIES`).
        detail: what was seen.
        choices: that lead to it.
    """

    which: str
    detail: str
    choices: tuple[int, ...]


def run_once(scenario: Scenario, guide: Guide, trace: Trace | None = None) -> Breach | None:
    """Run a scenario; returns what it broke, if anything.

    Raises:
        Abandoned: the guide did.
    """
    world = World(guide, trace)
    try:
        scenario.build(world)
        guide.world = world
        world.run()
    except Violation as seen:
        which, detail = seen.which, seen.detail
    except AssertionError as seen:
        which, detail = "assertion", str(seen) or _where(seen)
    except Exception as seen:
        which, detail = "crash", f"{type(seen).__name__}: {seen} ({_where(seen)})"
    else:
        return None
    world.note("-", f"{which}: {detail}")
    return Breach(which, detail, tuple(guide.choices))


def _where(seen: BaseException) -> str:
    """Name the innermost function that raised."""
    traceback = seen.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f"in {traceback.tb_frame.f_code.co_qualname}, line {traceback.tb_lineno}"
