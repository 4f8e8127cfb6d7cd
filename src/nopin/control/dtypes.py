"""The type of an array as text: numpy's string form, ``<f8``; of records, their fields in JSON, ``[["x","<f8"],...]``.

The fields are listed as in a .npy file (numpy.lib.format), unnamed ones being the bytes in between. What is read may
come from anywhere: only types without references to Python objects are known here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

_PLAIN = re.compile(r"[<>|=]?[?biufcmMSUV]\d{0,9}(\[\d{0,9}[a-zA-Z]{1,2}\])?", re.ASCII)
_LEVELS_MAX = 16
"""Records within records."""


def dtype_text(dtype: np.dtype[Any]) -> str:
    """Write a type.

    Raises:
        ValueError: it has fields that overlap or are out of order, which cannot be written so.
    """
    described = np.lib.format.dtype_to_descr(dtype)
    return described if isinstance(described, str) else msgspec.json.encode(described).decode()


@lru_cache(maxsize=256)
def parse_dtype(text: str) -> np.dtype[Any]:
    """Read a type.

    Raises:
        ValueError: the text is none, or one of Python objects.
    """
    try:
        described = msgspec.json.decode(text, type=list[Any]) if text.startswith("[") else text
        return np.lib.format.descr_to_dtype(_checked(described, _LEVELS_MAX))
    except (ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError) as problem:
        raise ValueError(f"{text[:64]!r} is no type of plain elements") from problem


def _checked(described: Any, n_levels: int) -> Any:
    """Return what numpy takes; JSON has no tuples."""
    if isinstance(described, str):
        if _PLAIN.fullmatch(described) is None:
            raise ValueError(described)
        return described
    if not isinstance(described, list) or not n_levels:
        raise ValueError(described)
    return [_checked_field(field, n_levels - 1) for field in described]


def _checked_field(field: Any, n_levels: int) -> tuple[Any, ...]:
    if not isinstance(field, list) or len(field) not in (2, 3):
        raise ValueError(field)
    name, kind, *shape = field
    named = tuple(name) if isinstance(name, list) else name  # a title and a name
    return named, _checked(kind, n_levels), *map(tuple, shape)
