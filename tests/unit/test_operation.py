"""Operations: asked, waited for, awaited; no helper thread behind them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from nopin.errors import UsageError, WorkError
from nopin.verbs.operation import Operation


class Script:
    """A driver whose operations end at the n-th look."""

    def __init__(self, looks_needed: int) -> None:
        self.looks_left = looks_needed
        self.operation: Operation[int] | None = None
        self.error: Exception | None = None

    def progress(self) -> bool:
        self.looks_left -= 1
        if self.looks_left > 0 or self.operation is None or self.operation.ended:
            return False
        if self.error is None:
            self.operation.complete()
        else:
            self.operation.fail(self.error)
        return True

    def drive(self, operation: Operation[Any], deadline_ns: int | None) -> None:
        while not operation.ended and (deadline_ns is None or time.monotonic_ns() < deadline_ns):
            self.progress()

    def attend(self, future: asyncio.Future[None]) -> None:
        def look() -> None:
            if not future.done():
                self.progress()
                future.get_loop().call_soon(look)

        look()


def started(looks_needed: int, error: Exception | None = None) -> tuple[Operation[int], list[int]]:
    finished: list[int] = []

    def finish() -> int:
        finished.append(1)
        return 42

    script = Script(looks_needed)
    script.error = error
    script.operation = Operation(script, finish, lambda: "READ of 8 bytes")
    return script.operation, finished


def test_done_takes_note_without_waiting() -> None:
    operation, _ = started(3)
    assert [operation.done() for _ in range(4)] == [False, False, True, True]


def test_the_result_is_computed_once() -> None:
    operation, finished = started(5)
    assert operation.result() == 42
    assert operation.result(timeout=0) == 42
    assert finished == [1]


def test_a_timeout_leaves_it_under_way() -> None:
    operation, _ = started(1 << 60)
    with pytest.raises(TimeoutError, match="READ of 8 bytes"):
        operation.result(timeout=0.001)
    script = operation._driver
    assert isinstance(script, Script)
    script.looks_left = 1
    assert operation.result(timeout=1) == 42


def test_a_failure_is_raised_and_returned() -> None:
    error = WorkError("REM_ACCESS_ERR", status=10)
    operation, finished = started(1, error)
    assert operation.exception() is error
    with pytest.raises(WorkError) as caught:
        operation.result()
    assert caught.value is error
    assert not finished


def test_success_has_no_exception() -> None:
    assert started(2)[0].exception() is None


def test_awaiting_returns_the_result() -> None:
    async def both() -> tuple[int, int]:
        return await asyncio.gather(_awaited(started(3)[0]), _awaited(started(1)[0]))

    assert list(asyncio.run(both())) == [42, 42]


async def _awaited(operation: Operation[int]) -> int:
    return await operation


def test_awaiting_raises_the_failure() -> None:
    with pytest.raises(WorkError):
        asyncio.run(_awaited(started(2, WorkError("gone", status=5))[0]))


def test_a_cancelled_wait_leaves_it_under_way() -> None:
    operation, _ = started(1 << 60)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(operation), 0.01)

    asyncio.run(impatient())
    assert not operation.ended


def test_it_ends_well_though_the_loop_that_waited_for_it_is_closed() -> None:
    operation, _ = started(1 << 60)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(operation), 0.01)

    asyncio.run(impatient())
    script = operation._driver
    assert isinstance(script, Script)
    script.looks_left = 1
    assert operation.result(timeout=1) == 42


def test_callbacks_come_once_even_when_late() -> None:
    operation, _ = started(1)
    seen: list[str] = []
    operation.add_done_callback(lambda: seen.append("early"))
    operation.result()
    operation.add_done_callback(lambda: seen.append("late"))
    assert seen == ["early", "late"]


@pytest.mark.parametrize("nonsense", ["1", float("nan"), [], object()])
def test_a_timeout_is_a_number(nonsense: Any) -> None:
    operation, _ = started(1000)
    with pytest.raises(UsageError, match="a timeout is a number of seconds, or None"):
        operation.result(timeout=nonsense)


@pytest.mark.parametrize("long", [None, float("inf"), 1e300, 10**400])
def test_a_timeout_longer_than_anything_is_for_ever(long: float | None) -> None:
    operation, _ = started(3)
    assert operation.result(timeout=long) == 42


def test_an_operation_says_what_it_is_and_how_it_stands() -> None:
    operation, _ = started(1)
    assert repr(operation) == "<Operation: READ of 8 bytes, under way>"
    operation.result()
    assert repr(operation) == "<Operation: READ of 8 bytes, done>"
