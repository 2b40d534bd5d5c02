"""The cluster of the tests in this folder; if none can be started, they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, needs_slurm, start_cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests before other fixtures are set up in vain."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(needs_slurm)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
