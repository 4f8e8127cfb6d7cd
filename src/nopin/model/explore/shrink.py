"""Shrinking: the shortest and plainest schedule that still breaks the same property.

Choice 0 is the ordinary one, and beyond the end of a script everything is ordinary. So a script gets shorter by cutting
its end, and plainer by turning choices into 0; dropping one in the middle moves those behind it forward. Each try is a
run; what still breaks the same is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from nopin.model.explore.guide import Guide
from nopin.model.explore.run import Breach, run_once
from nopin.model.explore.scenario import Scenario

MAX_TRIES = 1500


def shrink(scenario: Scenario, breach: Breach, *, jumps: bool = False) -> Breach:
    """Return a breach of the same property with the smallest script that was found."""
    best, tries = _bare(breach), 0
    improved = True
    while improved and tries < MAX_TRIES:
        improved = False
        for script in _smaller(best.choices):
            tries += 1
            again = run_once(scenario, Guide(script, jumps=jumps))
            if again is not None and again.which == breach.which:
                best, improved = _bare(Breach(again.which, again.detail, script)), True
                break
            if tries >= MAX_TRIES:
                break
    return best


def _bare(breach: Breach) -> Breach:
    """Take ordinary choices off the end."""
    choices = breach.choices
    while choices and choices[-1] == 0:
        choices = choices[:-1]
    return Breach(breach.which, breach.detail, choices)


def _smaller(script: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield what is smaller, the boldest first."""
    n = len(script)
    size = n // 2
    while size:
        for at in range(n - size, -1, -size):
            yield script[:at] + script[at + size :]
        for at in range(n - size, -1, -size):
            if any(script[at : at + size]):
                yield script[:at] + (0,) * size + script[at + size :]
        size //= 2
    for at in range(n):
        if script[at] > 1:
            yield (*script[:at], script[at] - 1, *script[at + 1 :])
