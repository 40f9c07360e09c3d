"""OpenCV with one thread, whoever imports it first: videos are what is worked on in parallel.

Comes in: nothing. Goes out: `cv2`. With its own default, each of as many processes as a machine has CPUs would start as many threads.
"""

from __future__ import annotations

import cv2

__all__ = ["cv2"]

cv2.setNumThreads(1)
