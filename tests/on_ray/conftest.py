"""A place where runs are hurt, for the tests of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import Place, config_of, hurt_set, place
from vidfuse.config import Config


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three nodes, and an S3 server behind a proxy."""
    with place(tmp_path_factory.mktemp("place"), 3) as made:
        yield made


@pytest.fixture(scope="module")
def hurt(here: Place, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on one to three workers over a set of which one video is corrupt, and another is behind the end of its shard."""
    url = here.store.server.url("hurt")
    hurt_set(url, tmp_path_factory.mktemp("source"))
    return config_of(url, here.store.server.url("runs"), "hurt", 3)
