"""What tests against live servers share: two servers a module, and every test of a transfer on both paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from verbs_pair import PATHS, Servers, running_servers


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two servers, started once for a module."""
    with running_servers(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """How a peer reaches the owner: over the wire, or on the direct path."""
    return str(request.param)
