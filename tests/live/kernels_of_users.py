"""Functions that tests name by import path, as users do with theirs."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray


def pid() -> int:
    return os.getpid()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def count_up(counter: NDArray[Any]) -> Iterator[None]:
    """Count until stopped."""
    while True:
        counter[0] += 1
        yield


def leave(status: int) -> None:
    os._exit(status)


def system_exit() -> None:
    raise SystemExit("this must not end the worker")


def complain(array: NDArray[Any]) -> None:
    _deeper(array)


def _deeper(array: NDArray[Any]) -> None:
    raise LookupError(f"no such thing in {array.shape}")


def pair(array: NDArray[Any]) -> tuple[Any, Any, str]:
    return array.min(), array.max(), array.dtype.name


def part(array: NDArray[Any]) -> NDArray[Any]:
    return array[2:4]


def long_text(n: int) -> str:
    return "x" * n


def address_of(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def through_ctypes(address: int, n: int) -> int:
    """Read memory by a bare address, as C code would."""
    return sum((ctypes.c_uint8 * n).from_address(address))


def add_one(array: NDArray[Any], rounds: int, who: NDArray[Any]) -> Iterator[None]:
    """Say who we are, then add 1 to every element, again and again, page after page."""
    who[0] = os.getpid()
    for _ in range(rounds):
        for first in range(0, len(array), 512):
            array[first : first + 512] += 1
        yield


def add_one_in_a_child(array: NDArray[Any]) -> int:
    """Fork; both add 1 to the whole array, one after the other. Returns the child's exit status."""
    child = os.fork()
    if child == 0:
        array += 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    array += 1
    return status


def hold(array: NDArray[Any]) -> None:
    """Store, then hear nothing any more."""
    array += 1
    time.sleep(1000)
