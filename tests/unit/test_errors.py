"""Errors: one tree, and each survives the way to another process."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator

import pytest

from nopin import errors

NEEDED = {"code": "limit", "errno": 12, "status": 10, "exit_status": -9, "reason": "lost", "bytes_done": 4096}


def one_of_each() -> Iterator[errors.NopinError]:
    """Make every error there is, with whatever it asks for."""
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, errors.NopinError) and kind is not errors.HostLacks:
            takes = inspect.signature(kind.__init__).parameters if inspect.isfunction(kind.__init__) else {}
            needs = {name: value for name, value in NEEDED.items() if name in takes}
            yield kind("what happened", **needs)
    yield errors.HostLacks("memfd", "not in this kernel", "use Linux 3.17")


@pytest.mark.parametrize("error", list(one_of_each()), ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_to_another_process(error: errors.NopinError) -> None:
    """A pool of processes waits for ever for an answer that it cannot unpickle."""
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert vars(back) == vars(error)
