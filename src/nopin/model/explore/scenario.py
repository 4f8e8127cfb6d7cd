"""Scenarios: small pieces of work whose every order is worth looking at, by name.

A scenario is a function that is given a `World`, builds in it, spawns actors and says what must hold:

    @scenario("fill_vs_reclaim")
    def fill_vs_reclaim(world: World) -> None:
        '''A device fills its mirror while the page is reclaimed.'''
        ...
        world.spawn("device", device())
        world.spawn("kernel", reclaim())
        world.always(oracle.look)
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nopin.errors import UsageError
from nopin.model.explore.world import World

MODULES = ("host", "file", "huge", "pressure", "arena", "nic", "takeover")
"""Modules of `nopin.model.explore.scenarios` that define some."""

Build = Callable[[World], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One of them.

    Attributes:
        about: in a sentence.
    """

    name: str
    build: Build
    about: str


_REGISTRY: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Build], Build]:
    """Register a scenario under a name; its docstring says what it is about."""

    def register(build: Build) -> Build:
        add(name, build, (build.__doc__ or "").strip().split("\n")[0])
        return build

    return register


def add(name: str, build: Build, about: str) -> None:
    """Register a scenario that was made rather than written."""
    assert name not in _REGISTRY, f"two scenarios are called {name}"
    _REGISTRY[name] = Scenario(name, build, about)


def scenarios() -> dict[str, Scenario]:
    """Return all scenarios by name, in the order in which they were written."""
    for module in MODULES:
        importlib.import_module(f"nopin.model.explore.scenarios.{module}")
    return dict(_REGISTRY)


def named(name: str) -> Scenario:
    """Return a scenario: one of ours, or ``FILE.py:NAME``, of a file of a user's own.

    Raises:
        UsageError: there is none of that name.
    """
    path, _, own = name.rpartition(":")
    if path.endswith(".py"):
        return replace(named(_load(Path(path), own)), name=name)
    known = scenarios()
    if name not in known:
        raise UsageError(f"no scenario '{name}'; nopin explore --list shows what there is")
    return known[name]


def _load(path: Path, name: str) -> str:
    """Run a file of scenarios, once; returns the name."""
    module = f"scenarios of {path}"
    if module not in sys.modules:
        if not path.is_file():
            raise UsageError(f"no file {path}")
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None, "its name ends in .py"
        sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    if name not in _REGISTRY:
        raise UsageError(f"{path} defines no scenario '{name}'")
    return name
