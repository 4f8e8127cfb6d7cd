"""The digest of a state: two moments with the same digest have the same futures.

It is taken by walking everything that can be reached from a world, as the garbage collector would: objects by their
fields, closures by their cells, suspended generators by where they stand, their locals and what lies on their stack
(an iterator of a `for` loop is nowhere else). So nobody has to say what belongs to the state, and code under test that
grows a field is covered without being told. What is left out is told below, by class and field, and only what
the future cannot depend on: traces, counts of steps, statistics.

Errors are on one side only: a state that differs in something irrelevant (a counter not told of) is explored twice.
Times count from now, and steps that are ready count as a set.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from random import Random
from typing import Any

import numpy as np

from nopin.iommu.mirror import Mirror
from nopin.mm.arena_pages import ArenaPages
from nopin.mm.notifier import Notifiers
from nopin.model.arena.machine import ArenaMachine
from nopin.model.device.engine import Engine
from nopin.model.device.faults import ProcessFaults
from nopin.model.explore.guide import Guide
from nopin.model.explore.world import World
from nopin.model.host.table import Table
from nopin.model.net.link import Link
from nopin.model.net.nic_host import NicHost
from nopin.model.scheduler import Scheduler, Task
from nopin.model.trace import Trace
from nopin.nic.core import Core
from nopin.nic.mr import Region

_IGNORED: dict[type, frozenset[str]] = {
    World: frozenset({"trace", "guide"}),
    Scheduler: frozenset({"trace", "chooser", "n_steps", "_n_put", "now_ns", "_heap", "_ready"}),
    Mirror: frozenset({"_statistics"}),
    ArenaPages: frozenset({"counts"}),
    ProcessFaults: frozenset({"n_faults"}),
    Engine: frozenset({"_n_dropped_before"}),
    ArenaMachine: frozenset({"n_effects"}),
    Core: frozenset({"counters", "plan", "scratch"}),
    NicHost: frozenset({"n_turns", "events", "_n_faults"}),
    Link: frozenset({"statistics"}),
    Region: frozenset({"meter"}),
    Notifiers: frozenset({"_by_cause", "_n_vetoes", "_n_agains", "_n_fences"}),
}
"""Fields that no future depends on."""

_UNINITIALISED = {"_read": "whole"}
"""Locals of procedures that hold whatever was in memory, until they are written: in `mm/bring.py`, with what is in swap
and stays there meanwhile."""

_OPAQUE: tuple[type, ...] = (
    type,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    Trace,
    Guide,
)
"""What is the same in every run, or does not count."""

_ITERATORS: tuple[type, ...] = (
    type(iter([])),
    type(iter(())),
    type(iter(range(1))),
    type(iter(range(1 << 70))),
    type(iter({})),
    type(iter({}.values())),
    type(iter({}.items())),
    type(iter("")),
    type(iter(b"")),
    type(reversed([])),
    enumerate,
    zip,
    itertools.chain,
    itertools.repeat,
    itertools.count,
    itertools.islice,
    map,
    filter,
)

_SPARSE = 32
"""From this length lists of mostly None are written by what else is in them."""

_Note = Callable[["_Walk", Any], None]


def digest_of(world: World) -> bytes:
    """Return 16 bytes that tell the state of a world between two steps."""
    walk = _Walk()
    walk.visit(world)
    walk.visit_scheduler(world.scheduler)
    return hashlib.blake2b("\x1f".join(walk.out).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Walk:
    """Writes what it sees as text; an object seen before as its number."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no number is given to two objects

    def visit(self, what: Any) -> None:
        """Write an object and all it leads to."""
        kind = type(what)
        if kind in _ATOMS:
            self.out.append(repr(what))
            return
        number = self._seen.get(id(what))
        if number is not None:
            self.out.append(f"@{number}")
            return
        self._seen[id(what)] = len(self._seen)
        self._kept.append(what)
        note = _NOTES.get(kind)
        if note is None:
            note = _NOTES[kind] = _choose_note(kind)
        note(self, what)

    def visit_all(self, members: Iterable[Any]) -> None:
        """Write objects one after the other."""
        append, visit = self.out.append, self.visit
        for each in members:
            if type(each) in _ATOMS:  # without a call: most are
                append(repr(each))
            else:
                visit(each)

    def visit_scheduler(self, scheduler: Scheduler) -> None:
        """Write what is to be done: what is ready now as a set, the rest in order of time."""
        ready = [what for what in scheduler._ready if not _is_void(what)]
        later = [(at_ns - scheduler.now_ns, what) for at_ns, _, what in sorted(scheduler._heap) if not _is_void(what)]
        ready.sort(key=attrgetter("name"))
        for delay_ns, what in (*((0, what) for what in ready), *later):
            self.out.append(f"step {delay_ns}")
            self.visit(what)


def _is_void(what: Any) -> bool:
    return what.ended if isinstance(what, Task) else what.callback is None


def _note_sequence(walk: _Walk, what: Any) -> None:
    walk.out.append(f"{type(what).__name__}{len(what)}")
    walk.visit_all(what)


