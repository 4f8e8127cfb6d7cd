"""Mutants: the code with one rule broken, on purpose.

An exploration that finds nothing says little unless it finds something when the code is wrong. Each mutant patches one
method of the real code (or of the model's kernel) so that one rule no longer holds, and names the scenarios that must
see it. They are applied to the running program, and taken back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from nopin.errors import UsageError

MODULES = ("mirror", "host", "arena", "nic", "takeover")
"""Modules of `nopin.model.explore.broken` that define some."""


class Patch(Protocol):
    """Sets attributes until further notice; pytest's `MonkeyPatch` is one."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        """Set one."""
        ...


Break = Callable[[Patch], None]


class _Patch:
    """Remembers what was there."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self._before.append((target, name, vars(target)[name]))
        setattr(target, name, value)

    def undo(self) -> None:
        for target, name, value in reversed(self._before):
            setattr(target, name, value)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One of them.

    Attributes:
        rule: what it breaks, in a sentence.
        scenarios: that must see it, the likeliest first.
        n_faults: trouble needed to see it.
    """

    name: str
    rule: str
    scenarios: tuple[str, ...]
    break_rule: Break
    n_faults: int = 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the rule broken."""
        patch = _Patch()
        try:
            self.break_rule(patch)
            yield
        finally:
            patch.undo()


_REGISTRY: dict[str, Mutant] = {}


def mutant(*scenarios: str, n_faults: int = 0) -> Callable[[Break], Break]:
    """Register a function that breaks a rule; its docstring says which."""

    def register(break_rule: Break) -> Break:
        name = break_rule.__name__
        assert name not in _REGISTRY, f"two mutants are called {name}"
        rule = (break_rule.__doc__ or "").strip()
        _REGISTRY[name] = Mutant(name, rule, scenarios, break_rule, n_faults)
        return break_rule

    return register


def mutants() -> dict[str, Mutant]:
    """Return all mutants by name."""
    for module in MODULES:
        importlib.import_module(f"nopin.model.explore.broken.{module}")
    return dict(_REGISTRY)


def mutant_named(name: str) -> Mutant:
    """Return a mutant.

    Raises:
        UsageError: there is none of that name.
    """
    known = mutants()
    if name not in known:
        raise UsageError(f"no mutant '{name}'; nopin explore --list shows what there is")
    return known[name]
