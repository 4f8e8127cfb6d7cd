"""Counter-examples as files: all that is needed to see it again, and to see that it is the same."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nopin.errors import UsageError
from nopin.model.explore.guide import Guide
from nopin.model.explore.mutants import mutant_named
from nopin.model.explore.run import Breach, run_once
from nopin.model.explore.scenario import named
from nopin.model.trace import Trace

FORMAT = 1


class CounterExample(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule that breaks a property.

    Attributes:
        scenario, mutant: what was run; None for the code as it is.
        jumps: timers may overtake what is ready (see `Chooser`).
        choices: of the guide, from the first; beyond them all is ordinary.
        property: that is broken. detail: what was seen.
        trace: hash of all events, by which a replay knows that it saw the same.
        seed: of the drawn run that found it; None if it was found by search.
        version: of nopin.
    """

    scenario: str
    mutant: str | None
    jumps: bool
    choices: list[int]
    property: str
    detail: str
    trace: str
    seed: int | None
    version: str
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Replayed:
    """A schedule run again.

    Attributes:
        breach: what it breaks now.
        turns: events before which the choice was not the ordinary one.
    """

    breach: Breach | None
    trace: Trace
    turns: list[int]


def replay(example: CounterExample, *, keep: bool = True) -> Replayed:
    """Run a schedule again, as it is stored, with what it broke."""
    guide, trace = Guide(example.choices, jumps=example.jumps), Trace(keep=keep)
    with mutant_named(example.mutant).applied() if example.mutant else nullcontext():
        breach = run_once(named(example.scenario), guide, trace)
    return Replayed(breach, trace, guide.turns)


def save(example: CounterExample, path: Path) -> None:
    """Write a counter-example."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(example), indent=1) + b"\n")


def load(path: Path) -> CounterExample:
    """Read one.

    Raises:
        UsageError: it is none, or of another format.
    """
    try:
        example = msgspec.json.decode(path.read_bytes(), type=CounterExample)
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from None
    except msgspec.DecodeError as problem:
        raise UsageError(f"{path} is no counter-example: {problem}") from None
    if example.format != FORMAT:
        raise UsageError(f"{path} is of format {example.format}; this nopin reads {FORMAT}")
    return example
