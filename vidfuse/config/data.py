"""Fields of a packed set: how its clips are read and drawn, and what is asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vidfuse.config.augment import Augment, Flip, Temporal
from vidfuse.config.section import Section, check_range


class Curriculum(Section):
    """Easy videos first: an epoch draws from the easiest of them alone, and from more of them each epoch."""

    difficulty: str
    """CSV file (path or `s3://` URL) with the columns `key,value`: a number for each training sample, larger is harder."""
    start: float = Field(0.3, gt=0, le=1)
    """Share of the samples, the easiest, that the first epoch draws from."""
    epochs: int = Field(10, ge=1)
    """Epochs after which it draws from all of them; the share grows in a line until then."""


class DataConfig(Section):
    """Which packed set, and how its videos become clips."""

    url: str | None = None
    """Folder or `s3://` URL of a packed set (it holds `manifest.json`)."""
    classes: int = Field(174, ge=2)
    """Number of classes; must be the manifest's."""
    train_split: str = "train"
    """Split of the manifest that is trained on."""
    validation_split: str = "validation"
    """Split of the manifest that is scored after epochs."""
    frames: int = Field(16, ge=1)
    """Frames of a clip."""
    size: int = Field(224, ge=16)
    """Height and width of a clip, in pixels."""
    sampling: Literal["uniform", "dense", "single"] = "uniform"
    """`uniform`: one frame a TSN segment; `dense`: consecutive frames `stride` apart; `single`: one frame, repeated."""
    stride: int = Field(2, ge=1)
    """Distance of neighbouring frames under dense sampling, in frames."""
    repeats: int = Field(1, ge=1)
    """Clips of each training video in its micro batch, decoded once, with frames and crops of their own (repeated augmentation,
    Hoffer et al. 2019, arXiv:1901.09335). Batches, steps and epochs count videos; memory and time grow with the clips."""
    views: int | None = Field(None, ge=1)
    """How many different clips are drawn of a training video, over all epochs: its uses take them in turn. `null`: each use draws anew;
    `features=auto` makes it 1."""
    features: Literal["off", "auto"] = "off"
    """`auto`: frozen streams' tokens are taken from the cache that `python -m jobs.features` makes, of each training video's
    `views` clips and of validation's; see the section `features`. `off`: the streams run on every clip."""
    weighting: str | None = None
    """How often each training sample is used in an epoch, which has as many uses as samples. `null`: once; `balanced`: each class equally
    often; else a CSV file (path or `s3://` URL) with the columns `key,value`: weights."""
    curriculum: Curriculum | None = None
    """Easy samples first. `null`: all of them from the start."""
    shuffle_block: int = Field(1, ge=1, le=64)
    """Neighbours in a shard that stay together in an epoch's order, and are asked of the storage in one request. 1: the order is a
    permutation of single samples. 4 or 8 spare object storage and hard disks most of their requests; who is whose neighbour is chance
    (packing orders by a hash of keys), but much the same in each epoch."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the frame's area that a training crop takes."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width : height of a training crop."""
    flip: Flip = False
    """Whether training clips are mirrored left-right, half of them. Labels that name a side or a turn follow: `from left to right`
    becomes the class `from right to left`; a clip whose mirrored class does not exist is not mirrored. Classes that are only numbers
    are refused, since they tell no sides. `keep_labels`: every clip may be mirrored, and keeps its label."""
    augment: Augment = Augment()
    """What else alters training clips."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Video decoder."""
    frame_cache: str | None = None
    """Folder on each machine's local disk in which clips are kept that come again, decoded, cropped and resized: validation's, testing's,
    and training's if `views` is a number. `null`: none are."""
    frame_cache_bytes: int = Field(64 * 1024**3, ge=1)
    """Most that is kept on a machine, in bytes; the least recently used clips go. 6 % of the disk are left free in any case."""
    block_bytes: int = Field(16 * 1024**2, ge=1)
    """Decoded clips of a block, in bytes; at least one micro batch, and 16 clips where `buffer_bytes` has room. A Ray Data task reads and
    gives one to four blocks."""
    cpus_per_task: float = Field(0.5, gt=0)
    """CPUs that one reading task asks of Ray."""
    buffer_bytes: int = Field(4 * 1024**3, ge=1)
    """Decoded clips that may wait between reading tasks and workers, all workers together, in bytes."""
    prefetch_batches: int = Field(2, ge=0)
    """Micro batches that a worker fetches ahead."""
    unreadable_limit: float = Field(0.05, ge=0, le=1)
    """Share of an epoch's videos that may be unreadable; with more the run ends, at its next checkpoint or with the epoch."""

    @field_validator("features", mode="before")
    @classmethod
    def _off_is_no_truth_value(cls, value: object) -> object:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _views_are_finite(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("features") == "auto" and given.get("views") is None:
            return {**given, "views": 1}
        return given

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        check_range("crop_area", self.crop_area, 1.0)
        check_range("crop_aspect", self.crop_aspect, 10.0)
        if self.frame_cache is not None and not Path(self.frame_cache).is_absolute():
            raise ValueError(
                f"frame_cache is a folder on each machine's local disk, named from its root (/...), given {self.frame_cache!r}"
            )
        temporal, plain = self.augment.temporal, Temporal()
        moved = [name for name in Temporal.model_fields if getattr(temporal, name) != getattr(plain, name)]
        if self.sampling == "single" and moved:
            raise ValueError(
                f"augment.temporal.{moved[0]} is about frames of a clip, which under sampling=single are all the same one; leave it out"
            )
        fastest = temporal.speed[1]
        if self.sampling == "uniform" and fastest > 1:
            raise ValueError(
                f"augment.temporal.speed is at most 1 under sampling=uniform, which covers the video, given {fastest:g}"
            )
        if self.views is not None and self.repeats > self.views:
            raise ValueError(
                f"repeats is {self.repeats}, and a video has only {self.views} different clips; raise views to that"
            )
        return self


class FeaturesConfig(Section):
    """Where frozen streams' tokens are kept, and what is done where they are not."""

    url: str | None = None
    """Folder or `s3://` URL under which caches are kept. `null`: `features` below `run.storage`."""
    absent: Literal["compute", "raw"] = "compute"
    """What a training does where there is no cache: `compute` makes it first, `raw` runs the streams on every clip. One that was made
    of other weights or another packed set is refused either way."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the numbers that are kept."""


class QualityConfig(Section):
    """What `jobs.quality` calls a flaw of a packed set, and how many flaws it lets pass. Luma is 0 (black) to 255."""

    duplicate_bits: float = Field(4.0, ge=0, le=8)
    """Most bits, of 64, in which the hashes of two videos' frames may differ on average while the videos count as duplicates. The
    time of finding them grows steeply with it."""
    black_luma: float = Field(16.0, ge=0, le=255)
    """Mean luma up to which a video without contrast is black."""
    flat_contrast: float = Field(4.0, ge=0)
    """Standard deviation of luma in a frame up to which a video is of one colour. Its hash says nothing: only equal bytes
    make it a duplicate."""
    static_motion: float = Field(0.5, ge=0)
    """Mean change of luma between the frames that are looked at, up to which a video is static."""
    least_side: int = Field(64, ge=1)
    """Shorter side, in pixels, below which a video is tiny."""
    outlier_deviations: float = Field(8.0, gt=0)
    """Robust standard deviations (1.4826 x median absolute deviation) from its split's median beyond which a video is listed as an
    outlier; outliers are never held against a threshold."""
    min_class_samples: int = Field(2, ge=0)
    """Training videos below which a class is named as poor."""
    max_poor_classes: int | None = Field(0, ge=0)
    """Poor classes that may be. `null`: any."""
    max_class_imbalance: float | None = Field(None, ge=1)
    """Training videos of the largest class over those of the smallest that has any. `null`: any."""
    max_unreadable_share: float | None = Field(0.0, ge=0, le=1)
    """Share of the videos that may not decode. `null`: any."""
    max_quarantined_share: float | None = Field(0.05, ge=0, le=1)
    """Share of the source's videos that packing may have left out. `null`: any."""
    max_cross_split_duplicates: int | None = Field(0, ge=0)
    """Videos that may have a duplicate in another split. `null`: any."""
    max_duplicate_share: float | None = Field(0.01, ge=0, le=1)
    """Share of a split's videos that may repeat another one of it. `null`: any."""
    max_black_share: float | None = Field(0.0, ge=0, le=1)
    """Share of the readable videos that may be black or of one colour. `null`: any."""
    max_static_share: float | None = Field(0.01, ge=0, le=1)
    """Share of the readable videos that may be static. `null`: any."""
    max_tiny_share: float | None = Field(0.0, ge=0, le=1)
    """Share of the readable videos that may be tiny. `null`: any."""
    max_unseen_object_share: float | None = Field(None, ge=0, le=1)
    """Share of the objects that validation's sentences name and those of training never do. `null`: any."""
