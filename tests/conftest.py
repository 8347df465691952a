from collections.abc import Iterator

import pytest
from hypothesis import settings

from lightning_lss.testing.world import World

settings.register_profile("seeded", deadline=None, derandomize=True)
settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="run the parity tests for all combinations of their options instead of enough to cover every pair",
    )


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Up to four ranks that live as long as the test session."""
    world = World(4)
    yield world
    world.close()
