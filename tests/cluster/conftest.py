"""One cluster for all tests here: it takes its time to start."""

import pytest
from nodes import Nodes


@pytest.fixture(scope="session")
def nodes():
    made = Nodes()
    yield made
    made.cluster.shutdown()
