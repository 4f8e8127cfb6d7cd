"""The digest of a state: two moments with the same digest have the same futures.

It is taken by walking everything that can be reached from a world, as the garbage collector would: objects by their
fields, closures by their cells, suspended generators by where they stand, their locals and what lies on their stack
(an iterator of a `for` loop is nowhere else). So nobody has to say what belongs to the state, and code under test that
grows a field is covered without being told. What is left out is told below, by class and field, and only what
the future cannot depend on: traces, counts of steps, statistics.

**Names.** The number of a frame is a name, in which nothing lies (`model/host/pool.py`): frames are numbered anew here,
in the order in which they are met, and what is kept by frame is written at the end, in that order. So it is with tables
that are only looked up, whose order of making says nothing. Two states that differ in such names only have the same
futures, but for the names.

Errors are on one side only: a state that differs in something irrelevant (a counter not told of) is explored twice.
Times count from now, and steps that are ready count as a set.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import marshal
import types
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter
from random import Random
from typing import Any

import numpy as np

from nopin.iommu.mirror import Mirror
from nopin.mm.arena_pages import ArenaPages
from nopin.mm.notifier import Notifiers
from nopin.model.arena.machine import ArenaMachine
from nopin.model.device.engine import Engine
from nopin.model.device.faults import ProcessFaults
from nopin.model.device.translations import Translations
from nopin.model.explore.guide import Guide
from nopin.model.explore.world import World
from nopin.model.host.frames import Frames
from nopin.model.host.pool import Frame
from nopin.model.host.table import Table
from nopin.model.net.link import Link
from nopin.model.net.nic_host import NicHost
from nopin.model.oracle.host_oracle import HostOracle, Space
from nopin.model.oracle.memory import Memory
from nopin.model.scheduler import Scheduler, is_void
from nopin.model.trace import Trace
from nopin.nic.core import Core
from nopin.nic.mr import Region
from nopin.units import PAGE_BYTES

_IGNORED: dict[type, frozenset[str]] = {
    World: frozenset({"trace", "guide"}),
    Scheduler: frozenset({"trace", "chooser", "n_steps", "_n_put", "now_ns", "_heap", "_ready"}),
    Mirror: frozenset({"_statistics", "reclaimed"}),
    ArenaPages: frozenset({"counts"}),
    ProcessFaults: frozenset({"n_faults"}),
    Engine: frozenset({"_n_dropped_before"}),
    ArenaMachine: frozenset({"n_effects"}),
    Core: frozenset({"counters", "plan", "scratch"}),
    NicHost: frozenset({"events", "_n_faults"}),
    Link: frozenset({"statistics"}),
    Region: frozenset({"meter"}),
    HostOracle: frozenset({"in_use"}),  # the frames that `Frames` says are, or it complains
    Notifiers: frozenset({"_by_cause", "_n_vetoes", "_n_agains", "_n_fences"}),
}
"""Fields that no future depends on."""

_LOOKED_UP: dict[type, frozenset[str]] = {
    Translations: frozenset({"_frame_of"}),
    Memory: frozenset({"_words"}),
    Space: frozenset({"rights", "bad_at"}),
}
"""Dictionaries by number of which nobody asks in which order they were made."""

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

_Tokens = list[Any]
"""What a digest is of: numbers, words, bytes and None as they are met, and between them tuples that tell the structure.

