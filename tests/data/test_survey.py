"""A set judged from its tables: spreads, balance, outliers, duplicates and thresholds at their bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import support
from vidfuse.config import QualityConfig
from vidfuse.data import copies, quality
from vidfuse.data.shards import Manifest, Quarantined, SplitInfo
from vidfuse.data.survey import Survey, survey

FRAMES = 4
CLASSES = ("Holding something", "Folding something", "Archery")


def rows(split: str, count: int, *, seed: int = 0, classes: int = 3) -> list[quality.Row]:
    """Readable videos that are much alike, and no duplicates."""
    rng = np.random.default_rng([seed, len(split)])
    found = []
    for number in range(count):
        key = f"{split}{number}"
        row = {**quality.unread(f"{split}-00000.tar", key, number % classes if classes else None, ""), "sha256": key}
        row |= {"text": "holding a cup", "bytes": 1000, "frames": 24, "fps": 12.0, "width": 320, "height": 240}
        row |= {"duration": float(rng.uniform(1.9, 2.1)), "codec": "h264", "container": "mp4", "pixel_format": "yuv420p"}
        row |= {"audio_tracks": 0, "rotation": 0, "interval_spread": 0.0, "motion": float(rng.uniform(4, 6))}
        row |= {name: float(rng.uniform(90, 110)) for name in ("brightness", "contrast", "sharpness")}
        found.append({**row, "hashes": rng.integers(0, 2**64, FRAMES, dtype=np.uint64).tolist()})
    return found


def judge(
    splits: dict[str, list[quality.Row]], *, quarantined: int = 0, classes: tuple[str, ...] = CLASSES, **config: Any
) -> Survey:
    info = {name: SplitInfo(samples=len(r), bytes=0, index="", index_sha256="", shards=()) for name, r in splits.items()}
    manifest = Manifest(dataset="set", classes=classes, splits=info, quarantined=quarantined, plan="", recipe=support.RECIPE)
    lost = [Quarantined(split="train", key=str(n), path="", reason="broken") for n in range(quarantined)]
    tables = {name: quality.load_table(quality.dump_table(quality.table(r))) for name, r in splits.items()}
    return survey(tables, manifest, lost, QualityConfig(**config), frames=FRAMES)


def test_a_good_set_has_no_flags_and_breaks_nothing():
    found = judge({"train": rows("train", 30), "validation": rows("validation", 12)})
    assert (found.flags, found.leaks, found.repeats, found.broken, found.poor_classes) == ((), (), (), (), ())
    assert found.splits["train"].balance.imbalance == 1
    assert found.splits["train"].balance.effective_classes == pytest.approx(3)


def test_balance_and_classes_without_videos():
    found = judge({"train": rows("train", 12, classes=2), "validation": rows("validation", 4, classes=1)})
    assert found.splits["train"].balance.missing == ("Archery",)
    assert found.splits["validation"].balance.missing == ("Folding something", "Archery")
    assert found.poor_classes == ("Archery",)
    assert [broken.threshold for broken in found.broken] == ["max_poor_classes"]


def test_outliers_are_listed_with_their_measure_and_break_nothing():
    train = rows("train", 40)
    train[3] |= {"sharpness": 2.0}
    train[5] |= {"duration": 60.0}
    found = judge({"train": train})
    assert {(flag.kind, flag.key, flag.measure) for flag in found.flags} == {
        ("outlier", "train3", "sharpness"),
        ("outlier", "train5", "duration"),
    }
    assert found.broken == ()


def test_duplicates_by_bytes_by_hash_and_by_chain():
    train, validation = rows("train", 10), rows("validation", 10)
    validation[0] |= {"sha256": "train0"}
    near = np.array(train[1]["hashes"], np.uint64)
    near[0] ^= np.uint64(0xFFFF)  # 16 bits of 4 x 64: 4 a frame
    validation[1] |= {"hashes": near.tolist()}
    further = near.copy()
    further[1] ^= np.uint64(0xFFFF)
    validation[2] |= {"hashes": further.tolist()}  # near to validation1, not to train1
    validation[3] |= {"contrast": 1.0, "brightness": 99.0, "hashes": train[4]["hashes"]}  # of one colour: the hash says nothing
    found = judge({"validation": validation, "train": train})
    assert [(leak.video.key, leak.duplicate.key, leak.bits) for leak in found.leaks] == [
        ("validation0", "train0", 0.0),
        ("validation1", "train1", 4.0),
    ]
    assert [(group.split, group.keys) for group in found.repeats] == [("validation", ("validation1", "validation2"))]
    stricter = judge({"validation": validation, "train": train}, duplicate_bits=3.9)
    assert [leak.video.key for leak in stricter.leaks] == ["validation0"]


def test_a_crowd_of_equal_videos_is_one_group():
    train = [{**row, "hashes": [7] * FRAMES} for row in rows("train", 300)]
    found = judge({"train": train, "validation": rows("validation", 3)})
    assert [len(group.keys) for group in found.repeats] == [300]
    assert [broken.threshold for broken in found.broken] == ["max_duplicate_share"]


def test_the_nearest_of_a_crowd_is_found_wherever_it_is(monkeypatch):
    """All of training hang together; one video of validation is near to a late one of them alone, one has a late one's bytes."""
    monkeypatch.setattr(copies, "_COMPARED", 8)
    base = np.array(rows("train", 1)[0]["hashes"], np.uint64)
    train = [{**row, "hashes": (base ^ np.uint64(1 << number)).tolist()} for number, row in enumerate(rows("train", 30))]
    late = base.copy()
    late[0] ^= np.uint64(0xFFF << 40)
    train[27] |= {"hashes": late.tolist()}
    further = late.copy()
    further[1] ^= np.uint64(0xFFF)
    validation = rows("validation", 2)
    validation[0] |= {"hashes": further.tolist()}
    validation[1] |= {"sha256": "train29"}
    found = judge({"train": train, "validation": validation})
    assert [(leak.video.key, leak.duplicate.key, leak.bits) for leak in found.leaks] == [
        ("validation0", "train27", 3.0),
        ("validation1", "train29", 0.0),
    ]
    assert len(found.repeats[0].keys) == 30


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("max_unreadable_share", 1 / 46),
        ("max_quarantined_share", 2 / 48),
        ("max_black_share", 1 / 45),
        ("max_static_share", 1 / 45),
        ("max_tiny_share", 1 / 45),
        ("max_class_imbalance", 2.0),
        ("max_unseen_object_share", 0.5),
    ],
)
def test_a_threshold_holds_at_its_bound_and_breaks_below(field, found):
    train, validation = rows("train", 40), rows("validation", 6)
    for number, row in enumerate(train):
        row["label"] = max(number % 4 - 1, 0)
    train[0] = quality.unread("train-00000.tar", "train0", 0, "broken")
    train[1] |= {"contrast": 0.0, "brightness": 1.0}
    train[2] |= {"motion": 0.0}
    train[3] |= {"height": 40}
    validation[0] |= {"text": "holding a zebra"}
    off = {name: None for name in QualityConfig.model_fields if name.startswith("max_")}
    for allowed, broken in ((found, []), (found * 0.99, [field])):
        judged = judge({"train": train, "validation": validation}, quarantined=2, **{**off, field: allowed})
        assert [line.threshold for line in judged.broken] == broken


def test_a_set_of_which_nothing_is_readable():
    broken = [quality.unread("train-00000.tar", f"train{n}", 0, "no frame decodes") for n in range(3)]
    found = judge({"train": broken})
    assert found.splits["train"].unreadable == 3
    assert found.splits["train"].measures == {}
    assert "max_unreadable_share" in {line.threshold for line in found.broken}
