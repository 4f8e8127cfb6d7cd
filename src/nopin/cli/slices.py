"""Numpy's index syntax as text: ``10:20, ::2, ...`` becomes slices and integers, and nothing else ever."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from types import EllipsisType

import click

Index = int | slice | EllipsisType
EXAMPLES = "write for example 5, 10:20, ::2, or 0:4,...,-1"


def parse_index(text: str) -> tuple[Index, ...]:
    """Parse what stands between the brackets of a numpy index; the text is never evaluated.

    Raises:
        click.BadParameter: it is anything but integers, slices and an ellipsis, separated by commas.
    """
    inner = text.strip().removeprefix("[").removesuffix("]")
    try:
        expression = ast.parse(f"x[{inner}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refuse(text) from None
    if not isinstance(expression, ast.Subscript) or not isinstance(expression.value, ast.Name):
        raise _refuse(text)  # brackets inside the text moved the subscript elsewhere
    index = expression.slice
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return tuple(_part(part, text) for part in parts)


def piece_by_piece(index: tuple[Index, ...], shape: Sequence[int], n_elements: int) -> Iterator[tuple[Index, ...]]:
    """Cut an index of an array into ones of at most so many elements, which follow each other in C order."""
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    rest = [slice(None)] * (len(shape) - len([part for part in index if part is not Ellipsis]))
    parts = [*index[:at], *rest, *index[at + 1 :]]
    chosen = [
        range(*part.indices(n)) if isinstance(part, slice) else part for part, n in zip(parts, shape, strict=True)
    ]
    yield from _cut(chosen, n_elements)  # type: ignore[arg-type]  # no ellipsis is left


def _cut(chosen: list[range | int], n_elements: int) -> Iterator[tuple[Index, ...]]:
    lengths = [len(part) if isinstance(part, range) else 1 for part in chosen]
    total = math.prod(lengths)
    if total <= n_elements:
        yield tuple(_as_slice(part) if isinstance(part, range) else part for part in chosen)
        return
    axis = next(i for i, n in enumerate(lengths) if n > 1)
    step = max(1, n_elements * lengths[axis] // total)
    whole = chosen[axis]
    assert isinstance(whole, range)
    for first in range(0, len(whole), step):
        yield from _cut([*chosen[:axis], whole[first : first + step], *chosen[axis + 1 :]], n_elements)


def _as_slice(part: range) -> slice:
    """Return the slice with the same elements; one below the first element is the start of the array, not its end."""
    return slice(part.start, None if part.stop < 0 else part.stop, part.step)


def _part(node: ast.expr, text: str) -> Index:
    if isinstance(node, ast.Slice):
        return slice(_integer(node.lower, text), _integer(node.upper, text), _integer(node.step, text))
    if isinstance(node, ast.Constant) and node.value is Ellipsis:
        return Ellipsis
    value = _integer(node, text)
    if value is None:
        raise _refuse(text)
    return value


def _integer(node: ast.expr | None, text: str) -> int | None:
    if node is None:
        return None
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(constant, ast.Constant) or type(constant.value) is not int:
        raise _refuse(text)
    return -constant.value if negative else constant.value


def _refuse(text: str) -> click.BadParameter:
    return click.BadParameter(f"{text!r} is not an index; {EXAMPLES}")
