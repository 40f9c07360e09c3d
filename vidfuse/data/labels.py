"""Facts of each data set, each with its source."""

from __future__ import annotations

SSV2_CLASSES = 174
"""Something-Something-V2 (Goyal et al. 2017; release notes of version 2)."""
SSV2_SPLITS = {"train": 168_913, "validation": 24_777, "test": 27_157}
"""As above."""
KINETICS400_CLASSES = 400
"""Kay et al. 2017 (arXiv:1705.06950)."""
UCF101_CLASSES = 101
"""Soomro, Zamir, Shah 2012 (arXiv:1212.0402)."""
UCF101_SPLITS = {1: (9_537, 3_783), 2: (9_586, 3_734), 3: (9_624, 3_696)}
"""Official train / test videos of each split, counted in its `trainlist0N.txt` and `testlist0N.txt`."""
