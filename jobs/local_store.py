"""The S3 server of `cluster/local/object_store.py` for as long as a context is open."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidfuse.on_ray.storage import StorageError

PROGRAM = Path(__file__).parents[1] / "cluster" / "local" / "object_store.py"


@contextlib.contextmanager
def running(folder: Path, *buckets: str) -> Iterator[dict[str, Any]]:
    """Start the server with its data in `folder` and have AWS_* of this process point at it.

    Raises:
        StorageError: it did not start.
    """
    names = [word for bucket in buckets for word in ("--bucket", bucket)]
    command = [sys.executable, str(PROGRAM), "--dir", str(folder), "--port", "0", "--with-parent", *names]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise StorageError(f"the S3 server did not start (exit code {server.wait()}); see {folder}")
        place: dict[str, Any] = json.loads(line)
        os.environ["AWS_ENDPOINT_URL"] = place["endpoint"]
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(Path(place["credentials_file"]).absolute())
        os.environ.setdefault("AWS_REGION", "us-east-1")
        yield place
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
