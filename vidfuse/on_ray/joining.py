"""Joining a cluster, with faults told in one line: no cluster at the address, a token that it refuses, another Ray or Python.

Comes in: the address that RAY_ADDRESS gives. Goes out: nothing, or a `ConfigError`, in seconds where Ray takes minutes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from ray.exceptions import AuthenticationError

from vidfuse.config import ConfigError

ANSWER_SECONDS = 5.0
"""How long the head may take to accept a connection."""


@contextlib.contextmanager
def joining(address: str | None) -> Iterator[None]:
    """Check an address before `ray.init`, and tell what goes wrong inside.

    Args:
        address: what RAY_ADDRESS holds; `None`: a cluster of this process' own.

    Raises:
        ConfigError: what is wrong and what to do.
    """
    if address:
        _check(address)
    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(f"no token: {str(error).splitlines()[0]}") from None
    except ConnectionError:
        raise ConfigError(
            f"RAY_ADDRESS={address}: something answers there, but does not let this process in: the token (RAY_AUTH_TOKEN_PATH, or "
            "~/.ray/auth_token; RAY_AUTH_MODE=token) is not the cluster's, or it is no Ray"
        ) from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        what = " ".join(str(error).split())
        raise ConfigError(f"RAY_ADDRESS={address}: {what}; install the same Ray and Python here (constraints.txt)") from None


def _check(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a dashboard, to which `ray job submit` sends jobs: submit this one, or give the head's address, "
            "as 10.0.0.1:6379"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # auto, local, ray://...
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={address} is no cluster that answers ({error}): start it (`make cluster-up`), or unset RAY_ADDRESS to have one "
            "of this process' own"
        ) from None
