"""Array types as text: what comes back is what went in, and nothing else is taken for a type."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as numpy_strategies

from nopin.control.dtypes import dtype_text, parse_dtype
from nopin.verbs.buffers import memory_of


@given(numpy_strategies.scalar_dtypes() | numpy_strategies.nested_dtypes(max_itemsize=4096))
def test_what_comes_back_is_what_went_in(dtype: np.dtype[Any]) -> None:
    if dtype.subdtype is not None or (dtype.names is None and not dtype.itemsize):
        return  # no array has such elements
    back = parse_dtype(dtype_text(dtype))
    assert back == dtype
    assert back.itemsize == dtype.itemsize
    assert not back.hasobject


def test_bytes_between_fields_and_titles_are_kept() -> None:
    aligned = np.dtype([("a", "i1"), ("b", "<f8"), ("c", [("x", ">u2"), ("y", "S3")], (2, 3))], align=True)
    assert parse_dtype(dtype_text(aligned)) == aligned
    titled = np.dtype([(("a title", "a"), "<i4")])
    assert parse_dtype(dtype_text(titled)).fields == titled.fields


@pytest.mark.parametrize(
    "text",
    [
        "",
        "O",
        "|O8",
        "object",
        "i4,f8",
        "(2,3)i4",
        "[",
        "[1]",
        '["<i4"]',
        '[["a"]]',
        '[["a","<i4",[2],3]]',
        '[["a","O"]]',
        '[["a",[["b","|O"]]]]',
        '[["a","<i4",["2"]]]',
        '[["a","<i4",[-1]]]',
        '[["a","<i4",[4000000000,4000000000]]]',
        '[["a","<i4"],["a","<i4"]]',
        '[[3,"<i4"]]',
        '[["a",{"b":1}]]',
        '[["a","<i4"]] import os',
        "[" * 5000,
        json.dumps([["a", [["a", "<i4"]]]])[:-1],
        "<M8[" + "9" * 20 + "s]",
    ],
)
def test_nothing_else_is_a_type(text: str) -> None:
    with pytest.raises(ValueError, match="is no type of plain elements"):
        parse_dtype(text)


def test_records_within_records_have_a_bound() -> None:
    described: Any = "<i4"
    for _ in range(100):
        described = [["a", described]]
    with pytest.raises(ValueError, match="no type"):
        parse_dtype(json.dumps(described))


def test_records_that_cannot_be_written_are_bytes_to_peers() -> None:
    overlapping = np.dtype({"names": ["a", "b"], "formats": ["<i4", "<i2"], "offsets": [0, 2]})
    long = np.dtype([(f"field {i}", "<f8") for i in range(200)])
    for dtype in (overlapping, long):
        assert memory_of(np.zeros(2, dtype)).dtype == f"|V{dtype.itemsize}"
