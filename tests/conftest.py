from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Up to four ranks that live as long as the test session."""
    world = World(4)
    yield world
    world.close()
