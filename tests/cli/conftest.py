from collections.abc import Iterator

import pytest
from hydra.core.hydra_config import HydraConfig


@pytest.fixture(autouse=True)
def _no_run_of_hydra_is_left() -> Iterator[None]:
    """Hydra keeps the configuration of a run that has ended, and Lightning takes it for one that goes on."""
    yield
    HydraConfig.instance().cfg = None