Objects are written before their members, with how many those are, so that no two states are written alike. `marshal`
turns it into bytes, in a version that looks at nothing but values.
"""

_Note = Callable[[_Tokens, list[Any], Any], None]
"""Writes (tokens, members still to be written, object): a token or some, and the members onto the end of those."""


def digest_of(world: World) -> bytes:
    """Return 16 bytes that tell the state of a world between two steps."""
    tokens: _Tokens = []
    _write(tokens, [_agenda(world.scheduler), world])
    return hashlib.blake2b(marshal.dumps(tokens, 2), digest_size=16).digest()


def _agenda(scheduler: Scheduler) -> list[Any]:
    """Return what is to be done: what is ready now as a set, the rest in order of time."""
    ready = [what for what in scheduler._ready if not is_void(what)]
    ready.sort(key=attrgetter("name"))
    later = [(at_ns - scheduler.now_ns, what) for at_ns, _, what in sorted(scheduler._heap) if not is_void(what)]
    return [ready, later]


def _write(tokens: _Tokens, left: list[Any]) -> None:
    """Write objects, the last of `left` first, and all they lead to; one that was seen before as its number."""
    seen: dict[int, int] = {}
    kept: list[Any] = []  # so that no number is given to two objects
    names: dict[int, int] = {}  # of frames, by number
    append, pop = tokens.append, left.pop
    while left:
        what = pop()
        kind = type(what)
        if kind in _PLAIN:
            append(what)
            continue
        if kind is Frame:  # whichever object has the name
            append(("frame", names.setdefault(what, len(names))))
            continue
        number = seen.get(id(what))
        if number is not None:
            append((number,))
            continue
        note = _NOTES.get(kind)
        if note is None:
            note = _NOTES[kind] = _choose_note(kind)
        if note is not _note_scalar:
            seen[id(what)] = len(seen)
            kept.append(what)
        note(tokens, left, what)
    for what in kept:
        if type(what) is Frames:
            _write_frames(tokens, what, names)


def _write_frames(tokens: _Tokens, frames: Frames, names: dict[int, int]) -> None:
    """Write what is in the frames of a host: of those that were met, those in use, those that come next.

    A frame of a row of 512 has its number for name, in which there is something.
    """
    free = [pool.free_frames() for pool in frames.pools()]
    for frame in (*frames.in_use(), *(frame for given_back, _ in free for frame in given_back)):
        names.setdefault(frame, len(names))
    for given_back, n_never in free:
        tokens.append((*(names[frame] for frame in given_back), n_never))
    for frame, name in names.items():
        held = frames.read(frame, 0, PAGE_BYTES) if frames.has_bytes(frame) else b""  # else zeros, or poison
        tokens.append((name, frame if type(frame) is not Frame else "", frames.n_references(frame), held))


def _note_scalar(tokens: _Tokens, left: list[Any], what: Any) -> None:
    del left
    tokens.append((repr(what),))


def _note_sequence(tokens: _Tokens, left: list[Any], what: Any) -> None:
    tokens.append((type(what).__name__, len(what)))
    left.extend(what)


def _note_dict(tokens: _Tokens, left: list[Any], what: Any) -> None:
    tokens.append(("dict", len(what)))
    left.extend(what)
    left.extend(what.values())


def _note_looked_up(tokens: _Tokens, left: list[Any], what: dict[int, Any]) -> None:
    numbers = sorted(what)
    tokens.append(("by number", *numbers))
    left.extend([what[number] for number in numbers])


def _note_table(tokens: _Tokens, left: list[Any], what: Table) -> None:
    numbers = sorted(what._entries)  # in whatever order they were made
    tokens.append(("table", *numbers))
    left.append(what._huge)
    left.extend([what._entries[number] for number in numbers])


def _note_set(tokens: _Tokens, left: list[Any], what: Any) -> None:
    tokens.append(("set", len(what)))
    try:
        left.extend(sorted(what))
    except TypeError:  # objects, whose order in the set is by address: count them as their kinds
        left.extend(sorted(type(each).__name__ for each in what))


def _note_bytes(tokens: _Tokens, left: list[Any], what: Any) -> None:
    del left
    tokens.append((type(what).__name__, bytes(what)))


def _note_array(tokens: _Tokens, left: list[Any], what: np.ndarray[Any, Any]) -> None:
    del left
    tokens.append((_name_of(what.dtype), what.shape, what.tobytes()))


_name_of = functools.cache(str)
"""The name of a type of array elements."""


def _note_memoryview(tokens: _Tokens, left: list[Any], what: memoryview) -> None:
    del left
    tokens.append(("memoryview", what.tobytes()))


def _note_generator(tokens: _Tokens, left: list[Any], what: types.GeneratorType[Any, Any, Any]) -> None:
    frame = what.gi_frame
    if frame is None:
        tokens.append((what.__qualname__, "over"))
        return
    known = frame.f_locals
    code, left_out = what.gi_code, known.get(_UNINITIALISED.get(what.__qualname__, ""))
    n_before = len(left)
    for each in gc.get_referents(what):
        kind = type(each)
        if kind is types.CodeType or kind is types.FrameType or each is known:
            continue
        own = kind is types.FunctionType and each.__code__ is code
        if not own and (each is not left_out or each is None):
            left.append(each)
    tokens.append((what.__qualname__, frame.f_lasti, len(left) - n_before, *sorted(known)))  # as old as who first asked


def _note_function(tokens: _Tokens, left: list[Any], what: types.FunctionType) -> None:
    cells, defaults = what.__closure__ or (), what.__defaults__ or ()
    tokens.append((what.__qualname__, len(cells), len(defaults)))
    left.extend(cells)
    left.extend(defaults)


def _note_cell(tokens: _Tokens, left: list[Any], what: types.CellType) -> None:
    try:
        left.append(what.cell_contents)
        tokens.append(("cell",))
    except ValueError:
        tokens.append(("empty cell",))


def _note_method(tokens: _Tokens, left: list[Any], what: types.MethodType) -> None:
    tokens.append((what.__func__.__qualname__,))
    left.append(what.__self__)


def _note_partial(tokens: _Tokens, left: list[Any], what: functools.partial[Any]) -> None:
    tokens.append(("partial",))
    left.extend((what.func, what.args))


def _note_reduced(tokens: _Tokens, left: list[Any], what: Any) -> None:
    parts = what.__reduce__()[1:]
    tokens.append((type(what).__name__, len(parts)))
    left.extend(parts)


def _note_random(tokens: _Tokens, left: list[Any], what: Random) -> None:
    del left
    tokens.append(("Random", what.getstate()))


def _note_opaque(tokens: _Tokens, left: list[Any], what: Any) -> None:
    del left
    tokens.append((getattr(what, "__qualname__", type(what).__qualname__),))


def _note_fields(kind: type) -> _Note:
    """Return what writes the fields of a class: its slots, and its dictionary without what is ignored."""
    looked_up = sorted(frozenset().union(*(_LOOKED_UP.get(base, frozenset()) for base in kind.__mro__)))
    ignored = frozenset(looked_up).union(*(_IGNORED.get(base, frozenset()) for base in kind.__mro__))
    slots = [name for base in kind.__mro__ for name in _slots_of(base)]
    names = tuple(name for name in slots if name not in ignored and not name.startswith("__"))
    fields_of = attrgetter(*names) if len(names) > 1 else lambda what: [getattr(what, name) for name in names]
    title, is_dict = (kind.__qualname__,), issubclass(kind, dict)

    def note(tokens: _Tokens, left: list[Any], what: Any) -> None:
        tokens.append(title)
        try:
            left.extend(fields_of(what))
        except AttributeError:  # a slot that nothing was put in yet
            left.extend([getattr(what, name, None) for name in names])
        own = getattr(what, "__dict__", None)
        if own:
            tokens.append((",".join(own),))
            left.extend([value for name, value in own.items() if name not in ignored])
        for name in looked_up:
            _note_looked_up(tokens, left, getattr(what, name))
        if is_dict:
            _note_dict(tokens, left, what)

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


_PLAIN = frozenset({int, str, bool, float, type(None), bytes})

_NOTES: dict[type, _Note] = {
    np.bool_: _note_scalar,
    np.int64: _note_scalar,
    np.uint8: _note_scalar,
    np.uint64: _note_scalar,
    range: _note_scalar,
    Frames: _note_opaque,
    list: _note_sequence,
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
