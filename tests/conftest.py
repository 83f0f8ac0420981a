"""What holds for all tests."""

import os
import sys

import pytest

from worker.spec import RANK_ENVIRONMENT

os.environ["RES_OPTIONS"] = RANK_ENVIRONMENT["RES_OPTIONS"]  # read when the first name is resolved


def pytest_collection_finish(session: pytest.Session) -> None:
    """A local fleet sets Ray's switches before Ray is imported, so no test module may bring Ray along."""
    if "ray" in sys.modules:
        raise pytest.UsageError("a test module imports ray when it is collected: import it inside the test")
