"""The index syntax of `nopin get`."""

from __future__ import annotations

import click
import numpy as np
import pytest

from nopin.cli.slices import parse_index, piece_by_piece

ARRAY = np.arange(2 * 30 * 4).reshape(2, 30, 4)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("1", (1,)),
        ("-1", (-1,)),
        (":", (slice(None),)),
        ("0:1", (slice(0, 1),)),
        ("1, 10:20", (1, slice(10, 20))),
        ("..., 2", (..., 2)),
        (":, ::-3, 1:", (slice(None), slice(None, None, -3), slice(1, None))),
        ("[0, -5:]", (0, slice(-5, None))),
    ],
)
def test_text_selects_what_numpy_selects(text: str, index: tuple[object, ...]) -> None:
    assert parse_index(text) == index
    assert ARRAY[parse_index(text)].shape == ARRAY[index].shape  # type: ignore[index]  # mixed index


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1.5",
        "True",
        "__import__('os')",
        "1+1",
        "0][0",
        "[[0]]",
        "1 if 1 else 2",
        "'a'",
        "~1",
        "1:2:3:4",
        "--1",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write for example"):
        parse_index(text)


@pytest.mark.parametrize(
    "text", ["...", "1", "1, 3", "..., ::-1", "::-1, 5:25:3", ":, ::-3, 1:", "0:0", "-1:, -3, ..."]
)
@pytest.mark.parametrize("n_elements", [1, 3, 7, 50, 1000])
def test_pieces_hold_what_the_index_selects_in_its_order_and_none_is_too_large(text: str, n_elements: int) -> None:
    index = parse_index(text)
    pieces = [ARRAY[piece] for piece in piece_by_piece(index, ARRAY.shape, n_elements)]
    assert np.concatenate([np.ravel(piece) for piece in pieces]).tolist() == np.ravel(ARRAY[index]).tolist()
    assert all(np.size(piece) <= n_elements for piece in pieces)
