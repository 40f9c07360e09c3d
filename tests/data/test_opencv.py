"""How many threads OpenCV may start."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["transcode", "survey", "clips", "synthetic"])
def test_processes_that_work_on_videos_use_one_thread(module):
    code = f"import cv2, vidfuse.data.{module}; print(cv2.getNumThreads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["1"]
