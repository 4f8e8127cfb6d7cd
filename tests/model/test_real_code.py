"""The modelled machine runs the code that runs live: it has no pager, notifiers, mirror or NIC of its own.

Three looks. Objects of a machine that was built come from the real modules. No class of the model has the methods of a
real one. And no function of the model reads like one of the real parts: its tokens, names of variables aside, do not
come in the same order.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import keyword
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import nopin
from nopin.iommu.iommu import Iommu
from nopin.iommu.mirror import Mirror
from nopin.iommu.page_requests import PageRequests
from nopin.mm.notifier import Notifiers
from nopin.mm.pager import Pager
from nopin.mm.sequence import Eras
from nopin.model import Machine
from nopin.model.arena.paged import PagedArena
from nopin.model.scheduler import Scheduler
from nopin.nic import completer, responder
from nopin.nic.nic import Nic
from nopin.units import PAGE_BYTES

SOURCE = Path(nopin.__file__).parent
REAL_PARTS = ("mm", "iommu", "nic", "control", "verbs", "server")

API = (Pager, Notifiers, Eras, Mirror, PageRequests, Iommu, Nic)
"""What must be there once only."""

SHINGLE = 12
"""Consecutive tokens that are compared as one."""
MIN_TOKENS = 100
"""Shorter functions are like others by chance."""
ALIKE = 0.3
"""Share of a function's shingles that make it a copy."""

BROKEN = SOURCE / "model" / "explore" / "broken"
"""Mutants are the real thing, with a mistake."""


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of every function in a file."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            segment = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            yield f"{path.relative_to(SOURCE)}: {node.name}", segment


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return the runs of tokens of a function; names of variables, comments and strings say nothing."""
    tokens: list[str] = []
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            said = keyword.iskeyword(token.string) or before == "."
            tokens.append(token.string if said else "name")
        elif token.type in (tokenize.OP, tokenize.NUMBER):
            tokens.append(token.string)
        before = token.string
    if len(tokens) < MIN_TOKENS:
        return set()
    return {tuple(tokens[at : at + SHINGLE]) for at in range(len(tokens) - SHINGLE + 1)}


@functools.cache
def real_shingles() -> dict[tuple[str, ...], set[str]]:
    """Return which real functions have each shingle."""
    index: dict[tuple[str, ...], set[str]] = {}
    for path in sorted(path for part in REAL_PARTS for path in (SOURCE / part).rglob("*.py")):
        for name, text in functions(path):
            for part in shingles(text):
                index.setdefault(part, set()).add(name)
    return index


def likeness(parts: set[tuple[str, ...]]) -> tuple[float, str]:
    """Return how much of a function is in the real one that is most like it, and which that is."""
    index = real_shingles()
    found = Counter(name for part in parts for name in index.get(part, ()))
    (name, n_common), *_ = found.most_common(1) or [("none", 0)]
    return n_common / len(parts), name


def test_no_function_of_the_model_is_a_copy_of_a_real_one() -> None:
    n_compared = 0
    paths = [path for path in sorted((SOURCE / "model").rglob("*.py")) if BROKEN not in path.parents]
    for path in paths:
        for name, text in functions(path):
            parts = shingles(text)
            if parts:
                n_compared += 1
                share, original = likeness(parts)
                assert share < ALIKE, f"{name} is {share:.0%} of {original}: import that"
    assert n_compared > 50


@pytest.mark.parametrize(
    "original",
    [Mirror.fill, Notifiers.invalidate_start, PageRequests.drop_space, responder.receive, completer._acknowledge],
)
def test_a_copy_with_other_names_would_be_noticed(original: object) -> None:
    assert inspect.isfunction(original)
    text = textwrap.dedent(inspect.getsource(original))
    for old, new in (("core", "device"), ("qp", "pair"), ("side", "half"), ("where", "span"), ("event", "told")):
        text = re.sub(rf"\b{old}\b", new, text)
    share, name = likeness(shingles(text))
    assert share > 2 * ALIKE
    assert name.endswith(original.__name__)


def methods_of(node: ast.ClassDef) -> set[str]:
    return {each.name for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")}


def public_methods(real: type) -> set[str]:
    return {name for name in vars(real) if not name.startswith("_") and inspect.isfunction(vars(real)[name])}


HOOKS = {"invalidate_start", "invalidate_end", "protect", "sync", "release", "update", "age"}
"""Everybody who subscribes has these."""
ACCESSES = {"read", "write", "read_v", "write_v", "attach", "detach", "close", "statistics"}
"""Words for things that many have."""


def test_no_class_of_the_model_has_the_methods_of_a_real_one() -> None:
    for path in sorted((SOURCE / "model").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for real in API:
                own = public_methods(real) - HOOKS - ACCESSES
                common = methods_of(node) & own
                assert 2 * len(common) <= len(own), f"{path}: {node.name} is another {real.__name__}: {common}"
                assert node.name != real.__name__, f"{path} has a {real.__name__} of its own"


def test_the_parts_of_a_built_machine_are_the_real_ones() -> None:
    machine = Machine(preset="connectib56")
    process = machine.host("host").spawn_process()
    va = machine.run(process.mmap(4))
    nic = machine.nic("nic")
    nic.register(process, va, 4 * PAGE_BYTES)
    attachment = nic.attachment(process)
    assert type(process.notifiers) is Notifiers
    assert type(attachment.mirror) is Mirror
    assert type(machine.device("gpu").attach(process)) is Mirror
    assert type(nic.iommu) is Iommu
    assert type(nic.nic) is Nic
    assert type(nic.iommu._requests) is PageRequests


def test_the_parts_of_a_modelled_arena_are_the_real_ones() -> None:
    arena = PagedArena(Scheduler(), n_pages=8, budget_pages=4)
    assert type(arena.pager) is Pager
    assert type(arena.notifiers) is Notifiers
    assert type(arena.mirror) is Mirror
