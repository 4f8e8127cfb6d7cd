"""Numpy's index syntax as text: ``10:20, ::2, ...`` becomes slices and integers, and nothing else ever."""

from __future__ import annotations

import ast
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
