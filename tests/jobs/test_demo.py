"""`python -m jobs.demo` where there is something already; the demo itself is what `make demo` runs."""

from __future__ import annotations

import pytest

from jobs import demo
from tests.support import make_ssv2
from vidfuse.on_ray.packing import OtherSetError


def test_the_folder_of_another_version_is_named(tmp_path):
    make_ssv2(tmp_path / "videos", {"train": 2, "validation": 1})
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "test-00000.tar").write_bytes(b"")
    with pytest.raises(
        OtherSetError, match=r"^\S+ holds the demo of another version .*test-00000.tar.* give another one with --folder"
    ):
        demo.pack_videos(tmp_path, str(packed))
    assert [path.name for path in packed.iterdir()] == ["test-00000.tar"]