def _note_list(walk: _Walk, what: list[Any]) -> None:
    if len(what) > _SPARSE and what.count(None) > len(what) // 2:  # the leaf of a page table, say
        walk.out.append(f"sparse{len(what)}")
        for at, each in enumerate(what):
            if each is not None:
                walk.out.append(str(at))
                walk.visit(each)
        return
    _note_sequence(walk, what)


def _note_dict(walk: _Walk, what: Any) -> None:
    walk.out.append(f"dict{len(what)}")
    walk.visit_all(what)
    walk.visit_all(what.values())


def _note_table(walk: _Walk, what: Table) -> None:
    walk.out.append(f"table{len(what)}")
    for page, entry in sorted(what._entries.items(), key=itemgetter(0)):  # in whatever order they were made
        walk.out.append(str(page))
        walk.visit(entry)
    walk.visit(what._huge)


def _note_set(walk: _Walk, what: Any) -> None:
    walk.out.append(f"set{len(what)}")
    try:
        members = sorted(what)
    except TypeError:  # objects, whose order in the set is by address: count them as their kinds
        members = sorted(type(each).__name__ for each in what)
    for each in members:
        walk.visit(each)


def _note_bytes(walk: _Walk, what: Any) -> None:
    walk.out.append(bytes(what).hex() if len(what) < 64 else hashlib.blake2b(what, digest_size=16).hexdigest())


def _note_array(walk: _Walk, what: np.ndarray[Any, Any]) -> None:
    walk.out.append(f"{what.dtype}{what.shape}")
    _note_bytes(walk, what.tobytes())


def _note_memoryview(walk: _Walk, what: memoryview) -> None:
    _note_bytes(walk, what.tobytes())


def _note_generator(walk: _Walk, what: types.GeneratorType[Any, Any, Any]) -> None:
    frame = what.gi_frame
    walk.out.append(what.__qualname__)
    if frame is None:
        walk.out.append("over")
        return
    known = frame.f_locals
    walk.out.append(f"{frame.f_lasti} {','.join(known)}")
    code, left_out = what.gi_code, known.get(_UNINITIALISED.get(what.__qualname__, ""))
    for each in gc.get_referents(what):
        kind = type(each)
        if kind is types.CodeType or kind is types.FrameType or each is known:
            continue
        own = kind is types.FunctionType and each.__code__ is code
        if not own and (each is not left_out or each is None):
            walk.visit(each)


def _note_function(walk: _Walk, what: types.FunctionType) -> None:
    walk.out.append(what.__qualname__)
    for cell in what.__closure__ or ():
        walk.visit(cell)
    for default in what.__defaults__ or ():
        walk.visit(default)


def _note_cell(walk: _Walk, what: types.CellType) -> None:
    try:
        walk.visit(what.cell_contents)
    except ValueError:
        walk.out.append("empty cell")


def _note_method(walk: _Walk, what: types.MethodType) -> None:
    walk.out.append(what.__func__.__qualname__)
    walk.visit(what.__self__)


def _note_partial(walk: _Walk, what: functools.partial[Any]) -> None:
    walk.out.append("partial")
    walk.visit(what.func)
    walk.visit(what.args)


def _note_reduced(walk: _Walk, what: Any) -> None:
    walk.out.append(type(what).__name__)
    for each in what.__reduce__()[1:]:
        walk.visit(each)


def _note_random(walk: _Walk, what: Random) -> None:
    walk.out.append(repr(what.getstate()))


def _note_opaque(walk: _Walk, what: Any) -> None:
    walk.out.append(getattr(what, "__qualname__", type(what).__qualname__))


def _note_fields(kind: type) -> _Note:
    """Return what writes the fields of a class: its slots, and its dictionary without what is ignored."""
    ignored = frozenset().union(*(_IGNORED.get(base, frozenset()) for base in kind.__mro__))
    slots = [name for base in kind.__mro__ for name in _slots_of(base)]
    names = tuple(name for name in slots if name not in ignored and not name.startswith("__"))
    title = kind.__qualname__

    def note(walk: _Walk, what: Any) -> None:
        walk.out.append(title)
        walk.visit_all([getattr(what, name, None) for name in names])
        own = getattr(what, "__dict__", None)
        if own:
            walk.out.append(",".join(own))
            walk.visit_all([value for name, value in own.items() if name not in ignored])
        if isinstance(what, dict):
            _note_dict(walk, what)

    return note


def _slots_of(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _choose_note(kind: type) -> _Note:
    if issubclass(kind, _OPAQUE):
        return _note_opaque
    if issubclass(kind, tuple):
        return _note_sequence
    if issubclass(kind, _ITERATORS):
        return _note_reduced
    return _note_fields(kind)


_ATOMS = frozenset({int, str, bool, float, type(None), bytes, np.bool_, np.int64, np.uint8, np.uint64, range})

_NOTES: dict[type, _Note] = {
    list: _note_list,
    tuple: _note_sequence,
    deque: _note_sequence,
    dict: _note_dict,
    Counter: _note_dict,
    Table: _note_table,
    set: _note_set,
    frozenset: _note_set,
    bytearray: _note_bytes,
    np.ndarray: _note_array,
    memoryview: _note_memoryview,
    types.GeneratorType: _note_generator,
    types.FunctionType: _note_function,
    types.CellType: _note_cell,
    types.MethodType: _note_method,
    functools.partial: _note_partial,
    Random: _note_random,
}
