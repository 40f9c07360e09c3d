"""What keeps a process from joining a cluster is told in one line, at once."""

from __future__ import annotations

import socket
import time

import pytest
from ray.exceptions import AuthenticationError

from vidfuse.config import ConfigError
from vidfuse.on_ray.joining import joining


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://head:8265"])
def test_a_dashboard_is_no_head(address):
    with pytest.raises(ConfigError, match="is a dashboard, to which `ray job submit` sends jobs"), joining(address):
        pytest.fail("it was tried")


def test_nobody_answers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        began = time.monotonic()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"is no cluster that answers .*make cluster-up"), joining(address):
            pytest.fail("it was tried")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ConnectionError("Failed to connect"), "does not let this process in: the token"),
        (AuthenticationError("no file: /tmp/x\nmore"), r"no token: .*no file: /tmp/x"),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9"), "Ray: 2.9; install the same"),
    ],
)
def test_what_ray_says_is_told_in_one_line(fault, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=message) as told, joining(address):
            raise fault
    assert "\n" not in str(told.value)


def test_other_faults_are_not_hidden():
    with pytest.raises(RuntimeError, match="something else"), joining(None):
        raise RuntimeError("something else")
