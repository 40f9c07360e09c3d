"""Fixtures that every room may use: a real S3 server and a real Ray cluster, each started once a session, on first use."""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from tests import support
from vidfuse.data.clips import Video

END_SECONDS = 90.0
"""How long a process of tests may take to end once they are done."""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Have a process that does not end say what each of its threads does, and then end it with the tests' own result."""

    def end() -> None:
        time.sleep(END_SECONDS)
        print(f"the tests are done, and {END_SECONDS:g} s later their process has not ended; its threads:", file=sys.__stderr__)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(int(exitstatus))

    threading.Thread(target=end, name="end of the tests", daemon=True).start()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[support.ObjectStore]:
    """An S3 server on loopback; AWS_* of this process point to it."""
    with support.object_store(tmp_path_factory.mktemp("s3")) as store, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """A Ray cluster of two CPUs on this machine, connected; its address. AWS_* are those at its start: ask for `s3` first."""
    import ray

    if any("s3" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("s3")
    scratch = Path(tempfile.mkdtemp(prefix="vfr-", dir="/tmp"))  # a short path: Ray's sockets live below it
    for name, value in cli.RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(scratch),
        object_store_memory=(4 * 1024 if request.config.option.markexpr == "bench" else 512) * 1024**2,
        runtime_env={"env_vars": {"PYTHONPATH": str(support.REPO)}},
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def full_for_a_while(ray_cluster, monkeypatch, caplog):
    """Both CPUs of the cluster are reserved for 12 s, of which a start may take most; gives the lines that who waits meanwhile has logged."""
    import ray

    from vidfuse.on_ray import waiting

    monkeypatch.setattr(waiting, "FIRST_SECONDS", 1.0)
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.5)
    group = ray.util.placement_group([{"CPU": 2}])
    ray.get(group.ready())
    released = threading.Timer(12.0, ray.util.remove_placement_group, [group])
    released.start()
    with caplog.at_level(logging.WARNING, logger="vidfuse"):
        yield lambda: [record.getMessage() for record in caplog.records if " room" in record.getMessage()]
    released.join()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A file of three videos, the last of them broken, as its folder and index rows."""
    root = tmp_path_factory.mktemp("shard")
    (frames, width, height), content, rows = support.VIDEO, b"", []
    for sample in range(3):
        video = support.make_video(frames, seed=sample, width=width, height=height)
        video = video if sample < 2 else bytes(len(video))
        facts = (sample, "a.tar", f"key{sample}", sample, len(content), len(video), frames, width, height)
        rows.append(Video(*facts, sha256=hashlib.sha256(video).digest()))
        content += video
    (root / "a.tar").write_bytes(content)
    return str(root), tuple(rows)
